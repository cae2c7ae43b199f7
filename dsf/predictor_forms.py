"""The predictor form, whose output reads the state before the token, and the way back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact, Int
from dsf.state_factors import plain
from dsf.transitions import Dense
from dsf.transitions._base import mm, register

LARGEST = 1e3
"""A row C_t may be so many times the largest row C', and no more: its digits cancel with D_t."""
SOLVED = 1e-14
"""Residual of C'_t = C_t A_t, relative to the largest row C' times states, that means solved."""


@register
@dataclasses.dataclass(frozen=True)
class Predictor:
    """h_t = A_t h_{t-1} + B_t u_t,  y_t = C_t h_{t-1} + D_t u_t: the output reads the old state.

    A (batch, time, head, state, state), B (..., state, input), C (..., output, state),
    D (..., output, input), tensors in natural order of time; h_0 = 0. The state across a cut t
    needs rank map[t:, :t] numbers and no more, the fewest of all forms.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    @property
    def n_state(self) -> Int[Tensor, "batch head time"]:
        """States in use after each step, those that are not padded with zeros."""
        return rows_written(self.A, self.B).transpose(1, 2)

    def recurrence(self, *, direct: bool = True) -> Recurrence:
        """The same map as a dsf.Recurrence, y_t = C_t h_t + D_t u_t.

        Where C'_t = C_t A_t can be solved without losing digits the state stays as it is and
        D_t = D'_t - C_t B_t; elsewhere (and everywhere with `direct=False`, for a D of zero) the
        output itself is appended to the state of that step:

            A = [[A_t, 0], [C'_t, 0]],   B = [B_t; D'_t],   C = [0, 1],   D = 0

        Raises DsfValueError on several outputs, which would need as many states.
        """
        if self.C.shape[-2] != 1:
            raise DsfValueError(
                f"dsf.Predictor.recurrence: C: expected output=1, got {self.C.shape[-2]}."
            )
        A, B, C, D = self.A, self.B, self.C, self.D
        n = A.shape[-1]
        read, solved = _solve(A, C) if direct else (torch.zeros_like(C), _nowhere(C))
        kept = rows_written(A, B)  # (batch, time, head)
        at_end = torch.nn.functional.one_hot(kept, n + 1).to(A.dtype)  # the state after the last
        at_end = at_end * ~solved[..., None]
        grown = torch.nn.functional.pad(A, (0, 1, 0, 1)) + at_end[..., None] * _wider(C)
        write = torch.nn.functional.pad(B, (0, 0, 0, 1)) + at_end[..., None] * D
        out = torch.where(solved[..., None, None], _wider(read), at_end[..., None, :])
        rest = torch.where(solved[..., None, None], D - mm(read, B), 0)
        width = max(1, int((kept + ~solved).amax()) if kept.numel() else 1)
        return Recurrence(
            Dense(grown[..., :width, :width]), write[..., :width, :], out[..., :width],
            rest if direct else None, system="realised", gauge="predictor form",
        )  # fmt: skip


def predictor_form(recurrence: Recurrence) -> Predictor:
    """The predictor form with the same states: C'_t = C_t A_t, D'_t = C_t B_t + D_t.

    In float64 (complex128), dense; a complex system with `real_output` gets twice the states.
    Raises DsfValueError on an initial state, which the form does not hold. Cost O(length state^2)
    memory.
    """
    if recurrence.initial_state is not None:
        raise DsfValueError(
            "dsf.predictor_form: initial_state: expected None, got one. Replace it by None; its "
            "share of the output is C_t A_t ... A_1 h_0."
        )
    r = plain(recurrence)
    batch, length, head = r.lead_shape()
    B, C = r.dense_input_output()

    def spread(x: Tensor) -> Tensor:
        return x.to(r.dtype).expand(batch, length, head, -1, -1)

    A, B, C = spread(r.dense_transition()), spread(B), spread(C)
    D = mm(C, B) if r.D is None else mm(C, B) + spread(r.D)
    return Predictor(A, B, mm(C, A), D)


def states_kept(recurrence: Recurrence) -> Int[Tensor, "batch head time"]:
    """How many states of each step are in use where sizes vary: those not padded with zeros.

    Realised and reduced recurrences hold steps of different sizes in one array, padded with exact
    zeros at the end; a state counts up to the last row of [A_t, B_t] that is not zero.
    """
    r = recurrence.dense_factors()
    batch, length, head = r.lead_shape()
    A = r.dense_transition().expand(batch, length, head, -1, -1)
    B, _ = r.dense_input_output()
    return rows_written(A, B.expand(batch, length, head, -1, -1)).transpose(1, 2)


def rows_written(A: Inexact[Tensor, "*lead n n"], B: Inexact[Tensor, "*lead n m"]) -> Tensor:
    """The number of leading states up to the last row of [A, B] that is not zero."""
    used = (A != 0).any(-1) | (B != 0).any(-1)
    index = torch.arange(1, used.shape[-1] + 1, device=used.device)
    return (used * index).amax(-1) if used.shape[-1] else used.sum(-1)


def _solve(A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """C with C A = C', and where that worked, (batch, time, head)."""
    inverse = torch.linalg.pinv(A, rtol=1e-10)
    read = C @ inverse
    read = read + (C - read @ A) @ inverse
    gap = torch.linalg.matrix_norm(C - read @ A)
    size = torch.linalg.matrix_norm(C)
    top = size.amax() if size.numel() else 0.0
    small = torch.linalg.matrix_norm(read) <= LARGEST * top
    return read, small & (gap <= SOLVED * A.shape[-1] * top)


def _nowhere(C: Tensor) -> Tensor:
    return torch.zeros(C.shape[:3], dtype=torch.bool, device=C.device)


def _wider(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1))
