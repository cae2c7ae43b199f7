"""The Elman network: linear in its state once the gains of the trajectory are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.linearize import linearized
from dsf.memory import require_memory
from dsf.models._mixer import SequenceMixer
from dsf.models._stacked import DirectionRun, LayerRun, driven, runs_of
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Dense


def rnn_recurrence(
    gain: Float[Tensor, "batch time unit"],
    weight_hh: Float[Tensor, "unit unit"],
    initial_hidden: Float[Tensor, "batch unit"] | None = None,
) -> Recurrence:
    """An Elman network as a system, exact for the input whose gains these are.

        h_t = f(a_t),  a_t = U h_{t-1} + u_t     =>     A_t = diag(s_t) U,   B_t = diag(s_t),
        s_t = f(a_t) / a_t  (f'(0) where a_t = 0)

    One head of `unit` states; the values are u_t = W x_t + both biases, (batch, time, 1, unit, 1).
    For relu the gain is 0 or 1 and A_t is also the Jacobian; for tanh the Jacobian has f'(a_t) in
    the place of s_t (`recurrences_of(...)[i].linearize()`), describes changes only, and would
    need an offset to give back the output. Memory: two matrices of unit x unit a step.
    Source: Elman (1990); mode "exact_along_trajectory".
    """
    batch, length, unit = gain.shape
    require_memory(
        "dsf.rnn_recurrence", "A and B", ("matrix", "batch", "time", "state", "state_in"),
        (2, batch, length, unit, unit), gain.dtype, device=gain.device,
        advice="Trace shorter sequences, or rows of the batch one by one.",
    )  # fmt: skip
    return Recurrence(
        Dense((gain[..., None] * weight_hh)[:, :, None]), torch.diag_embed(gain)[:, :, None],
        torch.eye(unit, dtype=gain.dtype, device=gain.device)[None, None, None],
        initial_state=None if initial_hidden is None else initial_hidden[:, None, :, None],
        system="rnn", gauge="state of the layer", mode="exact_along_trajectory",
    )  # fmt: skip


def recurrences_of(module: nn.RNN, x: Any, initial: Any = None) -> list[LayerRun]:
    """Every layer and direction of a torch.nn.RNN as a system on its own input."""
    tanh = module.nonlinearity == "tanh"

    def run(
        weights: Mapping[str, Tensor | None], x: Tensor, start: Sequence[Tensor],
        keep: Tensor | None,
    ) -> DirectionRun:  # fmt: skip
        return _run(weights, x, start[0], keep, tanh)

    states = None if initial is None else (initial,)
    return runs_of(module, x, states, (module.hidden_size,), run)


def _run(
    weights: Mapping[str, Tensor | None], x: Tensor, start: Tensor, keep: Tensor | None, tanh: bool
) -> DirectionRun:
    weight_hh = weights["weight_hh"]
    assert weight_hh is not None
    nonlinearity = torch.tanh if tanh else torch.relu
    u = driven(x, weights)
    hidden, gains, states = start, [], []
    for t in range(x.shape[1]):
        a = u[:, t] + hidden @ weight_hh.mT
        new = nonlinearity(a)
        hidden = new if keep is None else torch.where(keep[:, t, None], new, hidden)
        gains.append(_gain(a, tanh))
        states.append(hidden)
    empty = x.new_zeros(x.shape[0], 0, start.shape[1])
    gain = torch.stack(gains, 1) if gains else empty
    recurrence = rnn_recurrence(gain, weight_hh, start)
    if keep is not None:
        recurrence = _standing_still(recurrence, keep)
    output = torch.stack(states, 1) if states else empty

    def shown(h: Tensor) -> Tensor:
        return h if keep is None else h * keep[..., None]

    def cell(state: Tensor, x_t: Tensor) -> Tensor:
        return nonlinearity(driven(x_t, weights) + state @ weight_hh.mT)

    return DirectionRun(
        recurrence, u[:, :, None, :, None], lambda y: shown(y[:, :, 0, :, 0]), shown(output),
        lambda: linearized(cell, x, start, system="rnn"),
    )  # fmt: skip


def _gain(a: Tensor, tanh: bool) -> Tensor:
    if not tanh:
        return (a > 0).to(a.dtype)
    zero = a == 0
    safe = a.masked_fill(zero, 1.0)
    return (torch.tanh(safe) / safe).masked_fill(zero, 1.0)


def _standing_still(r: Recurrence, keep: Tensor) -> Recurrence:
    """A = I and B = 0 at padding."""
    assert isinstance(r.A, Dense)
    assert isinstance(r.B, Tensor)
    real = keep[:, :, None, None, None]
    eye = torch.eye(r.n_state, dtype=r.B.dtype, device=r.B.device)
    return r.replace(A=Dense(torch.where(real, r.A.matrix, eye)), B=torch.where(real, r.B, 0.0))


class Rnn(SequenceMixer):
    """One Elman layer, torch.nn's: h_t = f(W x_t + U h_{t-1} + b), f tanh or relu.

    Its system is exact along the trajectory of the input at hand; `linearized` gives the Jacobian
    one. Cost O(length x unit^2); the system holds two unit x unit matrices a step. Source: Elman
    (1990), in torch.nn.RNN's form.
    """

    system: ClassVar[str] = "rnn"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag(f(aₜ)/aₜ) U, along the trajectory", "B": "diag(f(aₜ)/aₜ)", "C": "I", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Elman (1990), Cognitive Science 14"

    def __init__(
        self, width: int, *, n_hidden: int | None = None, nonlinearity: str = "tanh",
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rnn = nn.RNN(
            width, n_hidden or width, nonlinearity=nonlinearity, bias=bias, batch_first=True
        )

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The system along this input; values W x + biases, (batch, time, 1, unit, 1)."""
        run = self._run(x)
        return run.recurrence.replace(initial_state=None), run.values

    def linearized(self, x: Tensor) -> Recurrence:
        """The Jacobian linearisation along this input, on changes of x."""
        return self._run(x).linearize()

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """The states themselves."""
        return y[:, :, 0, :, 0]

    def forward(self, x: Tensor) -> Tensor:
        """torch.nn.RNN itself."""
        if x.shape[1] == 0:  # which torch refuses
            return x.new_zeros(x.shape[0], 0, self.rnn.hidden_size)
        return self.rnn(x)[0]

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is hidden (batch, unit)."""
        hidden = self._run(x_t[:, None], state).output[:, 0]
        return hidden, hidden

    def _run(self, x: Tensor, start: Tensor | None = None) -> DirectionRun:
        weights = {n.removesuffix("_l0"): p for n, p in self.rnn.named_parameters()}
        start = x.new_zeros(x.shape[0], self.rnn.hidden_size) if start is None else start
        return _run(weights, x, start, None, self.rnn.nonlinearity == "tanh")


LAYER = Rnn
