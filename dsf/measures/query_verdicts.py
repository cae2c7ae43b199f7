"""Does a row of attention over given keys tell all queries apart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.feature_maps import FeatureMap
from dsf.measures._judged_rows import positions_of
from dsf.measures._size_checks import require_copies
from dsf.measures._verdicts import FLAGS, NO, RANK_WORDS, UNDECIDED, YES, decide, tolerances
from dsf.measures._weight_functions import Facts, WeightFunction, weight_function
from dsf.shapes import Float

__all__ = ["query_injectivity"]

MEASURES = ()


def query_injectivity(
    keys: Float[Tensor, "key feature"],
    kind: str = "softmax",
    *,
    feature_map: str | FeatureMap = "identity",
    positions: Sequence[int] | str | None = None,
    normalised: bool = True,
    injective: bool | None = None,
    rays: bool | None = None,
    unit_roundoff: float | None = None,
) -> xr.Dataset:
    """Whether two queries of width d can get the same weights over the keys, with the margin.

        softmax  exp(q.k_j) / sum      yes iff rank [K, 1] = d + 1
        inline   phi(q).(phi(k_j) - mean) + 1/n
                                       yes if phi is injective and rank [Phi, 1] = D + 1
        linear   phi(q).phi(k_j) / sum no if D <= d, whatever the continuous phi; with D > d yes
                                       if no two queries share a ray phi(p) = a phi(q) and
                                       rank Phi = D

    Divided rows are judged where their sum is not 0. A row of n <= d keys (n < d where rows do
    not sum to one) never is: its weights fill at most n - 1 dimensions. Position t sees the keys
    0..t (a causal row); the last one sees all.

    Parameters
    ----------
    keys: (key, feature), of one head.
    kind: softmax, linear or inline. feature_map: phi, a name of `dsf.feature_maps` or a
        continuous callable.
    positions: 0-based, negative from the end, "all", or None for the last.
    normalised: False for linear attention that is not divided by its sum.
    injective, rays: what is known of phi: that phi(p) = phi(q) only for p = q, and whether two
        queries share a ray. Known by themselves for the named maps; without, the verdict is
        "undecided" where they matter. `query_collision` searches for a pair.
    unit_roundoff: of the numbers stored; by default that of the keys' dtype.

    Returns a Dataset over (query): `verdict` (1 yes, 0 undecided, -1 no), `margin` (smallest
    singular value of the matrix whose rank counts, columns scaled to 1; 0 where counting keys or
    features decides), `reason`. Raises DsfValueError, DsfShapeError. Cost: one SVD of key x state
    a position. Source: Han et al. (2024), propositions 1 to 3, sharpened.
    """
    require_copies("query_injectivity", keys)
    name = "dsf.query_injectivity"
    f = weight_function(name, kind, keys, feature_map, 1.0, normalised, Facts(injective, rays))
    chosen = positions_of(name, positions, len(keys))
    found = [judge(f.prefix(t + 1), keys.dtype, unit_roundoff) for t in chosen]
    low, high = tolerances(keys.dtype, f.features.shape[1], unit_roundoff)
    meta = {"units": "1", "precision": str(keys.dtype).removeprefix("torch."), "kind": kind,
            "space": "query", "tolerance": [low, high], "gauge": "none: a function of the query",
            "method": "affine rank of the keys (softmax), rank of their features"}  # fmt: skip

    def label(values: Any, name: str, **attrs: Any) -> xr.DataArray:
        return to_xarray(np.array(values), ("query",), name=name,
                         coords={"query": ("query", chosen)}, attrs={**meta, **attrs})  # fmt: skip

    return xr.Dataset({
        "verdict": label([j.verdict for j in found], "verdict", **FLAGS,
                         long_name="different queries always get different weights"),
        "margin": label([j.margin for j in found], "margin",
                        long_name="smallest singular value, columns scaled"),
        "reason": label([j.reason for j in found], "reason"),
    }, attrs=label([0] * len(found), "meta").attrs)  # fmt: skip


class Judgement(NamedTuple):
    """A verdict, its margin and reason, and whether the (affine) rank of the features is full."""

    verdict: int
    margin: float
    reason: str
    rank: int


def judge(f: WeightFunction, dtype: torch.dtype, unit_roundoff: float | None = None) -> Judgement:
    """The judgement over all keys of `f`, stored in `dtype`."""
    n, d = f.keys.shape
    features = f.features
    D = features.shape[1]
    divided = f.kind == "linear" and f.normalised
    needed = d + (f.kind != "linear" or f.normalised)
    rank, margin = _rank(features, f.kind, dtype, unit_roundoff)
    if n < needed:
        return Judgement(NO, 0.0, f"{n} keys, at least {needed} are necessary", rank)
    if divided and d >= D:
        reason = (f"{D} features are no more than the query's {d}: divided rows confuse two "
                  f"queries, whatever the continuous feature map")  # fmt: skip
        return Judgement(NO, 0.0, reason, rank)
    if f.kind != "softmax" and f.facts.injective is False:
        return Judgement(NO, 0.0, "the feature map is not injective", rank)
    what = f"rank of the {'keys' if f.kind == 'softmax' else 'features'} {RANK_WORDS[rank]}"
    what = what if f.kind == "linear" else f"affine {what}"
    if f.kind == "softmax":
        return Judgement(rank, margin, what, rank)
    if rank == YES:
        known = f.facts.injective and not (divided and f.facts.rays is not False)
        if not known:
            return Judgement(UNDECIDED, margin, f"{what}; the feature map decides", rank)
        return Judgement(YES, margin, what, rank)
    if rank == NO and features is f.keys and f.facts.injective:  # phi is the identity
        return Judgement(NO, margin, what, rank)
    # p and q collide only where phi(p) - a phi(q) meets the null space
    return Judgement(UNDECIDED, margin, f"{what}, which need not confuse two queries", rank)


def _rank(
    features: Tensor, kind: str, dtype: torch.dtype, unit_roundoff: float | None
) -> tuple[int, float]:
    """Whether the (affine) rank is full, and the margin; rounding is relative to the norms."""
    n, D = features.shape
    affine = kind != "linear"
    if n < D + affine:
        return NO, 0.0
    norms = torch.linalg.vector_norm(features, dim=0)
    centred = features - features.mean(0) if affine else features
    sigma = torch.linalg.svdvals(centred / norms.masked_fill(norms == 0, 1.0))
    margin = float(sigma[-1])
    return int(decide(torch.tensor(margin), *tolerances(dtype, D, unit_roundoff))), margin
