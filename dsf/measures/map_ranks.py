"""Over how many directions does the whole map spread its strength?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.measures._maps import MapLike, MapSource, open_map, whole_map

__all__ = ["effective_rank", "stable_rank"]


def effective_rank(system: MapLike, *, length: int | None = None) -> xr.DataArray:
    """exp of the entropy of the map's normalised singular values.

        exp(-sum_k p_k ln p_k),    p_k = sigma_k / sum_i sigma_i

    between 1 and the length; length for the identity, 1 for uniform full attention, 0 for a map
    of zeros. Returns (batch, head, [channel]). Cost: the whole map and an O(length^3) singular
    value decomposition of each head; refused with its size when the map would not fit.
    Source: Roy and Vetterli (2007).
    """
    source = open_map(system, length=length)
    sigma = torch.linalg.svdvals(whole_map(source))
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.masked_fill(total == 0, 1.0)
    value = torch.exp(-torch.xlogy(p, p).sum(-1)) * (total[..., 0] > 0)
    return _result(source, value, "effective_rank")


def stable_rank(system: MapLike, *, length: int | None = None) -> xr.DataArray:
    """The squared Frobenius norm over the squared largest singular value of the map.

        ||M||_F^2 / ||M||_2^2

    between 1 and the rank, unmoved by small singular values; 0 for a map of zeros. Returns
    (batch, head, [channel]). Cost as `effective_rank`. Source: Rudelson and Vershynin (2007).
    """
    source = open_map(system, length=length)
    sigma = torch.linalg.svdvals(whole_map(source))
    top = sigma.amax(-1) if sigma.shape[-1] else sigma.new_zeros(sigma.shape[:-1])
    scaled = sigma / top.masked_fill(top == 0, 1.0)[..., None]
    return _result(source, (scaled**2).sum(-1), "stable_rank")


def _result(source: MapSource, values: Tensor, name: str) -> xr.DataArray:
    return source.result(
        values, (), name, units="1", long_name=name.replace("_", " ") + " of the map",
        method="singular values of the whole map in float64",
    )  # fmt: skip


MEASURES = (effective_rank, stable_rank)
