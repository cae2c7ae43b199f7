"""Taylor attention: softmax's exponential cut after an even order, a finite exact state."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.feature_maps import Taylor, n_taylor_features
from dsf.models._feature_attention import FeatureAttention
from dsf.models._heads import check_query_key, share_groups
from dsf.normalisers import kernel_sum, log_and_sign, separable_system
from dsf.shapes import Float
from dsf.wrappers import System

SYSTEM = "taylor_attention"


def taylor_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    order: int = 2,
    scale: float | None = None,
    causal: bool = True,
    gauge: str = "identity",
) -> System:
    """Normalised Taylor attention over values (batch, time, head, channel).

        M_tj = T_p(s_tj) / sum_{i<=t} T_p(s_ti),   T_p(s) = sum_{i<=p} s^i / i!,   s = scale q.k

    p = `order`, even: T_p is then positive, so rows are weights. A = I, B_t = phi(k_t), C_t =
    phi(q_t)^T/eta_t with C(width + p, p) features, each monomial once; gauge "dsf" as in
    `separable_system`; over all tokens if not causal. scale is width^(-1/2) by default. Cost and
    state: features x channel. `taylor_row_bound` says how far a row is from softmax. Raises
    DsfValueError on an odd order, DsfShapeError, DsfMemoryError. Source: Sieber et al. (2024),
    Lemma 1; order 2: Arora et al. (2024), Based.
    """
    check_query_key("dsf.taylor_attention_recurrence", query, key)
    phi = even_taylor(order)
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    q = phi(query * root)
    k = share_groups(phi(key * root), query.shape[2])
    log_eta, sign = log_and_sign(kernel_sum(q, k, causal=causal))
    return separable_system(q, k, log_eta, sign, gauge=gauge, causal=causal, system=SYSTEM)


def even_taylor(order: int) -> Taylor:
    """The feature map of an even order; DsfValueError for an odd one, which can be negative."""
    if order < 0 or order % 2:
        raise DsfValueError(
            f"dsf.taylor_attention_recurrence: order: expected an even number, got {order}. Odd "
            f"orders have negative weights: see linear_attention with feature_map='taylor_3'."
        )
    return Taylor(order)


def taylor_polynomial(s: Float[Tensor, "*any"], order: int) -> Float[Tensor, "*any"]:
    """T_p(s) = sum_{i<=p} s^i / i!, by Horner's rule."""
    total = torch.ones_like(s)
    for i in range(order, 0, -1):
        total = 1 + total * s / i
    return total


def taylor_remainder_bound(s: Float[Tensor, "*any"], order: int) -> Float[Tensor, "*any"]:
    """|e^s - T_p(s)| <= |s|^(p+1) e^max(s,0) / (p+1)!, for any order (Lagrange's remainder)."""
    return torch.exp(_log_remainder(s, order) + s.clamp(min=0))


def taylor_row_bound(logits: Float[Tensor, "*lead key"], order: int) -> Float[Tensor, "*lead"]:
    """How far in sum |difference| a row of Taylor attention can be from the softmax of `logits`.

    With |T_p - e^s| <= eps e^s for all keys of a row, |row - softmax|_1 <= 2 eps / (1 - eps), and
    never more than 2. Logits of keys that the row does not see: -inf. Source: derived.
    """
    seen = logits > -torch.inf
    s = logits.masked_fill(~seen, 0.0)
    eps = torch.exp(_log_remainder(s, order) + (-s).clamp(min=0))
    worst = eps.masked_fill(~seen, 0.0).amax(-1)
    bound = 2 * worst / (1 - worst).clamp(min=torch.finfo(worst.dtype).tiny)
    return bound.clamp(max=2.0)


def _log_remainder(s: Tensor, order: int) -> Tensor:
    return (order + 1) * torch.log(s.abs()) - math.lgamma(order + 2)


def full_taylor_features(
    x: Float[Tensor, "*lead width"], order: int
) -> Float[Tensor, "*lead feature"]:
    """(1, x, x^(2)/sqrt(2!), ..., x^(p)/sqrt(p!)) with full tensor powers: sum_i width^i features.

    The same inner products as the monomials of `Taylor`, which are fewer; what released code uses.
    """
    level = torch.ones_like(x[..., :1])
    levels = [level]
    for i in range(1, order + 1):
        level = (level[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(i)
        levels.append(level)
    return torch.cat(levels, -1)


class TaylorAttention(FeatureAttention):
    """Multi-head Taylor attention of an even order.

    Cost O(length x C(width/n_head + order, order) x width). Source: Sieber et al. (2024), Lemma 1.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I   (or ηₜ₋₁/ηₜ · I)", "B": "φₚ(kₜ), all monomials up to order p",
        "C": "φₚ(qₜ)ᵀ/ηₜ, ηₜ = φₚ(qₜ)ᵀ Σⱼ≤ₜ φₚ(kⱼ)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ φ(q)·φ(k)"
    source: ClassVar[str] = "Sieber et al. (2024), Lemma 1; Arora et al. (2024), arXiv 2402.18668"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        order: int = 2,
        n_group: int | None = None,
        scale: float | None = None,
        causal: bool = True,
        gauge: str = "identity",
        bias: bool = True,
    ) -> None:
        super().__init__(width, n_head, n_group=n_group, causal=causal, gauge=gauge, bias=bias)
        self.order, self.feature_map = order, even_taylor(order)
        self.scale = (width // n_head) ** -0.5 if scale is None else scale

    @property
    def n_state(self) -> int:
        """Number of features of one head."""
        return n_taylor_features(self.query.out_features // self.n_head, self.order)

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """phi of both times the root of the scale."""
        root = math.sqrt(self.scale)
        return self.feature_map(query * root), self.feature_map(key * root)

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = taylor_attention_recurrence(
            q, k, order=self.order, scale=self.scale, causal=self.is_causal, gauge=self.gauge
        )
        return system, v


LAYER = TaylorAttention
