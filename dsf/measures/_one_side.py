"""One direction of a system as a recurrence in the order of its own time; its decays as logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.map_blocks import Side
from dsf.maps import system_attrs
from dsf.measures._maps import precision_of
from dsf.measures._size_checks import require_states
from dsf.recurrence import Recurrence
from dsf.transitions import Decay, DiagonalLowRank, Identity, Scalar, Transition
from dsf.wrappers import Anticausal, Bidirectional, Gated, System


def one_side(system: System, side: Side | None, function: str) -> tuple[Recurrence, Side]:
    """The recurrence of one direction, in the order of its own time, and which one it is.

    Raises DsfTypeError on a bare map, which has no states, DsfValueError on a side that is not
    there, DsfShapeError on an empty system; messages name `function`.
    """
    if isinstance(system, Gated):
        return one_side(system.system, side, function)
    if isinstance(system, Bidirectional):
        part = system.anticausal if side == "upper" else system.causal
        return one_side(part, None, function)
    if isinstance(system, Anticausal):
        if side == "lower":
            raise DsfValueError(
                f"dsf.{function}: side: expected upper for an anticausal system, got lower."
            )
        r = _some(system.recurrence, function)
        return r.replace(A=r.A.flip_time()), "upper"
    if not isinstance(system, Recurrence):
        raise DsfTypeError(
            f"dsf.{function}: system: expected a dsf system, got {type(system)}; a bare map has "
            f"no states, see dsf.measures.effective_horizon."
        )
    if side == "upper":
        raise DsfValueError(
            f"dsf.{function}: side: expected lower for a causal system, got upper."
        )
    return _some(system, function), "lower"


def _some(r: Recurrence, function: str) -> Recurrence:
    require_states(function, r)
    if r.length == 0 or r.n_state == 0:
        raise DsfShapeError(
            f"dsf.{function}: system: expected at least one step and one state, got time="
            f"{r.length}, state={r.n_state}."
        )
    return r


def side_attrs(system: System, r: Recurrence, side: Side) -> dict[str, Any]:
    """The labels of every measure of one direction's states."""
    return {**system_attrs(system), "side": side, "precision": precision_of(r)}


def decay_logs(A: Transition) -> Tensor | None:
    """log |a| (batch, time, head, state), float64 on the CPU, -inf for 0; None if not diagonal."""
    if isinstance(A, Identity):
        return torch.zeros(1, 1, 1, A.n_state, dtype=torch.float64)
    if not isinstance(A, Decay) or isinstance(A, DiagonalLowRank):
        return None
    logs = A.log_decay.detach().cpu().to(torch.float64)
    return logs[..., None].expand(*logs.shape, A.n_state) if isinstance(A, Scalar) else logs


def decay_phases(A: Transition) -> Tensor:
    """The angle of each decay number, as `decay_logs`: 0, pi where negative, or the phase."""
    if isinstance(A, Identity):
        return torch.zeros(1, 1, 1, A.n_state, dtype=torch.float64)
    assert isinstance(A, Decay)
    angle = torch.zeros(A.log_decay.shape, dtype=torch.float64)
    if A.phase is not None:
        angle = angle + A.phase.detach().cpu().double()
    if A.sign is not None:
        angle = angle + torch.pi * (A.sign.detach().cpu() < 0).double()
    return angle[..., None].expand(*angle.shape, A.n_state) if isinstance(A, Scalar) else angle


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in (-pi, pi]."""
    turned = torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi
    return torch.where(turned == -torch.pi, torch.pi, turned)


def dense_step(A: Transition, t: int) -> Tensor:
    """A of step t (0-based) as matrices (batch, head, state, state), double, on the CPU."""
    matrix = (A if not A.tensors() else A.at(t)).as_dense().detach().cpu()
    matrix = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    return matrix if A.tensors() else matrix.reshape(1, 1, A.n_state, A.n_state)


def matrix_dtype(A: Transition) -> torch.dtype:
    """The dtype of `dense_step`."""
    return torch.complex128 if A.is_complex else torch.float64
