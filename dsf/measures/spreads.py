"""How far do the weights of a row differ from each other?"""

from __future__ import annotations

import torch
import xarray as xr

from dsf.measures._maps import MapLike, open_map
from dsf.measures._rows import row_sums

__all__ = ["scaled_spread", "spread"]


def spread(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The zero-sum spread of every row: the size of what is left when its mean is taken away.

        spread_t = sqrt( (1/n) sum_j (w_tj - mean_j w_tj)^2 )

    over the n keys that row t may see (t of them under a causal mask; masked keys do not count,
    which a bare map cannot know). 0 for uniform attention, largest, sqrt(n - 1)/n, for a one-hot
    row that sums to 1.

    Parameters and cost as `row_sum`. Returns (batch, head, [channel,] query), dimensionless.
    Source: ZeroS attention, weight diagnostics.
    """
    return _spread(system, length, block, "spread")


def scaled_spread(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """`spread` times the number n of keys: free of scale, so that rows of all lengths compare.

    n * spread_t: 0 for uniform attention, sqrt(n - 1) for a one-hot row, the standard deviation
    of the logits to first order. Parameters and cost as `row_sum`. Returns (batch, head,
    [channel,] query), dimensionless. Source: ZeroS attention, weight diagnostics.
    """
    return _spread(system, length, block, "scaled_spread")


def _spread(system: MapLike, length: int | None, block: int | None, name: str) -> xr.DataArray:
    source = open_map(system, length=length)
    sums = row_sums(source, block)
    value = torch.sqrt(sums.squares / sums.count.clamp(min=1))
    scaled = name == "scaled_spread"
    return source.result(
        value * sums.count if scaled else value, ("query",), name,
        long_name="spread of the weights of a row" + (" times its keys" if scaled else ""),
        units="1", method="centred squares in float64, merged by tiles",
    )  # fmt: skip


MEASURES = (spread, scaled_spread)
