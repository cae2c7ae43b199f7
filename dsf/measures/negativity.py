"""How much of a row subtracts?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["negative_count_share", "negative_mass"]


def negative_mass(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The share of a row's absolute weight that is negative, sum_j max(-w_tj, 0) / sum_j |w_tj|.

    0 for softmax, exactly 1/2 for rows that sum to zero. NaN for a row of zeros and for complex
    maps, whose weights have no sign. Parameters as `row_sum`; cost as `l1_mass`. Returns (batch,
    head, [channel,] query), a share in [0, 1]. Source: ZeroS attention, weight diagnostics.
    """
    return row_measure("negative_mass", system, length, block, queries)


def negative_count_share(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The share of the keys a row may see whose weight is below zero, #{j: w_tj < 0} / n.

    Parameters as `row_sum`; cost as `l1_mass`. Returns (batch, head, [channel,] query), a share in
    [0, 1]; NaN for a row that sees no key and for complex maps. Weights that underflow to zero in
    a map are counted by their sign where scans give the count. Source: ZeroS attention, weight
    diagnostics.
    """
    return row_measure("negative_count_share", system, length, block, queries)


MEASURES = (negative_mass, negative_count_share)
