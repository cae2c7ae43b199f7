"""Fewer states: balanced and sequential truncation of a recurrence, with errors and bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dsf.algebra import parallel
from dsf.errors import DsfValueError
from dsf.hankel import UNIT
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.state_factors import at, plain, reached_factors, seen_factors, stationary_factors
from dsf.transitions import Dense
from dsf.transitions._base import mm

Method = Literal["balanced", "sequential"]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a reduction kept and lost, each (batch, head) but n_state (batch, head, time).

    Fields
    ------
    error: ||E||_F of E = map - its reduction, exact; of a time-invariant system the root of the
        energy of E's impulse response.
    norm: the same of the map itself.
    n_state: states kept at every step.
    lower_bound: max_t sqrt(sum_{k>n_t} sigma_k(t)^2): no system with these sizes does better.
    upper_bound: sqrt(sum_t sum_{k>n_t} sigma_k(t)^2); "sequential" is never above it. The two
        say nothing of a time-invariant system: 0 and infinity.
    spectral_bound: 2 sum_k sup_t sigma_k(t) over what was discarded. Balanced truncation of a
        time-invariant system never exceeds it in spectral norm, nor of a time-varying one whose
        discarded values are constant or monotone in time; otherwise it is a guide.
    """

    error: Tensor
    norm: Tensor
    n_state: Tensor
    lower_bound: Tensor
    upper_bound: Tensor
    spectral_bound: Tensor
    method: Method


def reduce(
    recurrence: Recurrence,
    states: int | Sequence[int] | None = None,
    tol: float | None = None,
    *,
    method: Method | None = None,
    max_memory: int | None = None,
) -> tuple[Recurrence, Reduction]:
    """The same system with fewer states, and what that costs; no length x length array.

    balanced:    O_t L_t = U S V^H,  T_t = S^{-1/2} U^H O_t,  T_t^+ = L_t V S^{-1/2},
                 A'_t = T_t A_t T_{t-1}^+,  B'_t = T_t B_t,  C'_t = C_t T_t^+
    sequential:  O_t [A_t R_{t-1}, B_t] = U S Z^H,  [A'_t B'_t] = Z_k^H,
                 R_t = [A_t R_{t-1}, B_t] Z_k,  C'_t = C_t R_t

    with L_t L_t^H and O_t^H O_t the reachability and observability Gramians (own output counted),
    kept as triangular factors; S at step t holds the singular values of map[t:, :t] (1-based,
    ends included), those of the already reduced past if sequential. D stays.

    Parameters
    ----------
    recurrence: time-varying, or time-invariant and stable (time of size 1: balanced over all
        time). Complex ones with `real_output` become real, of twice the states.
    states: so many at most, one number or one a step. A cut where alone states are dropped gets
        the best approximation of its block that there is (Eckart and Young).
    tol: instead: as few as keep ||E||_F <= tol ||map||_F, certified. Sequential: what a step
        loses is orthogonal to what the others lose, so that the sum is known while computing.
    method: "balanced" by default with states, "sequential" with tol.

    Returns the reduced recurrence (dense A, sizes that vary padded with zeros) and a `Reduction`.
    Cost O(length state^3) time, O(length state^2) memory. Raises DsfValueError on impossible
    options, an initial state, or an unstable time-invariant system; DsfMemoryError before what
    would not fit. Source: Moore (1981); Dewilde and van der Veen (1998); Sandberg and Rantzer
    (2004) for the bounds.
    """
    r, sizes, used = _checked(recurrence, states, tol, method)
    if r.length == 1:
        return _reduce_stationary(r, sizes[0], tol)
    batch, length, head = r.lead_shape()
    n = r.n_state
    require_memory(
        "dsf.reduce", "factors", ("part", "batch", "time", "head", "state", "state"),
        (3, batch, length, head, n, n), r.dtype, device=r.device, max_memory=max_memory,
        advice="Reduce stretches of it made by dsf.slice_time.",
    )  # fmt: skip
    seen = list(seen_factors(r, length, strict=False))[::-1]
    reached = list(reached_factors(r, length))
    sigma = torch.stack([torch.linalg.svdvals(mm(o, f)) for o, f in zip(seen, reached,
                         strict=True)], 2)  # (batch, head, time, state)  # fmt: skip
    norm = _frobenius(r, reached)
    if used == "balanced":
        A, B, C, kept = _balanced(r, seen, reached, sizes)
    else:
        budget = None if tol is None else (tol * norm) ** 2
        A, B, C, kept = _sequential(r, seen, sizes, budget)
    width = max(1, int(kept.amax()))
    gauge = "balanced" if used == "balanced" else "input-normal"
    small = Recurrence(
        Dense(A[..., :width, :width]), B[..., :width, :], C[..., :width], r.D,
        system=r.system, mode=r.mode, gauge=gauge,
    )  # fmt: skip
    return small, _report(r, small, norm, sigma, kept, used)


