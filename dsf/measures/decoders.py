"""Which query has made these weights?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.feature_maps import FeatureMap, Taylor
from dsf.measures._size_checks import require_copies
from dsf.measures._verdicts import YES
from dsf.measures._weight_functions import WeightFunction, gauss_newton, weight_function
from dsf.measures.query_verdicts import judge
from dsf.shapes import Float

__all__ = ["decode_query"]

MEASURES = ()
_SEED = 0
_STARTS = 8
_FOUND = 1e-14
"""Weights this near, relative to the largest, are met: no other start will do better."""


def decode_query(
    weights: Float[Tensor, "query _key"],
    keys: Float[Tensor, "key feature"],
    kind: str = "softmax",
    *,
    feature_map: str | FeatureMap = "identity",
    scale: float = 1.0,
    normalised: bool = True,
) -> xr.Dataset:
    """The query (or the features phi(q)) of each row of weights, where the keys tell them apart.

        softmax  w_j = exp(scale q.k_j) / sum          q = (P K)^+ P log w / scale
        inline   w_j = scale phi(q).(phi(k_j) - mean) + 1/n
                                                       phi(q) = (P Phi)^+ (w - 1/n) / scale
        linear   w_j = phi(q).phi(k_j) / sum           phi(q) = a Phi^+ w,  a > 0 unknown

    with P = I - 1 1^T / n, ^+ the pseudo-inverse. The query behind phi(q) is read off where phi
    holds it (identity, Taylor, whose constant feature also gives a), else found by Gauss-Newton.

    Returns a Dataset: `features` (query, state), of the length that gives the weights (of
    softmax: the query itself); `query_vector` (query, feature), NaN where none was found, phi is
    known to confuse queries, or (linear, divided) D <= d, where a whole ray is behind the weights;
    `residual` (query), the largest difference between the given weights and those of what was
    decoded. Raises DsfValueError where the rank is not full beyond rounding, or softmax weights
    are not positive; DsfShapeError. Cost: one SVD of key x state. Source: Han et al. (2024),
    decoders derived.
    """
    require_copies("decode_query", weights, keys)
    name = "dsf.decode_query"
    f = weight_function(name, kind, keys, feature_map, scale, normalised)
    n, d = f.keys.shape
    if weights.shape[1] != n:
        raise DsfShapeError(
            f"{name}: weights: expected axes (query, key={n}), got {tuple(weights.shape)}; key "
            f"is fixed by keys."
        )
    w = weights.detach().double()
    _check(name, f, keys.dtype, w)
    features = _features(f, w)
    queries = torch.stack([_query(f, row, x) for row, x in zip(w, features, strict=True)]) if (
        len(w)) else w.new_zeros(0, d)  # fmt: skip
    made = torch.where(queries.isnan().any(-1, keepdim=True), _weights(f, features), f(queries))
    residual = (made - w).abs().amax(-1)
    meta = {"units": "1", "kind": kind, "gauge": "none: a function of the query",
            "method": "pseudo-inverse in float64"}  # fmt: skip
    return xr.Dataset({
        "features": to_xarray(features, ("query", "state"), name="features",
                              attrs={**meta, "long_name": "decoded features of the query"}),
        "query_vector": to_xarray(queries, ("query", "feature"), name="query_vector",
                                  attrs={**meta, "long_name": "decoded query"}),
        "residual": to_xarray(residual, ("query",), name="residual", attrs={
            **meta, "long_name": "largest difference from the given weights"}),
    })  # fmt: skip


def _check(name: str, f: WeightFunction, dtype: torch.dtype, w: Tensor) -> None:
    found = judge(f, dtype)
    if found.rank != YES:
        rank = "full rank" if f.kind == "linear" else "full affine rank"
        raise DsfValueError(
            f"{name}: keys: expected features of {rank}, got: {found.reason} (margin "
            f"{found.margin:.2g}). "
            f"`query_collision` looks for two queries with the same weights."
        )
    if f.kind == "softmax" and not bool((w > 0).all()):
        raise DsfValueError(
            f"{name}: weights: expected positive softmax weights, got one of {float(w.min()):g}: "
            f"it underflowed; leave its key out."
        )


def _features(f: WeightFunction, w: Tensor) -> Tensor:
    """(query, state), scaled so that they give the weights."""
    Phi = f.features
    if f.kind == "linear":
        x = w @ torch.linalg.pinv(Phi.mT) / f.scale
        if f.normalised and isinstance(f.phi, Taylor):
            x = x / x[:, :1]  # the constant feature is 1
        return x
    centred = Phi - Phi.mean(0)
    target = torch.log(w) if f.kind == "softmax" else w
    target = target - target.mean(-1, keepdim=True)
    return target @ torch.linalg.pinv(centred.mT) / f.scale


def _weights(f: WeightFunction, features: Tensor) -> Tensor:
    """The weights of features that no query was found for."""
    scores = f.scale * features @ f.features.mT
    if f.kind == "inline":
        return scores - scores.mean(-1, keepdim=True) + 1 / len(f.keys)
    return scores / scores.sum(-1, keepdim=True) if f.normalised else scores


def _query(f: WeightFunction, w: Tensor, features: Tensor) -> Tensor:
    """The query of one row, NaN where none gives its weights."""
    d = f.keys.shape[1]
    if f.kind == "softmax":
        return features
    best, least = torch.full((d,), torch.nan, dtype=torch.float64), 1e-9 * float(w.abs().max())
    divided = f.kind == "linear" and f.normalised
    if f.facts.injective is False or (divided and len(features) <= d):
        return best
    if f.features is f.keys:
        return features
    if isinstance(f.phi, Taylor):
        return features[1 : d + 1]
    generator = torch.Generator().manual_seed(_SEED)
    for i in range(_STARTS):
        start = torch.randn(d, generator=generator, dtype=torch.float64) * (i > 0)
        found = gauss_newton(lambda p: f(p) - w, f.jacobian, start)
        gap = float((f(found) - w).abs().max())
        if gap < least:
            best, least = found, gap
        if gap <= _FOUND * float(w.abs().max()):
            break
    return best
