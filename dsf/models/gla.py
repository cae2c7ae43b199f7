"""Gated linear attention: one learned decay per key channel."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models._heads import split_heads
from dsf.models._projections import HeadedMixer, LowRank
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "gla"


def gla_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    log_decay: Float[Tensor, "#batch #time #head state"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Gated linear attention over values (batch, time, head, channel).

        A_t = diag(exp(log_decay_t)),   B_t = k_t,   C_t = scale q_t^T,   D = 0

    scale is state^(-1/2) unless given; log_decay = -inf forgets a channel. State: state x channel
    a head. Raises DsfShapeError unless groups divide heads. Source: Yang et al. (2023), eq. 3.
    """
    return gated_linear_recurrence(SYSTEM, query, key, log_decay, scale, initial_state)


class Gla(HeadedMixer):
    """The GLA layer: q, k of half the width, low-rank decay gate, RMS norm a head, SiLU gate.

        log alpha_t = logsigmoid(W_2 W_1 x_t + b) / temperature
        y_t = W_o (RMSNorm(o_t) * SiLU(W_g x_t))

    Cost O(length x key_width x value_width / n_head), state key_width x value_width / n_head.
    Source: Yang et al. (2023), section 4.4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag αₜ, αₜ = σ(xₜW₁W₂ + b)^(1/16)", "B": "kₜ", "C": "qₜᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Yang et al. (2023), arXiv 2312.06635, eq. 3"

    def __init__(
        self, width: int, n_head: int = 4, *, key_width: int | None = None,
        value_width: int | None = None, decay_rank: int = 16, temperature: float = 16.0,
        conv_size: int = 0, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, key_width=width // 2 if key_width is None else key_width,
            value_width=value_width, conv_size=conv_size,
            activation="silu" if conv_size else None, gate="silu", norm_eps=norm_eps,
        )  # fmt: skip
        self.temperature = temperature
        self.decay = LowRank(width, self.key_width, decay_rank)

    @classmethod
    def small(cls, width: int) -> Gla:
        """Four heads, keys as wide as the values, a decay gate of rank 4."""
        return cls(width, 4, key_width=width, decay_rank=4)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The gated system and the values."""
        q, k, v = self.project(x)
        log_decay = functional.logsigmoid(split_heads(self.decay(x), self.n_head))
        return gla_recurrence(q, k, log_decay / self.temperature), v


LAYER = Gla
