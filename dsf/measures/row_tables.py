"""What do all the row measures say, for the price of one?"""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from dsf.errors import DsfValueError
from dsf.measures._maps import MapLike
from dsf.measures._row_formulas import FORMULAS
from dsf.measures._row_measure import row_quantities
from dsf.measures._row_tiles import Queries

__all__ = ["row_statistics"]


def row_statistics(
    system: MapLike,
    names: Sequence[str] | None = None,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.Dataset:
    """Several row measures from one pass over the map: a Dataset with a variable for each.

    names: out of row_sum, spread, scaled_spread, l1_mass, negative_mass, negative_count_share,
    participation, first_token_share, attention_distance, entropy, perplexity; by default all.
    The other parameters are those of `row_sum`; the cost is that of the dearest measure named, by
    scans if scans can give them all. Raises DsfValueError on unknown names.
    """
    chosen = tuple(FORMULAS) if names is None else tuple(names)
    unknown = [name for name in chosen if name not in FORMULAS]
    if unknown or not chosen:
        raise DsfValueError(
            f"dsf.row_statistics: names: expected some of {tuple(FORMULAS)}, got "
            f"{unknown or list(chosen)}."
        )
    return xr.Dataset(row_quantities(chosen, system, length, block, queries))


MEASURES = ()
