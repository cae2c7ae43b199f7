"""Fewer states: balanced and sequential truncation of a recurrence, with errors and bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from dsf.errors import DsfTypeError, DsfValueError
from dsf.map_distances import map_distance, map_norm
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.state_factors import (
    at,
    initial_columns,
    plain,
    reached_factors,
    seen_factors,
    stationary_factors,
    triangle,
)
from dsf.transitions._base import mm
from dsf.truncations import (
    Kept,
    balanced_steps,
    disjoint_halves,
    dropped_values,
    projection,
    sequential_steps,
)
from dsf.wrappers import Anticausal, Bidirectional, recurrences

Method = Literal["balanced", "sequential"]
Reducible = TypeVar("Reducible", Recurrence, Anticausal, Bidirectional)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a reduction kept and lost, each (batch, head) but n_state (batch, head, time).

    Fields
    ------
    error: ||E||_F of E = map - its reduction, exact; of a time-invariant system the root of the
        energy of E's impulse response. An initial state counts as one more input before the first
        step, one for each of its channels.
    norm: the same of the map itself.
    n_state: states kept at every step; of a bidirectional system in both directions together.
    lower_bound: max_t sqrt(sum_{k>n_t} sigma_k(t)^2): no system with these sizes does better.
    upper_bound: sqrt(sum_t sum_{k>n_t} sigma_k(t)^2); "sequential" is never above it. The two
        say nothing of a time-invariant system: 0 and infinity.
    spectral_bound: 2 sum_k sup_t sigma_k(t) over what was discarded. Balanced truncation of a
        time-invariant system never exceeds it in spectral norm, nor of a time-varying one whose
        discarded values are constant or monotone in time; otherwise, and without the diagonal
        (strict), it is a guide.

    The halves of a bidirectional system share no entry of the map: squares add up, spectral
    bounds too.
    """

    error: Tensor
    norm: Tensor
    n_state: Tensor
    lower_bound: Tensor
    upper_bound: Tensor
    spectral_bound: Tensor
    method: Method


def reduce(
    recurrence: Reducible,
    states: int | Sequence[int] | None = None,
    tol: float | None = None,
    *,
    method: Method | None = None,
    max_memory: int | None = None,
) -> tuple[Reducible, Reduction]:
    """The same system with fewer states, and what that costs; no length x length array.

    balanced:    O_t L_t = U S V^H,  T_t = S^{-1/2} U^H O_t,  T_t^+ = L_t V S^{-1/2},
                 A'_t = T_t A_t T_{t-1}^+,  B'_t = T_t B_t,  C'_t = C_t T_t^+
    sequential:  O_t [A_t R_{t-1}, B_t] = U S Z^H,  [A'_t B'_t] = Z_k^H,
                 R_t = [A_t R_{t-1}, B_t] Z_k,  C'_t = C_t R_t

    with L_t L_t^H and O_t^H O_t the reachability and observability Gramians (own output counted),
    kept as triangular factors; S at step t holds the singular values of map[t:, :t] (1-based,
    ends included), those of the already reduced past if sequential. D stays. An initial state h_0
    is what an input before the first step has written: L_0 L_0^H = h_0 h_0^H, h'_0 = T_0 h_0
    (sequential: the same decomposition of O_0 h_0).

    Parameters
    ----------
    recurrence: time-varying, or time-invariant and stable (time of size 1: balanced over all
        time). Complex ones with `real_output` become real, of twice the states. An Anticausal
        is reduced in its own order of time; a Bidirectional in both directions, after the
        diagonal of the later half has been moved to D of the causal one.
    states: so many at most, one number or one a step (of a bidirectional system: in each
        direction). A cut where alone states are dropped gets the best approximation of its block
        that there is (Eckart and Young).
    tol: instead: as few as keep ||E||_F <= tol ||map||_F, certified. Sequential: what a step
        loses is orthogonal to what the others lose, so that the sum is known while computing.
    method: "balanced" by default with states, "sequential" with tol.

    Returns the reduced system (dense A, sizes that vary padded with zeros) and a `Reduction`.
    Cost O(length state^3) time, O(length state^2) memory. Raises DsfTypeError on gated systems,
    DsfValueError on impossible options or an unstable time-invariant system; DsfMemoryError
    before what would not fit. Source: Moore (1981); Dewilde and van der Veen (1998); Sandberg and
    Rantzer (2004) for the bounds; Heinkenschloss et al. (2011) for initial states.
    """
    if isinstance(recurrence, Recurrence | Anticausal | Bidirectional):
        for r in recurrences(recurrence):
            _require_factors(r, max_memory)
    if isinstance(recurrence, Bidirectional):
        found = _reduce_halves(recurrence, states, tol, method)
    elif isinstance(recurrence, Anticausal):
        found = _reduce_later(recurrence, states, tol, method)
    elif isinstance(recurrence, Recurrence):
        found = _reduce_one(recurrence, states, tol, method)
    else:
        raise DsfTypeError(
            f"dsf.reduce: recurrence: expected a Recurrence, Anticausal or Bidirectional, got "
            f"{type(recurrence).__name__}. Reduce what is inside a gate and gate the result."
        )
    return cast("tuple[Reducible, Reduction]", found)


