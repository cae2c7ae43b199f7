"""HGRN2: HGRN with a matrix state; the key is what the row forgets."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dsf.models._gated_linear import bounded_log_decay, gated_linear_recurrence
from dsf.models._projections import HeadedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "hgrn2"


def hgrn2_recurrence(
    query: Float[Tensor, "batch time head state"],
    log_decay: Float[Tensor, "batch time head state"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """HGRN2 over values (batch, time, head, channel).

        A_t = diag(alpha_t),   B_t = 1 - alpha_t,   C_t = scale q_t^T,   D = 0

    log_decay = log alpha_t <= 0 (-inf overwrites); scale is state^(-1/2) unless given, as
    released; the paper has none. State: state x channel a head. Source: Qin et al. (2024), eq. 6.
    """
    key = -torch.expm1(log_decay)
    return gated_linear_recurrence(SYSTEM, query, key, log_decay, scale, initial_state)


class Hgrn2(HeadedMixer):
    """The HGRN2 layer: SiLU queries, forget gates in place of keys, RMS norm over all heads.

        alpha_t = b + (1 - b) sigmoid(W_f x_t),   y_t = W_o RMSNorm(o_t)

    lower_bound b grows with the layer in a model (0 in its first). The projection called `key` is
    W_f. Cost O(length x width^2 / n_head), state width^2 / n_head. Source: Qin et al. (2024).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag αₜ, αₜ = b + (1 − b)σ(xₜW_f)", "B": "1 − αₜ", "C": "SiLU(xₜW_q)ᵀ/√N",
        "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Qin et al. (2024), arXiv 2404.07904, eq. 6"

    def __init__(
        self, width: int, n_head: int = 4, *, lower_bound: float = 0.0, conv_size: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, conv_size=conv_size, norm="all", norm_eps=norm_eps)
        self.lower_bound = lower_bound

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The gated system and the values."""
        q, forget, v = self.project(x)
        log_decay = bounded_log_decay(forget, self.lower_bound)
        return hgrn2_recurrence(functional.silu(q), log_decay), v


LAYER = Hgrn2
