"""How much absolute weight does a row hand out?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["l1_mass"]


def l1_mass(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The absolute weight of every row, sum_j |w_tj|: the most that values of size 1 can give.

    The row sum where no weight is negative, twice the negative part where the row sums to zero.
    Parameters as `row_sum`. Cost: scans, without the map, for systems of one state and for those
    whose coefficients have no negative entry; for others one pass over the map by tiles,
    O(length^2), or chosen rows alone. Returns (batch, head, [channel,] query), dimensionless.
    Source: ZeroS attention, weight diagnostics.
    """
    return row_measure("l1_mass", system, length, block, queries)


MEASURES = (l1_mass,)
