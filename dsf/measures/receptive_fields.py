"""How far does each row reach?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.measures._maps import MapLike, MapSource, open_map
from dsf.measures._row_measure import row_measure, row_result
from dsf.measures._row_tiles import Queries, all_rows, chosen_rows, row_tiles

__all__ = ["attention_distance", "receptive_field"]

_ROUNDING = 1e-12  # of sums of shares


def attention_distance(
    system: MapLike,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The mean distance of a row's weight from its own token, by absolute weight, in steps.

        sum_j |w_tj| |t - j| / sum_j |w_tj|

    0 where all weight is on the token itself, (t - 1)/2 for uniform causal attention. NaN for a
    row of zeros. Parameters as `row_sum`; cost as `l1_mass`. Returns (batch, head, [channel,]
    query). Source: Dosovitskiy et al. (2021), mean attention distance, by |w|.
    """
    return row_measure("attention_distance", system, length, block, queries)


def receptive_field(
    system: MapLike,
    mass: float = 0.9,
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.DataArray:
    """The smallest window around the token that holds `mass` of its row's absolute weight.

        min { n : sum_{|t - j| < n} |w_tj| >= mass sum_j |w_tj| }

    1 where the token itself is enough; under a causal mask the last n keys. A sink on the first
    token makes it nearly t. NaN for a row of zeros. `effective_horizon` asks the same of all rows
    at once, counted in steps: a window of n keys is a horizon of n - 1.

    Parameters as `row_sum`. Every row is read whole, some at a time: O(length^2) for all, chosen
    rows alone with `queries`; memory O(length x block). Returns (batch, head, [channel,] query),
    in steps. Raises DsfValueError unless 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise DsfValueError(f"dsf.receptive_field: mass: expected in (0, 1], got {mass}.")
    source = open_map(system, length=length)
    rows = chosen_rows("dsf.receptive_field", queries, source.n_query)
    every = all_rows(source.n_query) if rows is None else rows
    parts = [_window(source, at, tile, mass) for at, tile, _ in row_tiles(source, every, block)]
    empty = torch.zeros(*source.lead_shape, 0, dtype=torch.float64)
    return row_result(
        source, torch.cat([empty, *parts], -1), "receptive_field", rows, units="step", mass=mass,
        long_name=f"window that holds {100 * mass:g} % of the absolute weight of a row",
        method=f"{every.described}, each read whole, float64",
    )  # fmt: skip


def _window(source: MapSource, at: Tensor, tile: Tensor, mass: float) -> Tensor:
    query, key = source.positions
    lag = (query[at][:, None] - key).abs().to(tile.device)
    size = tile.abs()
    span = int(lag.max()) + 1 if lag.numel() else 1
    by_lag = torch.zeros(*size.shape[:-1], span, dtype=torch.float64, device=tile.device)
    by_lag.scatter_add_(-1, lag.expand(size.shape), size)
    inside = by_lag.cumsum(-1)
    total = inside[..., -1:]
    width = (inside < (mass - _ROUNDING) * total).sum(-1).to(torch.float64) + 1
    return width.masked_fill(total[..., 0] == 0, torch.nan)


MEASURES = (attention_distance, receptive_field)
