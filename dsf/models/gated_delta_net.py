"""Gated DeltaNet: the delta rule on a state that decays, one decay per head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dsf.models._delta_rule import DeltaMixer, SoftplusDecay, delta_rule_recurrence
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "gated_delta_net"


def gated_delta_net_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    log_decay: Float[Tensor, "batch time head"],
    write_strength: Float[Tensor, "batch time head"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Gated DeltaNet over values (batch, time, head, channel), keys of length one beforehand.

        A_t = exp(g_t) (I - beta_t k_t k_t^T),   B_t = beta_t k_t,   C_t = scale q_t^T,   D = 0

    log_decay g <= 0 (-inf is an exact reset), write_strength beta in (0, 2); scale is
    state^(-1/2) unless given. State: state x channel a head. Raises DsfShapeError when groups do
    not divide heads. Source: Yang et al. (2025), eq. 10.
    """
    return delta_rule_recurrence(
        SYSTEM, query, key, write_strength, log_decay=log_decay, scale=scale,
        initial_state=initial_state,
    )  # fmt: skip


class GatedDeltaNet(DeltaMixer):
    """The Gated DeltaNet layer (also that of Qwen3-Next): RMS norm a head, then a SiLU gate.

        g_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)

    n_group key heads serve n_head value heads. Cost O(length x key_width x value_width / n_head),
    state as much without the length. Source: Yang et al. (2025), section 3.4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "e^gₜ (I − βₜkₜkₜᵀ)", "B": "βₜkₜ", "C": "qₜᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Yang et al. (2025), arXiv 2412.06464, eq. 10"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None,
        key_width: int | None = None, value_width: int | None = None, conv_size: int = 4,
        negative_eigenvalues: bool = False, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, n_group=n_group, key_width=key_width, value_width=value_width,
            conv_size=conv_size, gate="silu", norm_eps=norm_eps,
            negative_eigenvalues=negative_eigenvalues,
        )  # fmt: skip
        self.step_size = nn.Linear(width, n_head, bias=False)
        self.decay = SoftplusDecay(n_head)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The gated delta rule of this input and its values."""
        q, k, v = self.project(x)
        log_decay = self.decay(self.step_size(x))
        return gated_delta_net_recurrence(q, k, log_decay, self.write_strength(x)), v


LAYER = GatedDeltaNet
