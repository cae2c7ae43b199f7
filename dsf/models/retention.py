"""Retention: linear attention with one constant decay per head and rotary positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models._projections import HeadedMixer
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate
from dsf.shapes import Float

SYSTEM = "retention"


def retention_log_decays(n_head: int) -> Float[Tensor, " head"]:
    """log(1 - 2^(-5-h)), h = 0..n_head-1, in float64. Source: Sun et al. (2023), eq. 8."""
    return torch.log1p(-(2.0 ** -(5 + torch.arange(n_head, dtype=torch.float64))))


def retention_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    log_decay: Float[Tensor, " head"] | None = None,
    *,
    scale: float | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Retention over values (batch, time, head, channel).

        A = gamma_h I,   B_t = R_t k_t,   C_t = scale (R_t q_t)^T,   D = 0

    log_decay = log gamma_h, that of `retention_log_decays` unless given; rotation R is (cos, sin)
    of `dsf.rotary.rotary_tables` or None; scale is state^(-1/2) unless given. The map is scale
    gamma^(t-j) q_t.R_(j-t) k_j. State: state x channel a head. Raises DsfShapeError. Source: Sun
    et al. (2023), eqs. 5-6.
    """
    if log_decay is None:
        log_decay = retention_log_decays(query.shape[2]).to(query)
    if rotation is not None:
        query, key = rotate(query, *rotation), rotate(key, *rotation)
    return gated_linear_recurrence(SYSTEM, query, key, log_decay[None, None], scale, initial_state)


class Retention(HeadedMixer):
    """The multi-scale retention layer: RMS norm a head, SiLU gate, values twice as wide.

    rope_base None leaves positions out. Cost O(length x width x value_width / n_head), state
    width x value_width / n_head. Source: Sun et al. (2023), section 2.2.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "γₕ I, γₕ = 1 − 2^(−5−h)", "B": "Rₜkₜ", "C": "(Rₜqₜ)ᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Sun et al. (2023), arXiv 2307.08621, eqs. 5-8"
    log_decay: Tensor

    def __init__(
        self, width: int, n_head: int = 4, *, key_width: int | None = None,
        value_width: int | None = None, rope_base: float | None = 10000.0, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, key_width=key_width,
            value_width=2 * width if value_width is None else value_width, gate="silu",
            norm_eps=norm_eps,
        )  # fmt: skip
        self.rope_base = rope_base
        decays = retention_log_decays(n_head).to(torch.get_default_dtype())
        self.register_buffer("log_decay", decays)

    @classmethod
    def small(cls, width: int) -> Retention:
        """Four heads, rotary positions where the width of a head is even."""
        return cls(width, 4, rope_base=10000.0 if width // 4 % 2 == 0 else None)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The system of tokens at positions start, start + 1, ... and the values."""
        q, k, v = self.project(x)
        rotation = None
        if self.rope_base is not None:
            rotation = rotary_tables(
                x.shape[1], q.shape[-1], base=self.rope_base, start=start, dtype=x.dtype,
                device=x.device,
            )  # fmt: skip
        return retention_recurrence(q, k, self.log_decay, rotation=rotation), v


LAYER = Retention
