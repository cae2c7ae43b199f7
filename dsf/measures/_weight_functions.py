"""The weights of one row as a function of its query, for fixed keys: softmax, linear, InLine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.feature_maps import FeatureMap, Taylor, feature_map

KINDS = ("softmax", "linear", "inline")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a feature map; None where nothing is.

    injective: phi(p) = phi(q) only for p = q. rays: some p != q have phi(p) = a phi(q), a != 0.
    """

    injective: bool | None = None
    rays: bool | None = None


@dataclasses.dataclass(frozen=True)
class WeightFunction:
    """query (..., feature) -> weights (..., key), in float64, with n keys k_j.

    softmax  w_j = exp(scale q.k_j) / sum_s exp(scale q.k_s)
    linear   w_j = phi(q).phi(k_j) / sum_s phi(q).phi(k_s), undivided if not `normalised`
    inline   w_j = scale (phi(q).phi(k_j) - mean_s phi(q).phi(k_s)) + 1/n
    """

    kind: str
    keys: Tensor
    phi: FeatureMap
    facts: Facts
    scale: float = 1.0
    normalised: bool = True

    @property
    def features(self) -> Tensor:
        """(key, state): the keys themselves for softmax."""
        return self.keys if self.kind == "softmax" else self.phi(self.keys)

    def prefix(self, count: int) -> WeightFunction:
        """The same over the first `count` keys."""
        return dataclasses.replace(self, keys=self.keys[:count])

    def __call__(self, queries: Tensor) -> Tensor:
        """The weights of any number of queries."""
        if self.kind == "softmax":
            return torch.softmax(self.scale * queries @ self.keys.mT, -1)
        scores = self.scale * self.phi(queries) @ self.features.mT
        if self.kind == "inline":
            return scores - scores.mean(-1, keepdim=True) + 1 / len(self.keys)
        return scores / scores.sum(-1, keepdim=True) if self.normalised else scores

    def jacobian(self, query: Tensor) -> Tensor:
        """d weights / d query (key, feature), from the closed forms; only phi is differentiated.

        softmax scale (diag(w) - w w^T) K,  linear (I - w 1^T) Phi Dphi / sum,
        inline scale P Phi Dphi with P = I - 1 1^T / n
        """
        if self.kind == "softmax":
            w = self(query)
            return self.scale * w[:, None] * (self.keys - w @ self.keys)
        moved = self.scale * self.features @ jacobian_of(self.phi, query)
        if self.kind == "inline":
            return moved - moved.mean(0)
        if not self.normalised:
            return moved
        scores = self.scale * self.features @ self.phi(query)
        return (moved - scores[:, None] / scores.sum() * moved.sum(0)) / scores.sum()


def weight_function(
    function: str, kind: str, keys: Tensor, which: str | FeatureMap, scale: float,
    normalised: bool, facts: Facts | None = None,
) -> WeightFunction:  # fmt: skip
    """Checked: raises DsfValueError on another kind, DsfShapeError on other axes or no key."""
    if kind not in KINDS:
        raise DsfValueError(f"{function}: kind: expected one of {KINDS}, got {kind!r}.")
    if keys.ndim != 2 or not keys.numel():
        raise DsfShapeError(
            f"{function}: keys: expected axes (key, feature), one key at least, got "
            f"{tuple(keys.shape)}."
        )
    if not scale > 0:
        raise DsfValueError(f"{function}: scale: expected a positive number, got {scale}.")
    given = facts or Facts()
    known = _known(which)
    facts = Facts(
        known.injective if given.injective is None else given.injective,
        known.rays if given.rays is None else given.rays,
    )
    return WeightFunction(
        kind, keys.detach().double(), feature_map(which), facts, float(scale), normalised
    )


def _known(which: str | FeatureMap) -> Facts:
    """Of the named maps: those with a constant among their features have no rays."""
    phi = feature_map(which)
    if isinstance(phi, Taylor):
        return Facts(injective=phi.order > 0, rays=phi.order == 0)
    names = ("identity", "elu_plus_one", "relu", "exp")
    for name in names:
        if phi is feature_map(name):
            return Facts(injective=name != "relu", rays=True)
    return Facts()


def check_queries(function: str, queries: Tensor, f: WeightFunction, ndim: int) -> Tensor:
    """`queries` in float64. Raises DsfShapeError unless they fit the keys."""
    width = f.keys.shape[1]
    if queries.ndim != ndim or queries.shape[-1] != width:
        axes = "(feature)" if ndim == 1 else "(query, feature)"
        raise DsfShapeError(
            f"{function}: query: expected axes {axes} with feature={width}, got "
            f"{tuple(queries.shape)}; feature is fixed by keys."
        )
    return queries.detach().double()


def jacobian_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d function / d x (output, input) at a vector x, by one backward pass an output."""
    with torch.enable_grad():  # torch.func would import a compiler on its first call
        J = torch.autograd.functional.jacobian(function, x)
    assert isinstance(J, Tensor)
    return J.detach()


def gauss_newton(
    residual: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], start: Tensor,
    steps: int = 60,
) -> Tensor:  # fmt: skip
    """A point where |residual| is (locally) least, by Gauss-Newton with step halving."""
    p = start.clone()
    left = residual(p)
    gap = torch.linalg.vector_norm(left)
    for _ in range(steps):
        if not bool(gap.isfinite()) or float(gap) == 0:
            return p
        J = jacobian(p)
        if not bool(J.isfinite().all()):
            return p
        move = torch.linalg.lstsq(J, -left[:, None], driver="gelsd").solution[:, 0]
        size = 1.0
        while size > 1e-4:
            trial = residual(p + size * move)
            new = torch.linalg.vector_norm(trial)
            if bool(new < gap):
                p, left, gap = p + size * move, trial, new
                break
            size /= 2
        else:
            return p
    return p


def on_ray(phi: FeatureMap, query: Tensor, factor: float) -> Tensor:
    """p with phi(p) = factor phi(query), where Gauss-Newton from the query finds one."""
    target = factor * phi(query)
    return gauss_newton(lambda p: phi(p) - target, lambda p: jacobian_of(phi, p), query)
