"""qLSTM: the LSTM without recurrent weights in its gates and without tanh, a linear recurrence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float
from dsf.short_convolution import short_convolution, short_convolution_step
from dsf.transitions import Diagonal


def qlstm_recurrence(
    forget_logit: Float[Tensor, "batch time unit"],
    input_logit: Float[Tensor, "batch time unit"],
    output_logit: Float[Tensor, "batch time unit"],
    *,
    reversed_sigmoid: bool = False,
    exponent: Float[Tensor, "#unit"] | Float[Tensor, ""] | float = 1.0,
    initial_state: Float[Tensor, "batch unit"] | None = None,
) -> Recurrence:
    """The qLSTM as a system: every unit a head of one state.

        A_t = sigmoid(f_t), or sigmoid(-f_t)^a = exp(-a softplus(f_t)) with `reversed_sigmoid`
        B_t = sigmoid(i_t),   C_t = sigmoid(o_t)

    f, i, o are the logits W_f u_t, W_i u_t, W_o u_t; the values are W_u u_t, (batch, time, unit,
    1). `exponent` a >= 0 acts in either form. Source: Sieber et al. (2024), equations 8, 20 and 23
    (20b read as a matrix product).
    """
    toward = -forget_logit if reversed_sigmoid else forget_logit
    return Recurrence(
        Diagonal((exponent * functional.logsigmoid(toward))[..., None]),
        torch.sigmoid(input_logit)[..., None, None],
        torch.sigmoid(output_logit)[..., None, None],
        initial_state=None if initial_state is None else initial_state[..., None, None],
        system="qlstm",
    )  # fmt: skip


class Qlstm(SequenceMixer):
    """The qLSTM layer, bare as in the paper or inside the block its experiments ran.

        bare:   values W_u x and gates W x;   output C_t h_t
        block:  k = short convolution of W_u x, without activation; values k and gates W k + b;
                output W_y (GELU(W_z x) * C_t h_t)

    `gates` holds W_f, W_i, W_o, one after the other, drawn from N(0, 1/width of their input), and
    `alpha` the exponent of the reversed sigmoid, 1 at first, used as relu(alpha). Names and
    initialisation of the block are those of the released experiments. n_hidden is the width in the
    bare form (as x) and 2 width in the block unless given. Source: Sieber et al. (2024), eq. 20.
    """

    system: ClassVar[str] = "qlstm"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag σ(−W_f xₜ)^a, or diag σ(W_f xₜ)", "B": "diag σ(W_i xₜ) W_u",
        "C": "diag σ(W_o xₜ)", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Sieber et al. (2024), arXiv 2405.15731, eqs 8, 20, 23"

    def __init__(
        self,
        width: int,
        *,
        n_hidden: int | None = None,
        reversed_sigmoid: bool = True,
        block: bool = False,
        conv_kernel: int = 4,
    ) -> None:
        super().__init__()
        hidden = n_hidden or (2 * width if block else width)
        self.n_hidden, self.reversed_sigmoid, self.block = hidden, reversed_sigmoid, block
        self.input = nn.Linear(width, 2 * hidden if block else hidden, bias=False)
        gate_width = hidden if block else width
        self.gates = nn.Linear(gate_width, 3 * hidden, bias=block)
        self.alpha = nn.Parameter(torch.tensor(1.0)) if reversed_sigmoid else None
        nn.init.normal_(self.input.weight, std=width**-0.5)
        nn.init.normal_(self.gates.weight, std=gate_width**-0.5)
        if block:
            self.conv = nn.Conv1d(hidden, hidden, conv_kernel, groups=hidden)
            self.output = nn.Linear(hidden, width, bias=False)
            nn.init.normal_(self.output.weight, std=hidden**-0.5)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The gates' system, driven by the projected (and, in the block, convolved) input."""
        if not self.block:
            return self._core(x), self.input(x)[..., None]
        k = short_convolution(self._branch(x, 1), self.conv.weight[:, 0], self.conv.bias)
        return self._core(k), k[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """y itself, or W_y (GELU(W_z x) * y); y (batch, time, unit, 1)."""
        if not self.block:
            return y[..., 0]
        return self.output(functional.gelu(self._branch(x, 0)) * y[..., 0])

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is (convolution cache or None, h)."""
        cache, h = (None, None) if state is None else state
        if self.block:
            u, cache = short_convolution_step(
                self._branch(x_t, 1), self.conv.weight[:, 0], self.conv.bias, cache)  # fmt: skip
            system = self._core(u[:, None])
        else:
            u, system = self.input(x_t), self._core(x_t[:, None])
        y, h = step(system, u[..., None], h)
        return self.readout(y, x_t), (cache, h)

    def _branch(self, x: Tensor, which: int) -> Tensor:
        """One half of `input`: 0 the GELU branch z, 1 the recurrent branch."""
        rows = slice(which * self.n_hidden, (which + 1) * self.n_hidden)
        return functional.linear(x, self.input.weight[rows])

    def _core(self, gated_by: Tensor) -> Recurrence:
        f, i, o = self.gates(gated_by).chunk(3, dim=-1)
        exponent = 1.0 if self.alpha is None else functional.relu(self.alpha)
        return qlstm_recurrence(
            f, i, o, reversed_sigmoid=self.reversed_sigmoid, exponent=exponent)  # fmt: skip


LAYER = Qlstm
