"""Linear attention: softmax's similarity replaced by a dot product of features."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

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
from dsf.normalisers import kernel_sum, log_and_sign, separable_system
from dsf.shapes import Float
from dsf.wrappers import System

SYSTEM = "linear_attention"


def linear_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    feature_map: str | FeatureMap = "elu_plus_one",
    normalise: bool = True,
    gauge: str = "identity",
    causal: bool = True,
    scale: float = 1.0,
    eps: float = 0.0,
    initial_state: Float[Tensor, "#batch #head feature channel"] | None = None,
    initial_key_sum: Float[Tensor, "#batch #head feature"] | None = None,
) -> System:
    """Linear attention over values (batch, time, head, channel) from projected queries and keys.

        M_tj = phi(scale q_t).phi(k_j) / eta_t
        eta_t = phi(scale q_t).(z_0 + sum_{j<=t} phi(k_j)) + eps

    identity gauge: A = I, B_t = phi(k_t), C_t = phi(q_t)^T / eta_t. dsf gauge: A_t =
    eta_(t-1)/eta_t, B_t = phi(k_t)/eta_t, C_t = phi(q_t)^T; see `separable_system`.
    normalise=False sets eta = 1. feature_map is a name of `dsf.feature_maps` or a callable;
    scale multiplies the query before it. eps keeps the released codes' guard (Based 1e-6, fla
    1e-10); with eps = 0 an eta of exactly zero leaves its row undivided, which for features >= 0
    is a zero row. Causal: sums over j <= t, the token itself included; else over all j. State:
    feature x channel a head. Raises DsfShapeError when groups do not divide heads,
    DsfValueError on unknown names. Source: Katharopoulos et al. (2020), eqs. 9-10; Sieber et al.
    (2024), eqs. 15-17.
    """
    check_query_key("dsf.linear_attention_recurrence", query, key)
    phi = _feature_map(feature_map)
    q = phi(query * scale)
    k = share_groups(phi(key), query.shape[2])
    log_eta = sign = None
    if normalise:
        eta = kernel_sum(q, k, causal=causal, initial_key_sum=initial_key_sum) + eps
        log_eta, sign = log_and_sign(eta)
    return separable_system(
        q, k, log_eta, sign, gauge=gauge, causal=causal, system=SYSTEM,
        initial_state=initial_state,
    )  # fmt: skip


_feature_map = feature_map  # the keyword argument of the same name hides it


class KernelState(NamedTuple):
    """What `step` keeps: sum of phi(k) v^T (batch, head, feature, channel) and of phi(k)."""

    memory: Tensor
    key_sum: Tensor


class LinearAttention(SequenceMixer):
    """Multi-head linear attention, normalised by its own kernel sum or not.

    Cost O(length x feature x channel), state feature x (channel + 1) a head. scale multiplies
    the query before the feature map (width^(-1/2) for Based); eps as in the recurrence.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I   (or ηₜ₋₁/ηₜ · I)", "B": "φ(kₜ)   (or φ(kₜ)/ηₜ)",
        "C": "φ(qₜ)ᵀ/ηₜ   (or φ(qₜ)ᵀ), ηₜ = φ(qₜ)ᵀ Σⱼ≤ₜ φ(kⱼ)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ φ(q)·φ(k)"
    source: ClassVar[str] = "Katharopoulos et al. (2020), eq. 9; Sieber et al. (2024), eq. 16"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        n_group: int | None = None,
        feature_map: str | FeatureMap = "elu_plus_one",
        normalise: bool = True,
        causal: bool = True,
        gauge: str = "identity",
        scale: float = 1.0,
        eps: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("LinearAttention", "n_head", n_head, "width", width)
        n_group = n_head if n_group is None else n_group
        check_divides("LinearAttention", "n_group", n_group, "n_head", n_head)
        self.n_head, self.n_group = n_head, n_group
        self.feature_map = _feature_map(feature_map)
        self.normalise, self.is_causal, self.gauge = normalise, causal, gauge
        self.scale, self.eps = scale, eps
        shared = width // n_head * n_group
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, shared, bias=bias)
        self.value = nn.Linear(width, shared, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query by head, key by group, value by head: (batch, time, head or group, width)."""
        q = split_heads(self.query(x), self.n_head)
        k = split_heads(self.key(x), self.n_group)
        v = split_heads(self.value(x), self.n_group)
        return q, k, share_groups(v, self.n_head)

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = linear_attention_recurrence(
            q, k, feature_map=self.feature_map, normalise=self.normalise, gauge=self.gauge,
            causal=self.is_causal, scale=self.scale, eps=self.eps,
        )  # fmt: skip
        return system, v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, KernelState]:
        """One token: memory and key sum grow by its own, then its query reads them."""
        x = x_t[:, None]
        q, k, v = (part[:, 0] for part in self.project(x))
        q = self.feature_map(q * self.scale)
        k = share_groups(self.feature_map(k)[:, None], self.n_head)[:, 0]
        memory, key_sum = k[..., None] * v[..., None, :], k
        if state is not None:
            memory, key_sum = memory + state.memory, key_sum + state.key_sum
        y = (q[..., None, :] @ memory).squeeze(-2)
        if self.normalise:
            eta = (q * key_sum).sum(-1, keepdim=True) + self.eps
            y = y / torch.where(eta == 0, 1.0, eta)
        return self.readout(y[:, None], x)[:, 0], KernelState(memory, key_sum)


LAYER = LinearAttention
