"""How well states are reached and seen: Gramians, and their factors that are never squared."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact
from dsf.state_factors import at, nothing_yet, plain, require_stable
from dsf.transitions import Diagonal, Identity, Scalar
from dsf.transitions._base import mm

Kind = Literal["reachability", "observability"]

RESIDUAL = 1e-10
"""Largest residual of a stationary Gramian that is let through, relative to its own size."""


def gramian(
    recurrence: Recurrence,
    kind: Kind = "reachability",
    *,
    horizon: int | None = None,
    strict: bool = False,
    max_memory: int | None = None,
) -> Inexact[Tensor, "batch time head state state"]:
    """The Gramian of every step: energy with which states are reached, or seen in the output.

        reachability   W_t = A_t W_{t-1} A_t^H + B_t B_t^H,    W_0 = 0
        observability  V_t = C_t^H C_t + A_{t+1}^H V_{t+1} A_{t+1},    V_{L+1} = 0

    `strict` leaves the own output C_t^H C_t out of V_t (it stays in the recursion): the predictor
    form, whose sqrt(eig(W_t V_t)) are the singular values of map[t:, :t]; without it they are
    those of map[t-1:, :t] (1-based t, slices as in Python). A time-invariant system, whose time
    axis has size 1, gets its stationary Gramian, the fixed point, with time of size 1, unless
    `horizon` gives a number of steps. Complex systems with `real_output` count real and
    imaginary parts as states.

    Returns (batch, time, head, state, state) in float64 or complex128. Raises DsfValueError when
    a stationary Gramian does not exist (spectral radius not below 1) or misses its equation by
    more than 1e-10, DsfMemoryError before what would not fit. Cost: O(length state^3);
    stationary: O(state^2) where A is diagonal, else one Schur decomposition and O(state^3).
    Source: Dewilde and van der Veen (1998), chapter 3.
    """
    if kind not in ("reachability", "observability"):
        raise DsfValueError(
            f"dsf.gramian: kind: expected reachability or observability, got {kind!r}."
        )
    batch, length, head = recurrence.lead_shape()
    if length > 1 and horizon is not None:
        raise DsfValueError(
            f"dsf.gramian: horizon: expected None for a system of {length} steps of its own, got "
            f"{horizon}. Cut it with dsf.slice_time."
        )
    length = horizon or length
    paired = recurrence.real_output and recurrence.dtype.is_complex
    n = recurrence.n_state * (2 if paired else 1)
    require_memory(
        "dsf.gramian", "Gramians", ("batch", "time", "head", "state", "state"),
        (batch, length, head, n, n), torch.promote_types(recurrence.dtype, torch.float64),
        device=recurrence.device, max_memory=max_memory,
        advice="Measure fewer steps with dsf.slice_time.",
    )  # fmt: skip
    r = plain(recurrence)
    if r.length == 1 and horizon is None:
        return _stationary(r, kind, strict)
    steps = _reached(r, length) if kind == "reachability" else _seen(r, length, strict)
    return torch.stack(steps, dim=1)


def reachability(
    recurrence: Recurrence, position: int = -1, *, strict: bool = False
) -> Inexact[Tensor, "batch head state key"]:
    """The matrix that maps an output row c at `position` to its weights over the keys, c R.

        R_t = [ A_t ... A_2 B_1, ..., A_t B_{t-1}, B_t ]

    `strict` leaves out the token itself (its column is zero). With several inputs the columns of
    a key stand side by side, (key input). The scan is run backwards on the identity, exact and
    safe for any decay. Cost O(t state^2), O(t state) where A is diagonal; memory state x t.
    Source: realisation theory.
    """
    r = recurrence.dense_factors()
    batch, length, head = r.lead_shape()
    t = range(length)[position]
    wide = torch.complex128 if r.dtype.is_complex else torch.float64
    n = r.n_state
    alone = isinstance(r.A, Identity | Scalar | Diagonal)  # then (A..A)^T is kept as its diagonal
    start = torch.ones(n, 1, dtype=wide) if alone else torch.eye(n, dtype=wide)
    onward = start.to(r.device).expand(batch, head, n, -1)  # (A..A)^T
    columns = []
    for j in range(t, -1, -1):
        b = at(r.B, j).to(wide)
        own = (onward * b if alone else mm(onward.mT, b)).expand(batch, head, n, -1)
        columns.append(torch.zeros_like(own) if strict and j == t else own)
        onward = r.A.at(j).apply_transposed(onward).to(wide)
    return torch.cat(columns[::-1], dim=-1)


# -- by the recursion --------------------------------------------------------------------------


def _reached(r: Recurrence, length: int) -> list[Tensor]:
    W = nothing_yet(r)
    steps = []
    for t in range(length):
        A, b = r.A.at(t), at(r.B, t)
        half = A.apply(W).to(r.dtype)  # A W
        W = A.apply(half.mH).mH + mm(b, b.mH)
        steps.append(W.expand(*nothing_yet(r).shape))
    return steps


def _seen(r: Recurrence, length: int, strict: bool) -> list[Tensor]:
    V = nothing_yet(r)  # what the later outputs see
    steps = []
    for t in range(length - 1, -1, -1):
        c = at(r.C, t)
        both = V + mm(c.mH, c)
        steps.append((V if strict else both).expand(*nothing_yet(r).shape))
        A = r.A.at(t)
        half = A.apply_transposed(both.mH.conj()).conj()  # A^H V
        V = A.apply_transposed(half.mH.conj()).conj().mH.to(r.dtype)
    return steps[::-1]


# -- stationary --------------------------------------------------------------------------------


def _stationary(r: Recurrence, kind: Kind, strict: bool) -> Tensor:
    require_stable("dsf.gramian", r)
    batch, _, head = r.lead_shape()
    n = r.n_state
    reach = kind == "reachability"
    x = at(r.B, 0) if reach else at(r.C, 0).mH
    source = mm(x, x.mH).to(r.dtype).expand(batch, head, n, n)
    if isinstance(r.A, Diagonal | Scalar):
        logs = r.A.log_decay[:, 0]
        phase = torch.zeros_like(logs) if r.A.phase is None else r.A.phase[:, 0]
        sign = torch.ones_like(logs) if r.A.sign is None else r.A.sign[:, 0]
        if isinstance(r.A, Scalar):
            logs, phase, sign = (v[..., None].expand(*v.shape, n) for v in (logs, phase, sign))
        gap = one_minus_products(logs, phase, sign)  # 1 - a_i conj(a_j)
        W = source / (gap if reach else gap.conj()).to(r.dtype)
    else:
        A = r.dense_transition()[:, 0].to(r.dtype).expand(batch, head, n, n)
        pairs = zip((A if reach else A.mH).flatten(0, 1), source.flatten(0, 1), strict=True)
        solved = [_stein(a.cpu().numpy(), q.cpu().numpy()) for a, q in pairs]
        W = torch.from_numpy(np.stack(solved)).to(r.device, r.dtype).unflatten(0, (batch, head))
    if strict and not reach:
        W = W - source
    return W[:, None]


def one_minus_products(log_decay: Tensor, phase: Tensor, sign: Tensor) -> Tensor:
    """1 - a_i conj(a_j) for a = sign exp(log_decay + i phase), to full relative accuracy."""
    logs = log_decay[..., :, None] + log_decay[..., None, :]
    angle = phase[..., :, None] - phase[..., None, :]
    same = sign[..., :, None] * sign[..., None, :] > 0
    if not bool(angle.any()):
        return torch.where(same, -torch.expm1(logs), 1 + torch.exp(logs))
    # 1 - m e^(i x) = (1 - m) + 2 m sin^2(x/2) - i m sin x: nothing cancels
    angle = torch.where(same, angle, angle + torch.pi)
    m = torch.exp(logs)
    return torch.complex(
        -torch.expm1(logs) + 2 * m * torch.sin(angle / 2) ** 2, -m * torch.sin(angle)
    )


def _stein(A: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """X = A X A^H + Q for a stable A, by its Schur form, refined once, residual checked."""
    from scipy.linalg import schur

    T, U, *_ = schur(A, output="complex")
    X = _on_schur(T, U, Q)
    X = X + _on_schur(T, U, Q - (X - A @ X @ A.conj().T))
    X = (X + X.conj().T) / 2
    X = X if np.iscomplexobj(A) else X.real
    gap = np.linalg.norm(X - A @ X @ A.conj().T - Q)
    size = np.linalg.norm(X) * (1 + np.linalg.norm(A, 2) ** 2) if A.size else 0.0
    if not gap <= RESIDUAL * size:
        raise DsfValueError(
            f"dsf.gramian: A: expected a residual below {RESIDUAL:g}, got {gap / size:.3g}; the "
            f"spectral radius is too near 1. Use a finite horizon instead."
        )
    return X


def _on_schur(T: np.ndarray, U: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """The same for A = U T U^H, T triangular: columns from the last to the first."""
    from scipy.linalg import solve_triangular

    n = T.shape[0]
    G = U.conj().T @ Q @ U
    X = np.zeros_like(G)
    for j in range(n - 1, -1, -1):
        known = G[:, j] + T @ (X[:, j + 1 :] @ T[j, j + 1 :].conj())
        X[:, j] = solve_triangular(np.eye(n) - T[j, j].conj() * T, known)
    return U @ X @ U.conj().T
