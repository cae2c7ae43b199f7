"""LSTM: linear in its cell state once the gates of the trajectory are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.linearize import linearized
from dsf.models._mixer import SequenceMixer
from dsf.models._stacked import DirectionRun, LayerRun, driven, runs_of
from dsf.recurrence import Recurrence
from dsf.shapes import Bool, Float
from dsf.transitions import Diagonal


class LstmGates(NamedTuple):
    """What an LSTM computed along one input, each (batch, time, unit).

    The logits are the gates before their sigmoid; `candidate` is tanh(g), the value written;
    `hidden` is the layer's output (of the projected width if it projects).
    """

    input_logit: Tensor
    forget_logit: Tensor
    candidate: Tensor
    output_gate: Tensor
    hidden: Tensor
    cell: Tensor


def lstm_recurrence(
    forget_logit: Float[Tensor, "batch time unit"],
    input_logit: Float[Tensor, "batch time unit"],
    initial_cell: Float[Tensor, "batch unit"] | None = None,
) -> Recurrence:
    """The cell states of an LSTM as a system whose gates are those of one trajectory.

        c_t = sigmoid(forget_logit) c_{t-1} + sigmoid(input_logit) u_t

    Every unit is a head of one state; the values are the candidates tanh(g_t), (batch, time, unit,
    1); the layer's output is o_t tanh(c_t). Exact for the input that gave the gates, not for
    another: mode "exact_along_trajectory". Source: Hochreiter and Schmidhuber (1997), with forget
    gates; Sieber et al. (2024), equations 5 to 7.
    """
    return Recurrence(
        Diagonal(functional.logsigmoid(forget_logit)[..., None]),
        torch.sigmoid(input_logit)[..., None, None],
        torch.ones(1, 1, 1, 1, 1, dtype=input_logit.dtype, device=input_logit.device),
        initial_state=None if initial_cell is None else initial_cell[..., None, None],
        system="lstm", mode="exact_along_trajectory",
    )  # fmt: skip


def lstm_cell(
    projected: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, weight_hr: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """New hidden, new cell, and (i, f, g, o) before their nonlinearities, for one step.

    projected: W_ih x + both biases, (..., 4 unit), in torch's order i, f, g, o.
    """
    raw = (projected + hidden @ weight_hh.mT).chunk(4, dim=-1)
    i, f, g, o = raw
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden if weight_hr is None else hidden @ weight_hr.mT, cell, raw


def lstm_gates(
    x: Float[Tensor, "batch time feature"],
    weights: Mapping[str, Tensor | None],
    initial: Sequence[Tensor] | None = None,
    keep: Bool[Tensor, "batch time"] | None = None,
) -> LstmGates:
    """Run one direction of one layer and keep its gates. Sequential, O(length x unit^2).

    weights: torch's tensors by name (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), absent or
    None where there are none; initial: (hidden, cell), zeros if None; keep: False at padding,
    where the state stands still.
    """
    weight_hh, weight_hr = weights["weight_hh"], weights.get("weight_hr")
    assert weight_hh is not None
    projected = driven(x, weights)
    if initial is None:
        cell = x.new_zeros(x.shape[0], weight_hh.shape[0] // 4)
        hidden = x.new_zeros(x.shape[0], weight_hh.shape[1])
    else:
        hidden, cell = initial
    steps = []
    for t in range(x.shape[1]):
        h, c, (i, f, g, o) = lstm_cell(projected[:, t], hidden, cell, weight_hh, weight_hr)
        if keep is not None:
            real = keep[:, t, None]
            f, i = f.masked_fill(~real, torch.inf), i.masked_fill(~real, -torch.inf)
            h, c = torch.where(real, h, hidden), torch.where(real, c, cell)
        hidden, cell = h, c
        steps.append((i, f, torch.tanh(g), torch.sigmoid(o), hidden, cell))
    if not steps:
        unit = x.new_zeros(x.shape[0], 0, cell.shape[1])
        return LstmGates(unit, unit, unit, unit, x.new_zeros(x.shape[0], 0, hidden.shape[1]), unit)
    return LstmGates(*(torch.stack(s, 1) for s in zip(*steps, strict=True)))


def lstm_linearized(
    x: Float[Tensor, "batch time feature"],
    weights: Mapping[str, Tensor | None],
    initial: Sequence[Tensor] | None = None,
) -> Recurrence:
    """The Jacobian linearisation of one direction of one layer: see `dsf.linearize`.

    The state is (hidden, cell), the inputs are changes of x, the outputs changes of hidden.
    """
    weight_hh, weight_hr = weights["weight_hh"], weights.get("weight_hr")
    assert weight_hh is not None
    width = weight_hh.shape[1]
    if initial is None:
        start = x.new_zeros(x.shape[0], width + weight_hh.shape[0] // 4)
    else:
        start = torch.cat(list(initial), -1)

    def cell(state: Tensor, x_t: Tensor) -> Tensor:
        projected = driven(x_t, weights)
        h, c, _ = lstm_cell(projected, state[:width], state[width:], weight_hh, weight_hr)
        return torch.cat([h, c])

    return linearized(cell, x, start, lambda state: state[:width], system="lstm")


def recurrences_of(module: nn.LSTM, x: Any, initial: Any = None) -> list[LayerRun]:
    """Every layer and direction of a torch.nn.LSTM as a system on its own input.

    x and initial (h_0, c_0) as the module takes them: batch first or not, unbatched, packed. Runs
    come in the module's order (layer 0 forward, layer 0 backward, ...); the output of the module
    is that of the last layer's runs, side by side. Raises DsfUnsupportedError, DsfShapeError.
    """
    widths = (module.proj_size or module.hidden_size, module.hidden_size)
    return runs_of(module, x, initial, widths, _run)


def _run(
    weights: Mapping[str, Tensor | None], x: Tensor, initial: Sequence[Tensor], keep: Tensor | None
) -> DirectionRun:
    gates = lstm_gates(x, weights, initial, keep)

    def readout(y: Tensor) -> Tensor:
        return lstm_readout(y, gates.output_gate, weights.get("weight_hr"), keep)

    hidden = gates.hidden if keep is None else gates.hidden * keep[..., None]
    return DirectionRun(
        lstm_recurrence(gates.forget_logit, gates.input_logit, initial[1]),
        gates.candidate[..., None], readout, hidden,
        lambda: lstm_linearized(x, weights, initial),
    )  # fmt: skip


def lstm_readout(
    cell: Float[Tensor, "batch time unit 1"],
    output_gate: Float[Tensor, "batch time unit"],
    weight_hr: Float[Tensor, "projected unit"] | None = None,
    keep: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time projected"]:
    """o_t tanh(c_t), projected if the module projects, zero at padding."""
    hidden = output_gate * torch.tanh(cell[..., 0])
    hidden = hidden if weight_hr is None else hidden @ weight_hr.mT
    return hidden if keep is None else hidden * keep[..., None]


class Lstm(SequenceMixer):
    """One LSTM layer, torch.nn's, with its gates laid open. Source: torch.nn.LSTM."""

    system: ClassVar[str] = "lstm"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag σ(fₜ), along the trajectory", "B": "diag σ(iₜ)", "C": "I, read as oₜ tanh(cₜ)",
        "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Hochreiter and Schmidhuber (1997); Sieber et al. (2024), eqs 5 to 7"

    def __init__(self, width: int, *, n_hidden: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, n_hidden or width, bias=bias, batch_first=True)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The cell states' system along this input, driven by the candidates."""
        gates = lstm_gates(x, self._weights())
        return lstm_recurrence(gates.forget_logit, gates.input_logit), gates.candidate[..., None]

    def linearized(self, x: Tensor) -> Recurrence:
        """The Jacobian linearisation along this input, on changes of x."""
        return lstm_linearized(x, self._weights())

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """o_t tanh(c_t), with the output gates of this input."""
        return lstm_readout(y, lstm_gates(x, self._weights()).output_gate)

    def forward(self, x: Tensor) -> Tensor:
        """torch.nn.LSTM itself."""
        if x.shape[1] == 0:  # which torch refuses
            return x.new_zeros(x.shape[0], 0, self.rnn.hidden_size)
        return self.rnn(x)[0]

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is (hidden, cell)."""
        gates = lstm_gates(x_t[:, None], self._weights(), state)
        return gates.hidden[:, 0], (gates.hidden[:, 0], gates.cell[:, 0])

    def _weights(self) -> dict[str, Tensor | None]:
        return {name.removesuffix("_l0"): p for name, p in self.rnn.named_parameters()}


LAYER = Lstm