def balance(recurrence: Recurrence, *, max_memory: int | None = None) -> Recurrence:
    """The same map in balanced states: at every step both Gramians are one diagonal matrix.

    The diagonal holds the step's Hankel singular values (own output counted); states that are not
    reached or not seen, up to rounding, are dropped. Cost, errors: as `dsf.reduce`.
    """
    return reduce(recurrence, recurrence.n_state * 2, max_memory=max_memory)[0]


# -- the two ways ------------------------------------------------------------------------------


def _balanced(
    r: Recurrence, seen: list[Tensor], reached: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    down, up, kept = [], [], []
    for o, f, most in zip(seen, reached, sizes, strict=True):
        T, back, n = _projection(o, f, most)
        down.append(T)
        up.append(back)
        kept.append(n)
    T, back = torch.stack(down, 1), torch.stack(up, 1)
    before = torch.cat([torch.zeros_like(back[:, :1]), back[:, :-1]], 1)
    B, C = r.dense_input_output()
    A = mm(mm(T, r.dense_transition()), before)
    return A, mm(T, B), mm(C, back), torch.stack(kept, -1)


def _projection(o: Tensor, f: Tensor, most: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T = S^{-1/2} U^H O and its inverse L V S^{-1/2}, cut to `most` states above rounding."""
    U, sigma, Vh = torch.linalg.svd(mm(o, f))
    noise = sigma.shape[-1] * UNIT * torch.linalg.matrix_norm(o) * torch.linalg.matrix_norm(f)
    most = torch.as_tensor(most, device=sigma.device)
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    used = (sigma > noise[..., None]) & (index < most[..., None])
    root = torch.where(used, sigma, 1.0).rsqrt() * used
    T = root[..., :, None] * mm(U.mH, o)
    return T, mm(f, Vh.mH) * root[..., None, :], used.sum(-1)


def _sequential(
    r: Recurrence, seen: list[Tensor], sizes: list[int], budget: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, head = r.lead_shape()
    n = r.n_state
    R = r.A.at(0).apply(torch.zeros(batch, head, n, n, dtype=r.dtype, device=r.device))
    R = R.to(r.dtype)
    lost = torch.zeros(batch, head, dtype=torch.float64, device=r.device)
    steps, kept = [], []
    index = torch.arange(n, device=r.device)
    for t in range(length):
        written = at(r.B, t).to(r.dtype).expand(batch, head, n, -1)
        carried = torch.cat([r.A.at(t).apply(R).to(r.dtype), written], -1)
        _, sigma, Zh = torch.linalg.svd(mm(seen[t], carried), full_matrices=False)
        noise = n * UNIT * torch.linalg.matrix_norm(seen[t]) * torch.linalg.matrix_norm(carried)
        tails = torch.flip(torch.cumsum(torch.flip(sigma**2, (-1,)), -1), (-1,))
        count = (sigma > noise[..., None]).sum(-1).clamp(max=sizes[t])
        if budget is not None:
            room = (budget - lost).clamp(min=0) * (1 - 1e-12)
            count = torch.minimum(count, (tails > room[..., None]).sum(-1))
        used = index < count[..., None]
        lost = lost + (sigma**2 * ~used).sum(-1)
        Z = Zh * used[..., None]
        R = mm(carried, Z.mH)
        steps.append((Z[..., :n], Z[..., n:], mm(at(r.C, t), R)))
        kept.append(count)
    A, B, C = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return A, B, C, torch.stack(kept, -1)


def _reduce_stationary(
    r: Recurrence, states: int, tol: float | None
) -> tuple[Recurrence, Reduction]:
    reached, seen = stationary_factors(r)
    sigma = torch.linalg.svdvals(mm(seen, reached))[:, :, None]
    norm = _frobenius(r, [reached])
    B, C = r.dense_input_output()
    most = torch.full(norm.shape, states if tol is None else 0, device=r.device)
    while True:
        T, back, kept = _projection(seen, reached, most)
        A = mm(mm(T[:, None], r.dense_transition()), back[:, None])
        width = max(1, int(kept.amax()))
        small = Recurrence(
            Dense(A[..., :width, :width]), mm(T[:, None], B)[..., :width, :],
            mm(C, back[:, None])[..., :width], r.D, system=r.system, mode=r.mode,
            gauge="balanced",
        )  # fmt: skip
        found = _report(r, small, norm, sigma, kept[..., None], "balanced")
        short = found.error > (math.inf if tol is None else tol) * norm
        if not bool((short & (most < r.n_state)).any()):
            return small, found
        most = most + (short & (most < r.n_state)).long()


# -- figures -----------------------------------------------------------------------------------


def _report(
    r: Recurrence, small: Recurrence, norm: Tensor, sigma: Tensor, kept: Tensor, method: Method
) -> Reduction:
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    dropped = sigma * (index >= kept[..., None])
    tails = (dropped**2).sum(-1)
    stationary = r.length == 1
    return Reduction(
        map_distance(r, small), norm, kept,
        torch.zeros_like(norm) if stationary else tails.amax(-1).sqrt(),
        torch.full_like(norm, math.inf) if stationary else tails.sum(-1).sqrt(),
        2 * dropped.amax(-2).sum(-1), method,
    )  # fmt: skip


def map_distance(a: Recurrence, b: Recurrence) -> Float[Tensor, "batch head"]:
    """||map of a - map of b||_F from the states, (batch, head), to rounding of the larger one.

    The difference is a system of both states; row t of its map has the norm of C_t L_t, L_t the
    triangular factor of the states reached. Time-invariant systems: the root of the energy of the
    difference's impulse response. Cost O(length (n_a + n_b)^3).
    """
    a, b = plain(a), plain(b)
    D = None if b.D is None else -b.D
    gap = parallel(a, b.replace(C=-b.dense_input_output()[1], D=D))
    if gap.length == 1:
        return _frobenius(gap, [stationary_factors(gap)[0]])
    return _frobenius(gap, list(reached_factors(gap, gap.length)))


def _frobenius(r: Recurrence, reached: list[Tensor]) -> Tensor:
    """sqrt(sum_t ||C_t A_t L_{t-1}||^2 + ||C_t B_t + D_t||^2)."""
    total = torch.zeros(reached[0].shape[:2], dtype=torch.float64, device=r.device)
    for t, factor in enumerate(reached):
        if r.D is None:
            total = total + torch.linalg.matrix_norm(mm(at(r.C, t), factor)) ** 2
            continue
        earlier = factor if len(reached) == 1 and r.length == 1 else (
            reached[t - 1] if t else torch.zeros_like(factor))  # fmt: skip
        past = mm(at(r.C, t), r.A.at(t).apply(earlier).to(factor.dtype))
        own = mm(at(r.C, t), at(r.B, t)) + at(r.D, t)
        total = total + torch.linalg.matrix_norm(past) ** 2 + torch.linalg.matrix_norm(own) ** 2
    return total.sqrt()


def _checked(
    recurrence: Recurrence, states: int | Sequence[int] | None, tol: float | None,
    method: Method | None,
) -> tuple[Recurrence, list[int], Method]:  # fmt: skip
    if (states is None) == (tol is None):
        raise DsfValueError(
            f"dsf.reduce: states, tol: expected one of the two, got states={states}, tol={tol}."
        )
    if tol is not None and not 0 <= tol < 1:
        raise DsfValueError(f"dsf.reduce: tol: expected in [0, 1), got {tol}.")
    used: Method = method or ("balanced" if tol is None else "sequential")
    fixed = recurrence.length == 1
    fits = method is None or (method == "balanced" and (fixed or tol is None)) or (
        method == "sequential" and not fixed)  # fmt: skip
    if not fits:
        raise DsfValueError(
            f"dsf.reduce: method: expected 'balanced' for a time-invariant system, 'sequential' "
            f"for tol of any other, or either for states, got {method!r}."
        )
    length = recurrence.length
    sizes = [states] * length if isinstance(states, int) else list(states or [])
    sizes = [2 * recurrence.n_state] * length if states is None else sizes
    if len(sizes) != length or any(n < 0 for n in sizes):
        raise DsfValueError(
            f"dsf.reduce: states: expected one number or {length} of them, none negative, got "
            f"{states}; the recurrence fixes the length."
        )
    if recurrence.initial_state is not None:
        raise DsfValueError(
            "dsf.reduce: initial_state: expected None, got one, which no truncation of states "
            "accounts for. Replace it by None."
        )
    r = plain(recurrence)
    return r, sizes, used
