"""Over how many keys is a row's weight shared?"""

from __future__ import annotations

import torch
import xarray as xr

from dsf.measures._maps import MapLike, MapSource, open_map
from dsf.measures._rows import row_sums

__all__ = ["entropy", "perplexity"]


def entropy(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The entropy of a row's absolute weights, in nats.

        H_t = -sum_j a_tj ln a_tj,    a_tj = |w_tj| / sum_i |w_ti|

    0 for a row on one key, ln n for n equal weights; signs do not matter. NaN for a row of zeros.
    Parameters and cost as `row_sum`. Returns (batch, head, [channel,] query).
    Source: Shannon (1948); ZeroS attention, weight diagnostics.
    """
    source = open_map(system, length=length)
    return _result(source, _entropy(source, block), "entropy", "nat")


def perplexity(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The effective number of keys of a row, exp(entropy), between 1 and the keys it may see.

    Parameters and cost as `row_sum`. Returns (batch, head, [channel,] query).
    """
    source = open_map(system, length=length)
    return _result(source, torch.exp(_entropy(source, block)), "perplexity", "keys")


def _entropy(source: MapSource, block: int | None) -> torch.Tensor:
    sums = row_sums(source, block)
    total = sums.absolute.masked_fill(sums.absolute == 0, torch.nan)
    return (torch.log(total) - sums.log_moment / total).clamp(min=0)


def _result(source: MapSource, values: torch.Tensor, name: str, units: str) -> xr.DataArray:
    return source.result(
        values, ("query",), name, units=units,
        long_name=f"{name} of the absolute weights of a row",
        method="ln S - sum |w| ln|w| / S in float64, by tiles",
    )  # fmt: skip


MEASURES = (entropy, perplexity)