def balance(recurrence: Recurrence, *, max_memory: int | None = None) -> Recurrence:
    """The same map in balanced states: at every step both Gramians are one diagonal matrix.

    The diagonal holds the step's Hankel singular values (own output counted); states that are not
    reached or not seen, up to rounding, are dropped. Cost, errors: as `dsf.reduce`.
    """
    return reduce(recurrence, recurrence.n_state * 2, max_memory=max_memory)[0]


# -- the two directions ------------------------------------------------------------------------


def _reduce_halves(
    system: Bidirectional, states: int | Sequence[int] | None, tol: float | None,
    method: Method | None,
) -> tuple[Bidirectional, Reduction]:  # fmt: skip
    """Both halves apart, each within tol / sqrt 2 of the norm of the whole map."""
    causal, later = disjoint_halves(system)
    sizes = max(causal.length, later.recurrence.length)
    _check(sizes, states, tol, method)
    limit = None
    if tol is not None:
        norms = map_norm(causal), map_norm(later.recurrence.flip_time(), strict=True)
        limit = tol * torch.hypot(*norms) / math.sqrt(2)
    one, first = _reduce_one(causal, states, tol, method, limit)
    two, second = _reduce_later(later, states, tol, method, limit)
    both = {
        name: torch.hypot(getattr(first, name), getattr(second, name))
        for name in ("error", "norm", "lower_bound", "upper_bound")
    }
    return Bidirectional(one, two), Reduction(
        **both, n_state=first.n_state + second.n_state, method=first.method,
        spectral_bound=first.spectral_bound + second.spectral_bound,
    )  # fmt: skip


def _reduce_later(
    system: Anticausal, states: int | Sequence[int] | None, tol: float | None,
    method: Method | None, limit: Tensor | None = None,
) -> tuple[Anticausal, Reduction]:  # fmt: skip
    """In the order in which it runs, and back."""
    given = states if states is None or isinstance(states, int) else list(states)[::-1]
    r = system.recurrence.flip_time()
    small, found = _reduce_one(r, given, tol, method, limit, strict=system.strict)
    turned = dataclasses.replace(found, n_state=found.n_state.flip(-1))
    return Anticausal(small.flip_time(), system.strict), turned


# -- one direction -----------------------------------------------------------------------------


def _reduce_one(
    recurrence: Recurrence, states: int | Sequence[int] | None, tol: float | None,
    method: Method | None, limit: Tensor | None = None, *,
    strict: bool = False,
) -> tuple[Recurrence, Reduction]:  # fmt: skip
    """`limit`: the error that `tol` allows, tol ||map||_F unless given. `strict`: no diagonal."""
    sizes, used = _check(recurrence.length, states, tol, method)
    r = plain(recurrence)
    sizes = [2 * recurrence.n_state] * r.length if sizes is None else sizes
    norm = map_norm(r, strict=strict)
    if tol is not None and limit is None:
        limit = tol * norm
    if r.length == 1:
        return _reduce_stationary(r, sizes[0], limit, norm, strict)
    length = r.length
    start, first = initial_columns(r)
    seen = list(seen_factors(r, length, strict=False))[::-1]
    before = r.A.at(0).apply_transposed(seen[0].mT).mT.to(r.dtype).expand(seen[0].shape)
    seen = [triangle(before, r.n_state), *seen]
    reached = [first, *reached_factors(r, length, first)]
    if used == "balanced":
        kept = balanced_steps(r, seen, reached, sizes, start)
    else:
        kept = sequential_steps(r, seen, sizes, None if limit is None else limit**2, start)
    small = kept.recurrence(r, "balanced" if used == "balanced" else "input-normal")
    blocks = [mm(o, f) for o, f in zip(seen, reached, strict=True)]
    sigma = torch.stack([torch.linalg.svdvals(x) for x in blocks], 2)  # step 0 is h_0's
    sizes_kept = kept.n_state
    n_start = torch.zeros_like(norm, dtype=torch.long) if kept.n_start is None else kept.n_start
    dropped = dropped_values(sigma, torch.cat([n_start[..., None], sizes_kept], -1))
    certain = dropped
    if strict:  # the diagonal need not be carried
        passed = [mm(o, f) for o, f in zip([*list(seen_factors(r, length, strict=True))[::-1]],
                                           reached[1:], strict=True)]  # fmt: skip
        sigma = torch.stack([torch.linalg.svdvals(x) for x in passed], 2)
        certain = dropped_values(sigma, sizes_kept)
    return small, Reduction(
        map_distance(r, small, strict=strict), norm, sizes_kept,
        (certain**2).sum(-1).amax(-1).sqrt(), (dropped**2).sum((-2, -1)).sqrt(),
        2 * dropped.amax(-2).sum(-1), used,
    )  # fmt: skip


