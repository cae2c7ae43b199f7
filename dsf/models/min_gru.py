"""minGRU: a GRU whose gate and candidate see the input alone, a linear recurrence."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._windowed import WindowedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Diagonal

SYSTEM = "min_gru"


def min_gru_recurrence(
    gate_logit: Float[Tensor, "batch time unit"],
    *,
    initial_state: Float[Tensor, "batch unit"] | None = None,
) -> Recurrence:
    """minGRU over its candidates (batch, time, unit, 1): every unit a head of one state.

        A_t = 1 - z_t,   B_t = z_t,   C = 1,   D = 0,   z_t = sigmoid(gate_logit)

    Row sums are 1 minus the decay of the start. Source: Feng et al. (2024), section 3.1.
    """
    start = None if initial_state is None else initial_state[..., None, None]
    return Recurrence(
        Diagonal(functional.logsigmoid(-gate_logit)[..., None]),
        torch.sigmoid(gate_logit)[..., None, None], gate_logit.new_ones(1, 1, 1, 1, 1),
        initial_state=start, system=SYSTEM,
    )  # fmt: skip


def positive(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """x + 1/2 for x >= 0, sigmoid(x) below: the candidate of the released log-space form."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGru(WindowedMixer):
    """The minGRU layer: h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t), y_t = W_o h_t.

    log_space makes the candidates positive (g = `positive`), else g is the identity; the output
    projection is there when n_hidden is not the width. Cost O(length x n_hidden), state n_hidden.
    Source: Feng et al. (2024), sections 3.1 and B.2.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag(1 − zₜ), zₜ = σ(xₜW_z)", "B": "zₜ", "C": "I", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Feng et al. (2024), arXiv 2410.01201, section 3.1"

    def __init__(
        self, width: int, *, n_hidden: int | None = None, log_space: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        hidden, self.log_space = n_hidden or width, log_space
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.candidate = nn.Linear(width, hidden, bias=bias)
        self.out = None if hidden == width else nn.Linear(hidden, width, bias=False)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The gate's system and the candidates, units as heads."""
        candidate = self.candidate(x)
        candidate = positive(candidate) if self.log_space else candidate
        return min_gru_recurrence(self.gate(x)), candidate[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Output projection, if there is one; y (batch, time, unit, 1)."""
        return y[..., 0] if self.out is None else self.out(y[..., 0])


LAYER = MinGru
