"""The Jacobian linearisation of a nonlinear recurrence along its own trajectory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfShapeError
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Dense

Cell = Callable[[Tensor, Tensor], Tensor]
"""One step for one sequence: (state,), (input,) -> (state,)."""


def linearized(
    cell: Cell,
    inputs: Float[Tensor, "batch time input"],
    initial: Float[Tensor, "_batch state"],
    readout: Callable[[Tensor], Tensor] | None = None,
    *,
    system: str = "",
) -> Recurrence:
    """How small changes of the input reach the output, to first order, as a system.

        s_t = F(s_{t-1}, x_t),    y_t = G(s_t)
        A_t = dF/ds,   B_t = dF/dx   at (s_{t-1}, x_t),    C_t = dG/ds   at s_t

    Its values are a change of the inputs, (batch, time, 1 head, input, channel), its scan the
    change of the outputs; its map is the layer's total Jacobian dy_t/dx_j, (output, input) at the
    end. cell is F and readout is G (identity if None), written for one sequence and one step, of
    operations that torch.func can differentiate. The initial state is held fixed. mode is
    "linearised". Cost: one run, then state forward-mode passes on all steps at once; memory
    O(length x state x (state + input)). Differentiable. Raises DsfShapeError.
    """
    if inputs.shape[0] != initial.shape[0]:
        raise DsfShapeError(
            f"dsf.linearized: initial: expected batch={inputs.shape[0]}, got {initial.shape[0]}; "
            f"batch is fixed by inputs."
        )
    step = torch.func.vmap(cell)
    states = [initial]
    for x_t in inputs.unbind(1):
        states.append(step(states[-1], x_t))
    before = torch.stack(states[:-1], 1) if len(states) > 1 else initial[:, None][:, :0]
    after = torch.stack(states[1:], 1) if len(states) > 1 else before
    everywhere = torch.func.vmap(torch.func.vmap(torch.func.jacfwd(cell, argnums=(0, 1))))
    A, B = everywhere(before, inputs)
    if readout is None:
        n = initial.shape[1]
        C = torch.eye(n, dtype=initial.dtype, device=initial.device)[None, None]
    else:
        C = torch.func.vmap(torch.func.vmap(torch.func.jacfwd(readout)))(after)
    return Recurrence(
        Dense(A[:, :, None]), B[:, :, None], C[:, :, None], system=system,
        gauge="state of the layer", mode="linearised",
    )  # fmt: skip