def _reduce_stationary(
    r: Recurrence, states: int, limit: Tensor | None, norm: Tensor, strict: bool
) -> tuple[Recurrence, Reduction]:
    start, _ = initial_columns(r)
    B, C = r.dense_input_output()
    batch, _, head = r.lead_shape()
    written = at(B, 0).to(r.dtype).expand(batch, head, r.n_state, -1)
    written = written if start is None else torch.cat([written, start], -1)
    whole = r.replace(B=written[:, None], D=None, initial_state=None)
    reached, seen = stationary_factors(whole)
    sigma = torch.linalg.svdvals(mm(seen, reached))[:, :, None]
    most = torch.full(norm.shape, states if limit is None else 0, device=r.device)
    while True:
        T, back, kept = projection(seen, reached, most)
        A = mm(mm(T[:, None], r.dense_transition()), back[:, None])
        first = None if start is None else mm(T, start)
        steps = Kept(A, mm(T[:, None], B), mm(C, back[:, None]), kept[..., None], first, kept)
        small = steps.recurrence(r, "balanced")
        error = map_distance(r, small, strict=strict)
        short = error > (torch.full_like(error, math.inf) if limit is None else limit)
        if not bool((short & (most < r.n_state)).any()):
            dropped = dropped_values(sigma, kept[..., None])
            return small, Reduction(
                error, norm, kept[..., None], torch.zeros_like(norm),
                torch.full_like(norm, math.inf), 2 * dropped.amax(-2).sum(-1), "balanced",
            )  # fmt: skip
        most = most + (short & (most < r.n_state)).long()


# -- checks ------------------------------------------------------------------------------------


def _require_factors(recurrence: Recurrence, max_memory: int | None) -> None:
    """Refuse a system whose factors do not fit, before anything is made of it."""
    paired = recurrence.real_output and recurrence.dtype.is_complex
    n = recurrence.n_state * (2 if paired else 1)
    batch, length, head = recurrence.lead_shape()
    double = torch.promote_types(recurrence.dtype, torch.float64)
    require_memory(
        "dsf.reduce", "factors", ("part", "batch", "time", "head", "state", "state"),
        (3, batch, length, head, n, n), double, device=recurrence.device, max_memory=max_memory,
        advice="Reduce stretches of it made by dsf.slice_time.",
    )  # fmt: skip


def _check(
    length: int, states: int | Sequence[int] | None, tol: float | None, method: Method | None
) -> tuple[list[int] | None, Method]:
    if (states is None) == (tol is None):
        raise DsfValueError(
            f"dsf.reduce: states, tol: expected one of the two, got states={states}, tol={tol}."
        )
    if tol is not None and not 0 <= tol < 1:
        raise DsfValueError(f"dsf.reduce: tol: expected in [0, 1), got {tol}.")
    used: Method = method or ("balanced" if tol is None else "sequential")
    fixed = length == 1
    fits = method is None or (method == "balanced" and (fixed or tol is None)) or (
        method == "sequential" and not fixed)  # fmt: skip
    if not fits:
        raise DsfValueError(
            f"dsf.reduce: method: expected 'balanced' for a time-invariant system, 'sequential' "
            f"for tol of any other, or either for states, got {method!r}."
        )
    sizes = [states] * length if isinstance(states, int) else states
    if sizes is not None and (len(sizes) != length or any(n < 0 for n in sizes)):
        raise DsfValueError(
            f"dsf.reduce: states: expected one number or {length} of them, none negative, got "
            f"{states}; the recurrence fixes the length."
        )
    return None if sizes is None else list(sizes), used
