"""Over how many keys is a row's weight shared?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["entropy", "participation", "perplexity"]


def entropy(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The entropy of a row's absolute weights, in nats.

        H_t = -sum_j a_tj ln a_tj,    a_tj = |w_tj| / sum_i |w_ti|

    0 for a row on one key, ln n for n equal weights; signs do not matter. NaN for a row of zeros.
    Parameters as `row_sum`; it needs every weight of a row: one pass over the map by tiles, or of
    chosen rows alone. Returns (batch, head, [channel,] query).
    Source: Shannon (1948); ZeroS attention, weight diagnostics.
    """
    return row_measure("entropy", system, length, block, queries)


def perplexity(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The effective number of keys of a row, exp(entropy), between 1 and the keys it may see.

    Parameters and cost as `entropy`. Returns (batch, head, [channel,] query).
    """
    return row_measure("perplexity", system, length, block, queries)


def participation(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The number of keys that take part in a row, ||w_t||_1^2 / ||w_t||_2^2.

    1 for a row on one key, n for n weights of one size; signs do not matter. NaN for a row of
    zeros. Parameters as `row_sum`; cost as `l1_mass`. Returns (batch, head, [channel,] query), in
    keys. Source: ZeroS attention, weight diagnostics.
    """
    return row_measure("participation", system, length, block, queries)


MEASURES = (entropy, participation, perplexity)
