"""Comba: a gated delta rule that erases along a weaker key and corrects its query."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dsf.models._delta_rule import DeltaMixer, SoftplusDecay, delta_rule_recurrence
from dsf.models._projections import unit
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "comba"


def comba_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    erase: Float[Tensor, "batch time head state"],
    log_decay: Float[Tensor, "batch time head"],
    write_strength: Float[Tensor, "batch time head"],
    *,
    decay_first: bool = True,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Comba over values (batch, time, head, channel), keys of length one beforehand.

        A_t = exp(g_t) (I - beta_t k_t p_t^T),   or   exp(g_t) I - beta_t k_t p_t^T
        B_t = beta_t k_t,   C_t = scale q_t^T,   D = 0

    erase p is a scaled copy of the key. decay_first (the released recurrent reference) reads with
    p after the decay; False (the paper, the released kernels and chunked reference) before it:
    two different functions. scale is state^(-1/2) unless given. State: state x channel a head.
    Source: Hu et al. (2025), eq. 8.
    """
    return delta_rule_recurrence(
        SYSTEM, query, key, write_strength, erase=erase, log_decay=log_decay,
        decay_first=decay_first, scale=scale, initial_state=initial_state,
    )  # fmt: skip


class Comba(DeltaMixer):
    """The Comba layer: p_t = sigmoid(b) k_t, query q_t - d p_t, sigmoid gate after the norm.

        g_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t)

    b and d are numbers a head; d starts at `correction`. The unit query is corrected and gets
    length one again; p keeps its length sigmoid(b), as in the paper (the released kernels give
    it length one). Cost O(length x width^2 / n_head), state width^2 / n_head. Source: Hu et
    al. (2025), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "e^gₜ I − βₜkₜpₜᵀ, pₜ = σ(b)kₜ", "B": "βₜkₜ", "C": "(qₜ − d pₜ)ᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Hu et al. (2025), arXiv 2506.02475, eq. 8"

    def __init__(
        self, width: int, n_head: int = 4, *, correction: float = 1.0, decay_first: bool = False,
        conv_size: int = 4, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, conv_size=conv_size, gate="sigmoid", norm_eps=norm_eps)
        self.decay_first = decay_first
        self.step_size = nn.Linear(width, n_head, bias=False)
        self.decay = SoftplusDecay(n_head)
        self.erase = nn.Parameter(torch.ones(n_head))
        self.correction = nn.Parameter(torch.full((n_head,), correction))

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The delta rule of this input and its values."""
        q, k, v = self.project(x)
        p = torch.sigmoid(self.erase)[:, None] * k
        system = comba_recurrence(
            unit(q - self.correction[:, None] * p), k, p, self.decay(self.step_size(x)),
            self.write_strength(x), decay_first=self.decay_first,
        )  # fmt: skip
        return system, v


LAYER = Comba
