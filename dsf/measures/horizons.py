"""How far back do the weights of a map reach?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.measures._maps import MapLike, MapSource, open_map, widened
from dsf.measures._rows import row_sums

__all__ = ["effective_horizon", "lag_mass"]


def lag_mass(
    system: MapLike, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The share of a map's absolute weight at each distance |t - j| between query and key.

        m(lag) = mean over rows of sum_{|t-j|=lag} |w_tj| / sum_i |w_ti|

    Rows without any weight are left out. Returns (batch, head, [channel,] step) with the lag as
    `step`; sums to 1 over it. Cost: two passes over the map by tiles, memory O(length x block).
    """
    source = open_map(system, length=length)
    return source.result(
        _profile(source, block), ("step",), "lag_mass", units="1",
        long_name="share of the absolute weight by distance", method="absolute weights by tiles",
    )  # fmt: skip


def effective_horizon(
    system: MapLike, mass: float = 0.9, *, length: int | None = None, block: int | None = None
) -> xr.DataArray:
    """The smallest distance within which a map holds `mass` of its absolute weight.

    From `lag_mass`: 0 when all weight is on the token itself. Unlike the half-life of the states
    it does not depend on their coordinates. Returns (batch, head, [channel]) in steps; NaN for a
    map of zeros. Raises DsfValueError unless 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise DsfValueError(f"dsf.effective_horizon: mass: expected in (0, 1], got {mass}.")
    source = open_map(system, length=length)
    total = torch.cumsum(_profile(source, block), -1)
    reached = total < mass - 1e-12  # rounding of sums of shares
    value = reached.sum(-1).to(torch.float64)
    value = value.masked_fill(total[..., -1].isnan(), torch.nan)
    return source.result(
        value, (), "effective_horizon", units="step", mass=mass,
        long_name=f"distance that holds {100 * mass:g} % of the absolute weight",
        method="absolute weights by tiles",
    )  # fmt: skip


def _profile(source: MapSource, block: int | None) -> Tensor:
    total = row_sums(source, block).absolute
    alive = total > 0
    inverse = torch.where(alive, 1 / total.masked_fill(~alive, 1.0), 0.0)
    query, key = source.positions
    span = int(max(query.max() - key.min(), key.max() - query.min(), 0)) + 1
    lags = torch.zeros(*source.lead_shape, span, dtype=torch.float64)
    for rows, columns in source.tiles(block):
        for cols in columns:
            part = widened(source.read(rows, cols)).abs().cpu()
            part = part * inverse.cpu()[..., rows.start : rows.stop, None]
            lag = query[rows.start : rows.stop, None] - key[cols.start : cols.stop]
            lags.index_add_(-1, lag.abs().flatten(), part.flatten(-2))
    return lags / alive.sum(-1, keepdim=True).cpu()


MEASURES = (effective_horizon, lag_mass)
