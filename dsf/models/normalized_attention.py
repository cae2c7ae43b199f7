"""Normalised attention: linear attention whose divisor is a free function of the token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.feature_maps import FeatureMap, feature_map
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.normalisers import log_normaliser, separable_system
from dsf.shapes import Float
from dsf.wrappers import System

SYSTEM = "normalized_attention"


def normalized_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    normaliser_logit: Float[Tensor, "batch time #head"],
    *,
    normaliser: str = "exp",
    feature_map: str | FeatureMap = "identity",
    gauge: str = "identity",
    causal: bool = True,
    scale: float = 1.0,
    initial_state: Float[Tensor, "#batch #head feature channel"] | None = None,
) -> System:
    """Normalised attention over values (batch, time, head, channel); signed weights.

        M_tj = phi(scale q_t).phi(k_j) / eta_t,   eta_t = exp(z_t), softplus(z_t) or sigmoid(z_t)

    z = normaliser_logit = W_eta u. identity gauge: A = I, B_t = phi(k_t), C_t = phi(q_t)^T/eta_t;
    dsf gauge: A_t = eta_(t-1)/eta_t (exp(z_(t-1) - z_t) for exp), B_t = phi(k_t)/eta_t,
    C_t = phi(q_t)^T. All in log eta, so |z| in the hundreds is safe in the dsf gauge's A. State:
    feature x channel a head. Raises DsfShapeError, DsfValueError (unknown names). Source: Sieber
    et al. (2024), eqs. 22, 29, 30.
    """
    check_query_key("dsf.normalized_attention_recurrence", query, key)
    phi = _feature_map(feature_map)
    log_eta = log_normaliser(normaliser, normaliser_logit)
    return separable_system(
        phi(query * scale), share_groups(phi(key), query.shape[2]), log_eta, gauge=gauge,
        causal=causal, system=SYSTEM, initial_state=initial_state,
    )  # fmt: skip


_feature_map = feature_map  # the keyword argument of the same name hides it


class NormalizedAttention(SequenceMixer):
    """Multi-head normalised attention: one normaliser row a head, with a bias.

    Cost O(length x feature x channel), state feature x channel a head. scale multiplies the query
    before the feature map; the published layer has none. normaliser_offset fills the bias of
    W_eta at the start (the later variant spreads it over the heads).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I   (or ηₜ₋₁/ηₜ · I)", "B": "kₜ   (or kₜ/ηₜ)",
        "C": "qₜᵀ/ηₜ   (or qₜᵀ), ηₜ = exp(W_η uₜ)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "exp(W_η x)"
    source: ClassVar[str] = "Sieber et al. (2024), eqs. 22, 29, 30"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        normaliser: str = "exp",
        feature_map: str | FeatureMap = "identity",
        causal: bool = True,
        gauge: str = "identity",
        scale: float = 1.0,
        normaliser_offset: float | Tensor | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("NormalizedAttention", "n_head", n_head, "width", width)
        self.n_head, self.normaliser = n_head, normaliser
        self.feature_map = _feature_map(feature_map)
        self.is_causal, self.gauge, self.scale = causal, gauge, scale
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.eta = nn.Linear(width, n_head)
        self.out = nn.Linear(width, width, bias=bias)
        if normaliser_offset is not None:
            with torch.no_grad():
                self.eta.bias.copy_(torch.as_tensor(normaliser_offset).expand(n_head))

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        q, k, v = (split_heads(part(x), self.n_head)
                   for part in (self.query, self.key, self.value))  # fmt: skip
        system = normalized_attention_recurrence(
            q, k, self.eta(x), normaliser=self.normaliser, feature_map=self.feature_map,
            gauge=self.gauge, causal=self.is_causal, scale=self.scale,
        )  # fmt: skip
        return system, v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        """One token; the state is sum_j phi(k_j) v_j^T, (batch, head, feature, channel)."""
        x = x_t[:, None]
        q, k, v = (split_heads(part(x_t), self.n_head)
                   for part in (self.query, self.key, self.value))  # fmt: skip
        memory = self.feature_map(k)[..., None] * v[..., None, :]
        memory = memory if state is None else state + memory
        inverse = torch.exp(-log_normaliser(self.normaliser, self.eta(x_t)))
        y = (self.feature_map(q * self.scale)[..., None, :] @ memory).squeeze(-2)
        return self.readout((y * inverse[..., None])[:, None], x)[:, 0], memory


LAYER = NormalizedAttention
