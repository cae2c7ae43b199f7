"""How much of a row falls on the first token (an attention sink)?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike
from dsf.measures._row_measure import row_measure
from dsf.measures._row_tiles import Queries

__all__ = ["first_token_share"]


def first_token_share(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The share of a row's absolute weight on the first key, |w_t1| / sum_j |w_tj|.

    1 in the first row of a causal map; 1/n for n equal weights. NaN for a row of zeros. Its mean
    over heads, layers and queries is the F-Attn of Qiu et al. (2025): take it from the second row
    on (`query_mean(..., start=1)`) and at one length, since uniform causal attention has mean_t
    1/t. One minus it is the gate that the sink implies. Parameters as `row_sum`; cost as
    `l1_mass`. Returns (batch, head, [channel,] query), a share in [0, 1].
    Source: Xiao et al. (2024), attention sinks; Qiu et al. (2025), section 4.
    """
    return row_measure("first_token_share", system, length, block, queries)


MEASURES = (first_token_share,)
