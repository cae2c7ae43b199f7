"""Linear attention: softmax's similarity replaced by a dot product of features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dsf.feature_maps import FeatureMap, feature_map
from dsf.models._feature_attention import FeatureAttention
from dsf.models._heads import check_query_key, share_groups
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


class LinearAttention(FeatureAttention):
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
        super().__init__(width, n_head, n_group=n_group, causal=causal, gauge=gauge, bias=bias)
        self.feature_map = _feature_map(feature_map)
        self.normalise, self.scale, self.eps = normalise, scale, eps

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """phi(scale q) and phi(k)."""
        return self.feature_map(query * self.scale), self.feature_map(key)

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = linear_attention_recurrence(
            q, k, feature_map=self.feature_map, normalise=self.normalise, gauge=self.gauge,
            causal=self.is_causal, scale=self.scale, eps=self.eps,
        )  # fmt: skip
        return system, v


LAYER = LinearAttention
