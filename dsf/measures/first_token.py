"""How much of a row falls on the first token (an attention sink)?"""

from __future__ import annotations

import xarray as xr

from dsf.measures._maps import MapLike, open_map
from dsf.measures._rows import row_sums, share

__all__ = ["first_token_share"]


def first_token_share(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The share of a row's absolute weight on the first key, |w_t1| / sum_j |w_tj|.

    1 in the first row of a causal map; 1/n for n equal weights. NaN for a row of zeros.
    Parameters and cost as `row_sum`. Returns (batch, head, [channel,] query), a share in [0, 1].
    Source: Xiao et al. (2024), attention sinks.
    """
    source = open_map(system, length=length)
    sums = row_sums(source, block)
    return source.result(
        share(sums.first, sums.absolute), ("query",), "first_token_share", units="1",
        long_name="share of the absolute weight on the first key", method="float64 sums by tiles",
    )  # fmt: skip


MEASURES = (first_token_share,)
