"""Two queries on one ray of feature space: what divided linear attention confuses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._size_checks import require_copies
from dsf.measures._weight_functions import on_ray
from dsf.shapes import Float

__all__ = ["ray_collision"]

MEASURES = ()


def ray_collision(
    feature_map: Callable[[Tensor], Tensor],
    query: Float[Tensor, " feature"],
    keys: Float[Tensor, "key feature"],
    *,
    factor: float = 2.0,
    tolerance: float = 1e-12,
) -> xr.Dataset:
    """A second query p whose normalised linear attention weights equal those of `query`.

        w_j(q) = phi(q).phi(k_j) / sum_s phi(q).phi(k_s),    phi(p) = factor * phi(q)

    For a positively homogeneous feature map (ReLU, identity) p = factor q, exactly. Else p is
    found by Gauss-Newton on phi(p) - factor phi(q), starting from the query; elu+1 on the positive
    orthant gives p = factor (1 + q) - 1. With D > d features there need be none.

    Parameters
    ----------
    feature_map: phi, differentiable, from (..., feature) to (..., features).
    query: q (feature). keys: (key, feature). factor: positive, not 1.
    tolerance: the largest difference of weights that counts as equal.

    Returns a Dataset: `query_pair` (pair, feature), `weights` (pair, key), both float64, attrs
    `difference`, `distance`. Raises DsfValueError if no p within `tolerance` is found, or the
    weights of the query do not exist (denominator 0). Source: Han et al. (2024), proposition 2.
    """
    require_copies("ray_collision", query, keys)
    if query.ndim != 1 or keys.ndim != 2 or keys.shape[1] != query.shape[0]:
        raise DsfShapeError(
            f"dsf.ray_collision: query, keys: expected axes (feature) and (key, feature), got "
            f"{tuple(query.shape)} and {tuple(keys.shape)}."
        )
    if factor <= 0 or factor == 1:
        raise DsfValueError(
            f"dsf.ray_collision: factor: expected positive and not 1, got {factor}."
        )
    q, k = query.detach().double(), keys.detach().double()
    features = feature_map(k)
    best = None
    for other in (factor * q, on_ray(feature_map, q, factor)):
        weights = torch.stack([_weights(feature_map, x, features) for x in (q, other)])
        difference = float((weights[0] - weights[1]).abs().max())
        if best is None or difference < best[2]:
            best = (other, weights, difference)
    assert best is not None
    other, weights, difference = best
    if not difference <= tolerance:
        raise DsfValueError(
            f"dsf.ray_collision: feature_map: expected a query on the same ray in feature space, "
            f"found none: the closest weights differ by {difference:.2g}, more than "
            f"tolerance={tolerance:g}. With more features than query entries there need be none."
        )
    meta = {"units": "1", "difference": difference, "factor": factor, "tolerance": tolerance,
            "distance": float(torch.linalg.vector_norm(other - q)),
            "method": "weights of both queries computed in float64"}  # fmt: skip
    pair = to_xarray(torch.stack([q, other]), ("pair", "feature"), name="query_pair", attrs=meta)
    rows = to_xarray(weights, ("pair", "key"), name="weights", attrs=meta)
    return xr.Dataset({"query_pair": pair, "weights": rows}, attrs=pair.attrs)


def _weights(feature_map: Callable[[Tensor], Tensor], query: Tensor, keys: Tensor) -> Tensor:
    scores = keys @ feature_map(query)
    return scores / scores.sum()
