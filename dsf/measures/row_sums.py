"""How much weight does a row hand out in total?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike, open_map
from dsf.measures._rows import row_sums

__all__ = ["row_sum"]


def row_sum(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The sum of the weights of every row, sum_j w_tj: the response to constant values.

    1 for softmax and normalised linear attention, 0 for the radial part of ZeroS, anything for
    state space models.

    Parameters
    ----------
    system: a dsf system, a map tensor (batch, head, [channel,] query, key) or a DataArray map.
    length: number of steps of a time-invariant system.
    block: rows or columns of one tile; by default tiles of 32 MiB.

    Returns (batch, head, [channel,] query), dimensionless, summed in float64; complex for a map
    that is complex. Cost: one pass over the map by tiles, memory O(length x block).
    Source: Sieber et al. (2024), equation 12; Lu et al. (2025) for the zero sum.
    """
    source = open_map(system, length=length)
    sums = row_sums(source, block)
    return source.result(
        sums.count * sums.mean, ("query",), "row_sum",
        long_name="sum of the weights of a row", units="1", method="float64 sums by tiles",
    )  # fmt: skip


MEASURES = (row_sum,)
