"""How far do the weights of a row differ from each other?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["scaled_spread", "spread"]


def spread(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The zero-sum spread of every row: the size of what is left when its mean is taken away.

        spread_t = sqrt( (1/n) sum_j (w_tj - mean_j w_tj)^2 )

    over the n keys that row t may see (t of them under a causal mask; masked keys do not count,
    which a bare map cannot know). 0 for uniform attention, largest, sqrt(n - 1)/n, for a one-hot
    row that sums to 1.

    Parameters and cost as `row_sum`: by scans of the keys' centred Gram matrix where the state is
    small. Returns (batch, head, [channel,] query), dimensionless.
    Source: ZeroS attention, weight diagnostics.
    """
    return row_measure("spread", system, length, block, queries)


def scaled_spread(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """`spread` times the number n of keys: free of scale, so that rows of all lengths compare.

    n * spread_t: 0 for uniform attention, sqrt(n - 1) for a one-hot row, the standard deviation
    of the logits to first order. Parameters and cost as `row_sum`. Returns (batch, head,
    [channel,] query), dimensionless. Source: ZeroS attention, weight diagnostics.
    """
    return row_measure("scaled_spread", system, length, block, queries)


MEASURES = (spread, scaled_spread)
