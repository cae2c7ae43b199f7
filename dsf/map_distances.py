"""How far two maps are apart, from their states."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.algebra import parallel
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.state_factors import at, initial_columns, plain, reached_factors, stationary_factors
from dsf.transitions._base import mm


def map_distance(
    a: Recurrence, b: Recurrence, *, strict: bool = False
) -> Float[Tensor, "batch head"]:
    """||map of a - map of b||_F from the states, (batch, head), to rounding of the larger one.

    The difference is a system of both states; row t of its map has the norm of C_t L_t, L_t the
    triangular factor of the states reached. An initial state counts as one more input before the
    first step, one for each of its channels. `strict`: without the diagonal (and D). Of
    time-invariant systems the root of the energy of the difference's impulse response (and of the
    response to the initial state). Cost O(length (n_a + n_b)^3).
    """
    a, b = plain(a), plain(b)
    D = None if b.D is None else -b.D
    return map_norm(parallel(a, b.replace(C=-b.dense_input_output()[1], D=D)), strict=strict)


def map_norm(recurrence: Recurrence, *, strict: bool = False) -> Float[Tensor, "batch head"]:
    """||map||_F, its initial state counted as in `map_distance`; O(length state^3)."""
    r = plain(recurrence)
    if strict:
        B, C = r.dense_input_output()
        r = r.replace(D=-mm(C, B))
    if r.length == 1:
        return _stationary_norm(r)
    first = initial_columns(r)[1]
    return norm_of(r, [first, *reached_factors(r, r.length, first)])


def norm_of(r: Recurrence, reached: list[Tensor]) -> Tensor:
    """sqrt(sum_t ||C_t A_t L_{t-1}||^2 + ||C_t B_t + D_t||^2) from L_0..L_length."""
    total = torch.zeros(reached[0].shape[:2], dtype=torch.float64, device=r.device)
    for t, factor in enumerate(reached[1:]):
        if r.D is None:
            total = total + torch.linalg.matrix_norm(mm(at(r.C, t), factor)) ** 2
        else:
            total = total + _row(r, t, reached[t])
    return total.sqrt()


def _row(r: Recurrence, t: int, before: Tensor) -> Tensor:
    past = mm(at(r.C, t), r.A.at(t).apply(before).to(before.dtype))
    own = mm(at(r.C, t), at(r.B, t)) + at(r.D, t)
    return torch.linalg.matrix_norm(past) ** 2 + torch.linalg.matrix_norm(own) ** 2


def _stationary_norm(r: Recurrence) -> Tensor:
    reached = stationary_factors(r)[0]
    if r.D is None:
        total = torch.linalg.matrix_norm(mm(at(r.C, 0), reached)) ** 2
    else:
        total = _row(r, 0, reached)
    start, _ = initial_columns(r)
    if start is not None:
        after = stationary_factors(r.replace(B=start[:, None], D=None, initial_state=None))[0]
        moved = r.A.at(0).apply(after).to(after.dtype)
        total = total + torch.linalg.matrix_norm(mm(at(r.C, 0), moved)) ** 2
    return total.sqrt()
