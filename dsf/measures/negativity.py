"""How much of a row subtracts?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike, open_map
from dsf.measures._rows import row_sums, share

__all__ = ["negative_count_share", "negative_mass"]


def negative_mass(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The share of a row's absolute weight that is negative, sum_j max(-w_tj, 0) / sum_j |w_tj|.

    0 for softmax, exactly 1/2 for rows that sum to zero. NaN for a row of zeros and for complex
    maps, whose weights have no sign. Parameters and cost as `row_sum`. Returns (batch, head,
    [channel,] query), a share in [0, 1]. Source: ZeroS attention, weight diagnostics.
    """
    source = open_map(system, length=length)
    sums = row_sums(source, block)
    return source.result(
        share(sums.negative, sums.absolute), ("query",), "negative_mass",
        long_name="negative share of the absolute weight", units="1",
        method="float64 sums by tiles",
    )  # fmt: skip


def negative_count_share(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The share of the keys a row may see whose weight is below zero, #{j: w_tj < 0} / n.

    Parameters and cost as `row_sum`. Returns (batch, head, [channel,] query), a share in [0, 1];
    NaN for a row that sees no key and for complex maps. Source: ZeroS attention, weight
    diagnostics.
    """
    source = open_map(system, length=length)
    sums = row_sums(source, block)
    return source.result(
        share(sums.n_negative, sums.count), ("query",), "negative_count_share",
        long_name="share of the keys with negative weight", units="1", method="count by tiles",
    )  # fmt: skip


MEASURES = (negative_mass, negative_count_share)
