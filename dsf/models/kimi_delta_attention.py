"""Kimi delta attention (KDA): the delta rule on a state with one decay per key channel."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dsf.models._delta_rule import DeltaMixer, SoftplusDecay, delta_rule_recurrence
from dsf.models._heads import split_heads
from dsf.models._projections import LowRank
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "kimi_delta_attention"


def kimi_delta_attention_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    log_decay: Float[Tensor, "batch time head state"],
    write_strength: Float[Tensor, "batch time head"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """KDA over values (batch, time, head, channel), keys of length one beforehand.

        A_t = (I - beta_t k_t k_t^T) diag(exp(g_t)),   B_t = beta_t k_t,   C_t = scale q_t^T

    log_decay g <= 0 (-inf forgets a channel), write_strength beta in (0, 2); scale is
    state^(-1/2) unless given. State: state x channel a head. Raises DsfShapeError when groups do
    not divide heads. Source: Kimi Team (2025), eq. 1.
    """
    return delta_rule_recurrence(
        SYSTEM, query, key, write_strength, log_decay=log_decay, scale=scale,
        initial_state=initial_state,
    )  # fmt: skip


class KimiDeltaAttention(DeltaMixer):
    """The KDA layer: low-rank decays and a low-rank sigmoid gate after an RMS norm a head.

        g_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias),   beta_t = sigmoid(W_b x_t)

    rank is that of both, the width of a value head unless given. Cost O(length x width^2 /
    n_head), state width^2 / n_head. Source: Kimi Team (2025), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "(I − βₜkₜkₜᵀ) diag(e^gₜ)", "B": "βₜkₜ", "C": "qₜᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Kimi Team (2025), arXiv 2510.26692, eq. 1"

    def __init__(
        self, width: int, n_head: int = 4, *, rank: int | None = None, conv_size: int = 4,
        negative_eigenvalues: bool = False, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        rank = width // n_head if rank is None else rank
        super().__init__(
            width, n_head, conv_size=conv_size, gate="sigmoid", gate_rank=rank, norm_eps=norm_eps,
            negative_eigenvalues=negative_eigenvalues,
        )  # fmt: skip
        self.step_size = LowRank(width, self.key_width, rank, bias=False)
        self.decay = SoftplusDecay(n_head, self.key_width // n_head)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The delta rule with decaying channels of this input and its values."""
        q, k, v = self.project(x)
        log_decay = self.decay(split_heads(self.step_size(x), self.n_head))
        return kimi_delta_attention_recurrence(q, k, log_decay, self.write_strength(x)), v


LAYER = KimiDeltaAttention
