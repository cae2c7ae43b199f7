"""HGRN: an elementwise gated recurrence that writes what it forgets."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dsf.models._gated_linear import bounded_log_decay
from dsf.models._projections import ConvolvedLinear, GatedOutput
from dsf.models._windowed import WindowedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Diagonal

SYSTEM = "hgrn"


def hgrn_recurrence(
    log_decay: Float[Tensor, "batch time channel"],
    *,
    write: Float[Tensor, "#batch #time channel"] | None = None,
    initial_state: Float[Tensor, "batch channel"] | None = None,
) -> Recurrence:
    """HGRN over values (batch, time, channel, 1): every channel a head of one state.

        A_t = alpha_t,   B_t = 1 - alpha_t (or `write`),   C = 1,   D = 0

    log_decay = log alpha_t; 1 - alpha is -expm1(log alpha). The bare scan of the released code,
    whose input is written already, is write = 1. Source: Qin et al. (2023), eqs. 4-7.
    """
    write = -torch.expm1(log_decay) if write is None else write
    return Recurrence(
        Diagonal(log_decay[..., None]), write[..., None, None],
        log_decay.new_ones(1, 1, 1, 1, 1),
        initial_state=None if initial_state is None else initial_state[..., None, None],
        system=SYSTEM,
    )  # fmt: skip


class Hgrn(WindowedMixer):
    """The HGRN layer of real states.

        log alpha_t = log(b + (1 - b) sigmoid(W_f x_t)),   u_t = SiLU(W_i x_t)
        y_t = W_o (RMSNorm(h_t) * SiLU(W_g x_t))

    lower_bound b grows with the layer in a model (0 in its first). Cost O(length x width), state
    width. Source: Qin et al. (2023), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag αₜ, αₜ = b + (1 − b)σ(xₜW_f)", "B": "1 − αₜ", "C": "I", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Qin et al. (2023), arXiv 2311.04823, eqs. 4-7"

    def __init__(
        self, width: int, *, expand: int = 1, lower_bound: float = 0.0, conv_size: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = expand * width
        self.lower_bound, self.n_past = lower_bound, max(conv_size - 1, 0)
        self.input = ConvolvedLinear(width, inner, conv_size, "silu")
        self.forget = ConvolvedLinear(width, inner, conv_size)
        self.output = GatedOutput(width, inner, inner, norm="all", eps=norm_eps)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The gates' system and the values, channels as heads."""
        log_decay = bounded_log_decay(self.forget(x), self.lower_bound)
        return hgrn_recurrence(log_decay), self.input(x)[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Norm, gate, output projection; y (batch, time, channel, 1)."""
        return self.output(y, x)


LAYER = Hgrn
