"""Which other query gets the same weights over given keys?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfValueError
from dsf.feature_maps import FeatureMap
from dsf.measures._size_checks import require_copies
from dsf.measures._verdicts import YES
from dsf.measures._weight_functions import (
    WeightFunction,
    check_queries,
    gauss_newton,
    on_ray,
    weight_function,
)
from dsf.measures.query_verdicts import judge
from dsf.shapes import Float

__all__ = ["query_collision"]

MEASURES = ()
_SEED = 0
_STARTS = 8
_GUESSES = 4
_APART = 1e-2
"""Two queries count as different from this share of the query's length (or of 1) on."""


def query_collision(
    keys: Float[Tensor, "key feature"],
    kind: str = "softmax",
    *,
    query: Float[Tensor, " _feature"] | None = None,
    feature_map: str | FeatureMap = "identity",
    scale: float = 1.0,
    normalised: bool = True,
    tolerance: float = 1e-12,
    starts: int = _STARTS,
) -> xr.Dataset:
    """Two different queries whose weights over the keys agree to `tolerance`, checked on them.

    In this order, the first pair that holds:

        softmax, inline: p = q + s w with K w = c 1 (exact for phi = identity)
        linear: p = 2 q (positively homogeneous phi), then phi(p) = 2 phi(q) or phi(q)/2 by
            Gauss-Newton (the ray; elu + 1 on the positive orthant gives p = 2 (1 + q) - 1)
        any: along the direction that the Jacobian of the weights annihilates, pulled back onto
            equal weights by Gauss-Newton; with D <= d features, or n <= d keys, every regular
            query has such a curve through it
        any: Gauss-Newton on w(p) = w(q) from `starts` random queries (seeded)

    keys, kind, feature_map, normalised as in `query_injectivity`; scale as in the formulas of
    `decode_query`. query: the first of the pair; by default a few random ones are tried.

    Returns a Dataset: `query_pair` (pair, feature), `weights` (pair, key), float64, attrs
    `difference` (largest), `distance`, `found_by`. Raises DsfValueError where there is none: the
    message says whether that is proved (injective) or only not found. Cost: a few hundred small
    least squares at worst. Source: Han et al. (2024), propositions 1 to 3; the search is ours.
    """
    require_copies("query_collision", keys)
    name = "dsf.query_collision"
    f = weight_function(name, kind, keys, feature_map, scale, normalised)
    first = None if query is None else check_queries(name, query, f, 1)
    verdict, margin, reason, _ = judge(f, torch.float64)
    closest = float("inf")
    if verdict != YES:
        for q in _first_queries(f, first):
            for found_by, other in _candidates(f, q, starts):
                if not _apart(q, other):
                    continue
                weights = f(torch.stack([q, other]))
                difference = float((weights[0] - weights[1]).abs().max())
                if difference <= tolerance:
                    return _labelled(q, other, weights, difference, found_by, kind, tolerance)
                closest = min(closest, difference) if difference == difference else closest
    proved = "there is none" if verdict == YES else "none was found"
    near = f"; the closest weights differ by {closest:.2g}" if closest < float("inf") else ""
    raise DsfValueError(
        f"{name}: keys: expected a row that confuses two queries, {proved}: {reason} (margin "
        f"{margin:.2g}){near}, tolerance={tolerance:g}."
    )


def _labelled(
    q: Tensor, other: Tensor, weights: Tensor, difference: float, found_by: str, kind: str,
    tolerance: float,
) -> xr.Dataset:  # fmt: skip
    meta = {"units": "1", "difference": difference, "found_by": found_by, "kind": kind,
            "distance": float(torch.linalg.vector_norm(other - q)), "tolerance": tolerance,
            "method": "weights of both queries computed in float64"}  # fmt: skip
    pair = to_xarray(torch.stack([q, other]), ("pair", "feature"), name="query_pair", attrs=meta)
    rows = to_xarray(weights, ("pair", "key"), name="weights", attrs=meta)
    return xr.Dataset({"query_pair": pair, "weights": rows}, attrs=pair.attrs)


def _first_queries(f: WeightFunction, given: Tensor | None) -> Iterator[Tensor]:
    if given is not None:
        yield given
        return
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(_GUESSES):
        yield torch.randn(f.keys.shape[1], generator=generator, dtype=torch.float64)


def _apart(q: Tensor, other: Tensor) -> bool:
    size = torch.linalg.vector_norm(q).clamp(min=1.0)
    return bool(torch.linalg.vector_norm(other - q) >= _APART * size)


def _candidates(f: WeightFunction, q: Tensor, starts: int) -> Iterator[tuple[str, Tensor]]:
    size = float(torch.linalg.vector_norm(q)) or 1.0
    if f.kind != "linear":
        centred = f.keys - f.keys.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=True).Vh[-1]
        yield "null direction of the keys", q + size * direction
    elif f.normalised:
        yield "multiple of the query", 2 * q
        for factor in (2.0, 0.5):
            yield f"ray, factor {factor:g}", on_ray(f.phi, q, factor)
    direction = torch.linalg.svd(f.jacobian(q), full_matrices=True).Vh[-1]
    for share in (1.0, -1.0, 0.25, -0.25, 1 / 16, -1 / 16):
        yield "curve of equal weights", _on_curve(f, q, share * size * direction)
    generator = torch.Generator().manual_seed(_SEED)
    target = f(q)
    for _ in range(starts):
        start = q + 2 * size * torch.randn(len(q), generator=generator, dtype=torch.float64)
        yield "search", gauss_newton(lambda p: f(p) - target, f.jacobian, start)


def _on_curve(f: WeightFunction, q: Tensor, move: Tensor) -> Tensor:
    """w(p) = w(q) with p - q as long as `move` in its direction, so that p does not fall back."""
    length = torch.linalg.vector_norm(move)
    unit, target = move / length, f(q)

    def residual(p: Tensor) -> Tensor:
        return torch.cat([f(p) - target, (unit @ (p - q) - length)[None]])

    return gauss_newton(residual, lambda p: torch.cat([f.jacobian(p), unit[None]]), q + move)
