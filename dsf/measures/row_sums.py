"""How much weight does a row hand out in total?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["row_sum"]


def row_sum(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The sum of the weights of every row, sum_j w_tj: the response to constant values.

    1 for softmax and normalised linear attention, 0 for the radial part of ZeroS, anything for
    state space models.

    Parameters
    ----------
    system: a dsf system, a map tensor (batch, head, [channel,] query, key) or a DataArray map.
    length: number of steps of a time-invariant system.
    block: rows or columns of one tile, steps of one chunk of a scan; by default as large as is
        quick within some hundred MiB.
    queries: measure these rows alone: a list of positions (0-based), or a number, for a sample of
        one row from each of so many equal stretches. `query_mean` gives the mean over a sample
        with its standard error.

    Returns (batch, head, [channel,] query), dimensionless, in float64; complex for a map that is
    complex. Cost for a recurrence with dense coefficients: scans, O(length x state x (state +
    chunk)), without the map; for others one pass over the map by tiles, O(length^2). Of chosen
    rows O(length x state x (state + chunk + rows)). Memory O(length x block). attrs `method` says
    which. Raises DsfValueError on rows that are not there.
    Source: Sieber et al. (2024), equation 12; Lu et al. (2025) for the zero sum.
    """
    return row_measure("row_sum", system, length, block, queries)


MEASURES = (row_sum,)
