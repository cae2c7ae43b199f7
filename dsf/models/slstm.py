"""sLSTM: the scalar memory of xLSTM, exponential gates that see the last output of their head."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.linearize import linearized
from dsf.models._exponential_gates import in_units_of, running_maximum
from dsf.models._heads import check_divides, split_heads
from dsf.models._mixer import SequenceMixer
from dsf.models._projections import HeadNorm
from dsf.models._windowed import divided_by_row_sums
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Diagonal
from dsf.wrappers import gated

SYSTEM = "slstm"


class SlstmState(NamedTuple):
    """y, c, n and m, all (batch, unit); c and n are divided by exp(m)."""

    hidden: Tensor
    cell: Tensor
    normaliser: Tensor
    largest: Tensor


class SlstmGates(NamedTuple):
    """Preactivations along one input and what the layer put out, each (batch, time, unit)."""

    input_gate: Tensor
    forget_gate: Tensor
    candidate: Tensor
    output_gate: Tensor
    hidden: Tensor


def slstm_recurrence(
    input_gate: Float[Tensor, "batch time unit"],
    forget_gate: Float[Tensor, "batch time unit"],
    output_gate: Float[Tensor, "batch time unit"],
) -> Recurrence:
    """The sLSTM as a system whose gates are those of one trajectory; every unit is a head.

        A_t = sigmoid(f_t),   B_t = exp(i_t),   C_t = sigmoid(o_t) / n_t,   D = 0
        n_t = A_t n_{t-1} + B_t,   in states divided by exp(m_t)
        m_t = max(m_{t-1} + log sigmoid(f_t), i_t)

    From the preactivations i, f, o; the values are the candidates tanh(z_t), (batch, time, unit,
    1). Row t of the map sums to sigmoid(o_t). Exact for the input that gave the gates, not for
    another: mode "exact_along_trajectory". Source: Beck et al. (2024), eqs. 8-18.
    """
    log_decay = functional.logsigmoid(forget_gate)
    m = running_maximum(log_decay, input_gate)
    log_decay, log_write = in_units_of(m, log_decay, input_gate)
    r = Recurrence(
        Diagonal(log_decay[..., None]), log_write.exp()[..., None, None],
        log_write.new_ones(1, 1, 1, 1, 1), system=SYSTEM, gauge="divided by exp(m_t)",
        mode="exact_along_trajectory",
    )  # fmt: skip
    r = divided_by_row_sums(r, lambda sums: sums, input_gate.shape[1])
    result = gated(torch.sigmoid(output_gate)[..., None], r)
    assert isinstance(result, Recurrence)
    return result


def slstm_gates(
    projected: Float[Tensor, "batch time gate unit"],
    weight: Float[Tensor, "head width gate width"],
    initial: SlstmState | None = None,
) -> tuple[SlstmGates, SlstmState]:
    """Run the cell and keep its gates, and the state after. Sequential, O(length x unit x width).

    projected: W x + b in the order i, f, z, o; weight[h, d, g, e] takes output d of head h to gate
    g of unit e of the same head.
    """
    state = initial
    if state is None:
        zero = projected.new_zeros(projected.shape[0], projected.shape[-1])
        state = SlstmState(zero, zero, zero, zero - torch.inf)
    steps = []
    for at in projected.unbind(1):
        i, f, z, o = (at + _recurrent(state.hidden, weight)).unbind(1)
        log_forget = functional.logsigmoid(f)
        m = torch.maximum(state.largest + log_forget, i)
        kept, new = torch.exp(state.largest + log_forget - m), torch.exp(i - m)
        cell = kept * state.cell + new * torch.tanh(z)
        normaliser = kept * state.normaliser + new
        hidden = torch.sigmoid(o) * cell / normaliser
        state = SlstmState(hidden, cell, normaliser, m)
        steps.append((i, f, torch.tanh(z), o, hidden))
    if not steps:
        return SlstmGates(*[projected[:, :, 0]] * 5), state
    return SlstmGates(*(torch.stack(s, 1) for s in zip(*steps, strict=True))), state


def _recurrent(hidden: Tensor, weight: Tensor) -> Tensor:
    """R y: (..., unit) -> (..., gate, unit), head by head."""
    by_head = hidden.unflatten(-1, weight.shape[:2])
    return torch.einsum("...hd,hdge->...ghe", by_head, weight).flatten(-2)


class Slstm(SequenceMixer):
    """The sLSTM layer with memory mixing inside each head, and one group norm group a head.

        (i, f, z, o)_t = W x_t + b + R y_{t-1},   R block diagonal by head

    The released block's convolution before the gates and its feed-forward part are left out.
    Sequential: O(length x width^2). Source: Beck et al. (2024), section 2.2.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag σ(fₜ), along the trajectory", "B": "e^iₜ",
        "C": "σ(oₜ)/nₜ, nₜ = σ(fₜ)nₜ₋₁ + e^iₜ", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "nₜ"
    source: ClassVar[str] = "Beck et al. (2024), arXiv 2405.04517, eqs. 8-18"

    def __init__(self, width: int, n_head: int = 4, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        check_divides("Slstm", "n_head", n_head, "width", width)
        size = width // n_head
        self.n_head = n_head
        self.input = nn.Linear(width, 4 * width)
        self.recurrent = nn.Parameter(torch.randn(n_head, size, 4, size) * 0.5 * size**-0.5)
        self.norm = HeadNorm(width, n_head, norm_eps)

    def gates(self, x: Tensor, state: SlstmState | None = None) -> tuple[SlstmGates, SlstmState]:
        """The gates along this input, and the state after it."""
        return slstm_gates(self.input(x).unflatten(-1, (4, -1)), self.recurrent, state)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The cell's system along this input, driven by the candidates."""
        g, _ = self.gates(x)
        system = slstm_recurrence(g.input_gate, g.forget_gate, g.output_gate)
        return system, g.candidate[..., None]

    def linearized(self, x: Tensor) -> Recurrence:
        """The Jacobian linearisation along this input, on changes of x, before the norm.

        Its state is (y, c, n) in true units, so exp(i) must fit the type.
        """
        width = x.shape[-1]

        def cell(state: Tensor, x_t: Tensor) -> Tensor:
            y, c, n = state.split(width)
            i, f, z, o = self.input(x_t).unflatten(-1, (4, -1)) + _recurrent(y, self.recurrent)
            forget, write = torch.sigmoid(f), torch.exp(i)
            c, n = forget * c + write * torch.tanh(z), forget * n + write
            return torch.cat([torch.sigmoid(o) * c / n, c, n])

        start = x.new_zeros(x.shape[0], 3 * width)
        return linearized(cell, x, start, lambda state: state[:width], system=SYSTEM)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """The group norm; y (batch, time, unit, 1)."""
        return self.norm(split_heads(y[..., 0], self.n_head))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, SlstmState]:
        """One token."""
        g, state = self.gates(x_t[:, None], state)
        return self.readout(g.hidden[..., None], x_t)[:, 0], state


LAYER = Slstm
