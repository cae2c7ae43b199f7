"""Feature maps phi of separable attention, phi(q).phi(k) = similarity, registered by name."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.memory import require_memory
from dsf.shapes import Float

FeatureMap = Callable[[Tensor], Tensor]
"""(..., width) -> (..., feature), any leading axes."""


def identity(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
    """x: generalised linear attention, signed weights. Source: Sieber et al. (2024), eq. 17."""
    return x


def elu_plus_one(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
    """elu(x) + 1 > 0, written as exp(x) below zero so that it does not round to 0 there.

    Source: Katharopoulos et al. (2020), eq. 7.
    """
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def relu(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
    """max(x, 0): weights can vanish exactly. A row without any is zero."""
    return torch.relu(x)


def exponential(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
    """exp(x), elementwise (not the softmax similarity; that is the limit of `Taylor`)."""
    return torch.exp(x)


@dataclasses.dataclass(frozen=True)
class Taylor:
    """Features of the truncated exponential, phi(q).phi(k) = sum_{p<=order} (q.k)^p / p!.

        phi(x) = [ x_1^n_1 ... x_m^n_m / sqrt(n_1! ... n_m!) ]   for all n_1 + ... + n_m <= order

    Every monomial once: C(m + order, order) features, against (m^(order+1) - 1)/(m - 1) of full
    tensor powers. Cost: one product a feature. An odd order can make the similarity negative.
    Raises DsfMemoryError before allocating what would not fit. Source: Sieber et al. (2024),
    Lemma 1 and appendix C.
    """

    order: int = 2

    def __post_init__(self) -> None:
        """Refuse a negative order."""
        if self.order < 0:
            raise DsfValueError(f"dsf.Taylor: order: expected at least 0, got {self.order}.")

    def __call__(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead feature"]:
        """The features, degree by degree, the constant first."""
        width = x.shape[-1]
        if not torch.compiler.is_compiling():
            axes = [f"axis_{i}" for i in range(x.ndim - 1)]
            require_memory(
                "dsf.Taylor", "features", [*axes, "feature"],
                [*x.shape[:-1], n_taylor_features(width, self.order)], x.dtype, device=x.device,
                advice="Lower the order or the width of a head.",
            )  # fmt: skip
        level = torch.ones_like(x[..., :1])
        levels = [level]
        for parent, variable, factor in _monomials(width, self.order):
            grown = level[..., parent.to(x.device)] * x[..., variable.to(x.device)]
            level = grown * factor.to(x)
            levels.append(level)
        return torch.cat(levels, dim=-1)


@functools.lru_cache(maxsize=32)
def _monomials(width: int, order: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """How each degree's monomials grow out of the last: parent, variable, 1/sqrt(multiplicity).

    A monomial is its sorted list of variables; it is grown by one that is not smaller than its
    last, so every monomial comes once.
    """
    tables = []
    level = [(0, 0)]  # (last variable, how often it stands at the end)
    for _ in range(order):
        grown = [(i, last, count, v) for i, (last, count) in enumerate(level)
                 for v in range(last, width)]  # fmt: skip
        level = [(v, count + 1 if v == last and count else 1) for _, last, count, v in grown]
        tables.append((
            torch.tensor([g[0] for g in grown], dtype=torch.long),
            torch.tensor([g[3] for g in grown], dtype=torch.long),
            torch.tensor([count for _, count in level], dtype=torch.float64).rsqrt(),
        ))  # fmt: skip
    return tuple(tables)


def n_taylor_features(width: int, order: int) -> int:
    """C(width + order, order): the number of states a truncated softmax takes."""
    return math.comb(width + order, order)


def taylor_error_bound(logit: Float[Tensor, "*any"], order: int) -> Float[Tensor, "*any"]:
    """exp(|x|) |x|^(order+1) / (order+1)!: what `Taylor` misses of exp(x) at most, x = q.k.

    Source: Sieber et al. (2024), appendix C (Lagrange's remainder).
    """
    size = logit.abs()
    return torch.exp(size + torch.log(size) * (order + 1) - math.lgamma(order + 2))


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": identity, "elu_plus_one": elu_plus_one, "relu": relu, "exp": exponential,
    "taylor": Taylor(2),
}  # fmt: skip
"""By name; add one here or pass a callable. `taylor_<order>` gives any order."""


def feature_map(which: str | FeatureMap) -> FeatureMap:
    """The map of that name (`"taylor_4"` for order 4), or the callable itself.

    Raises DsfValueError for an unknown name.
    """
    if not isinstance(which, str):
        return which
    if order := re.fullmatch(r"taylor_(\d+)", which):
        return Taylor(int(order[1]))
    if which not in FEATURE_MAPS:
        raise DsfValueError(
            f"dsf.feature_map: which: expected one of {[*FEATURE_MAPS, 'taylor_<order>']} or a "
            f"callable, got {which!r}."
        )
    return FEATURE_MAPS[which]
