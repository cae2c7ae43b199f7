"""GRU: linear in its state once the gates and candidates of the trajectory are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.linearize import linearized
from dsf.models._mixer import SequenceMixer
from dsf.models._stacked import DirectionRun, LayerRun, runs_of
from dsf.recurrence import Recurrence
from dsf.shapes import Bool, Float
from dsf.transitions import Diagonal


class GruGates(NamedTuple):
    """What a GRU computed along one input, each (batch, time, unit).

    `update_logit` is z before its sigmoid, `candidate` is n_t, the value written.
    """

    update_logit: Tensor
    candidate: Tensor
    hidden: Tensor


def gru_recurrence(
    update_logit: Float[Tensor, "batch time unit"],
    initial_hidden: Float[Tensor, "batch unit"] | None = None,
) -> Recurrence:
    """The states of a GRU as a system whose gates and values are those of one trajectory.

        h_t = z_t h_{t-1} + (1 - z_t) n_t,    z_t = sigmoid(update_logit)

    Every unit is a head of one state; the values are the candidates n_t, (batch, time, unit, 1),
    which depend on h_{t-1} themselves, so the system is exact for the input that gave them: mode
    "exact_along_trajectory". Source: Cho et al. (2014), in torch.nn.GRU's form.
    """
    return Recurrence(
        Diagonal(functional.logsigmoid(update_logit)[..., None]),
        torch.sigmoid(-update_logit)[..., None, None],
        torch.ones(1, 1, 1, 1, 1, dtype=update_logit.dtype, device=update_logit.device),
        initial_state=None if initial_hidden is None else initial_hidden[..., None, None],
        system="gru", mode="exact_along_trajectory",
    )  # fmt: skip


def gru_cell(
    projected: Tensor, hidden: Tensor, weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """New hidden, update logit and candidate of one step.

    projected: W_ih x + b_ih, (..., 3 unit), in torch's order r, z, n. The reset gate multiplies
    the hidden projection after its bias was added.
    """
    r_x, z_x, n_x = projected.chunk(3, dim=-1)
    recurrent = hidden @ weight_hh.mT
    recurrent = recurrent if bias_hh is None else recurrent + bias_hh
    r_h, z_h, n_h = recurrent.chunk(3, dim=-1)
    update = z_x + z_h
    candidate = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    new = torch.sigmoid(update) * hidden + torch.sigmoid(-update) * candidate
    return new, update, candidate


def gru_gates(
    x: Float[Tensor, "batch time feature"],
    weights: Mapping[str, Tensor | None],
    initial: Sequence[Tensor] | None = None,
    keep: Bool[Tensor, "batch time"] | None = None,
) -> GruGates:
    """Run one direction of one layer and keep its gates. Sequential, O(length x unit^2).

    weights: torch's tensors by name (weight_ih, weight_hh, bias_ih, bias_hh); initial: (hidden,),
    zeros if None; keep: False at padding, where the state stands still.
    """
    weight_hh, bias_hh = weights["weight_hh"], weights.get("bias_hh")
    assert weight_hh is not None
    projected = _project(x, weights)
    hidden = x.new_zeros(x.shape[0], weight_hh.shape[1]) if initial is None else initial[0]
    steps = []
    for t in range(x.shape[1]):
        h, update, candidate = gru_cell(projected[:, t], hidden, weight_hh, bias_hh)
        if keep is not None:
            real = keep[:, t, None]
            update = update.masked_fill(~real, torch.inf)
            h = torch.where(real, h, hidden)
        hidden = h
        steps.append((update, candidate, hidden))
    if not steps:
        return GruGates(*[x.new_zeros(x.shape[0], 0, hidden.shape[1])] * 3)
    return GruGates(*(torch.stack(s, 1) for s in zip(*steps, strict=True)))


def gru_linearized(
    x: Float[Tensor, "batch time feature"],
    weights: Mapping[str, Tensor | None],
    initial: Sequence[Tensor] | None = None,
) -> Recurrence:
    """The Jacobian linearisation of one direction of one layer: see `dsf.linearize`.

    The state is hidden, the inputs are changes of x, the outputs changes of hidden.
    """
    weight_hh, bias_hh = weights["weight_hh"], weights.get("bias_hh")
    assert weight_hh is not None
    start = x.new_zeros(x.shape[0], weight_hh.shape[1]) if initial is None else initial[0]

    def cell(state: Tensor, x_t: Tensor) -> Tensor:
        return gru_cell(_project(x_t, weights), state, weight_hh, bias_hh)[0]

    return linearized(cell, x, start, system="gru")


def recurrences_of(module: nn.GRU, x: Any, initial: Any = None) -> list[LayerRun]:
    """Every layer and direction of a torch.nn.GRU as a system on its own input.

    x and initial (h_0) as the module takes them: batch first or not, unbatched, packed. Runs come
    in the module's order (layer 0 forward, layer 0 backward, ...); the output of the module is
    that of the last layer's runs, side by side. Raises DsfUnsupportedError, DsfShapeError.
    """
    states = None if initial is None else (initial,)
    return runs_of(module, x, states, (module.hidden_size,), _run)


def _run(
    weights: Mapping[str, Tensor | None], x: Tensor, initial: Sequence[Tensor], keep: Tensor | None
) -> DirectionRun:
    gates = gru_gates(x, weights, initial, keep)

    def readout(y: Tensor) -> Tensor:
        return y[..., 0] if keep is None else y[..., 0] * keep[..., None]

    return DirectionRun(
        gru_recurrence(gates.update_logit, initial[0]), gates.candidate[..., None], readout,
        readout(gates.hidden[..., None]), lambda: gru_linearized(x, weights, initial),
    )  # fmt: skip


def _project(x: Tensor, weights: Mapping[str, Tensor | None]) -> Tensor:
    weight_ih, bias_ih = weights["weight_ih"], weights.get("bias_ih")
    assert weight_ih is not None
    projected = x @ weight_ih.mT
    return projected if bias_ih is None else projected + bias_ih


class Gru(SequenceMixer):
    """One GRU layer, torch.nn's, with its gates laid open. Source: torch.nn.GRU."""

    system: ClassVar[str] = "gru"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag zₜ, along the trajectory", "B": "diag(1 − zₜ)", "C": "I", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Cho et al. (2014), arXiv 1406.1078"

    def __init__(self, width: int, *, n_hidden: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.rnn = nn.GRU(width, n_hidden or width, bias=bias, batch_first=True)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The states' system along this input, driven by the candidates."""
        gates = gru_gates(x, self._weights())
        return gru_recurrence(gates.update_logit), gates.candidate[..., None]

    def linearized(self, x: Tensor) -> Recurrence:
        """The Jacobian linearisation along this input, on changes of x."""
        return gru_linearized(x, self._weights())

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """The states themselves."""
        return y[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        """torch.nn.GRU itself."""
        if x.shape[1] == 0:  # which torch refuses
            return x.new_zeros(x.shape[0], 0, self.rnn.hidden_size)
        return self.rnn(x)[0]

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is hidden (batch, unit)."""
        start = None if state is None else (state,)
        hidden = gru_gates(x_t[:, None], self._weights(), start).hidden[:, 0]
        return hidden, hidden

    def _weights(self) -> dict[str, Tensor | None]:
        return {name.removesuffix("_l0"): p for name, p in self.rnn.named_parameters()}


LAYER = Gru
