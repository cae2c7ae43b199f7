"""Systems made of systems: series, parallel, skip, change of basis, cuts and joins in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.errors import DsfShapeError, DsfTypeError
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact, broadcast_shapes
from dsf.transitions import Decay, Dense, Diagonal, Identity, Scalar, Transition
from dsf.transitions._base import complex_dtype, mm, real_dtype
from dsf.wrappers import Anticausal, Bidirectional, Gated, anticausal, gated

__all__ = [
    "Anticausal", "Bidirectional", "Gated", "anticausal", "change_of_basis", "concatenate_time",
    "gated", "parallel", "realified", "series", "skip", "slice_time",
]  # fmt: skip


Join: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


def series(later: Recurrence, earlier: Recurrence) -> Recurrence:
    """`later` applied to the output of `earlier`: its map is the product of the two maps.

        A = [[A1, 0], [B2 C1 A1, A2]],  B = [B1; B2 (C1 B1 + D1)],  C = [D2 C1, C2],  D = D2 D1

    with 1 the earlier and 2 the later. States add; the transition is dense. Raises DsfShapeError
    unless the output of the earlier fits the input of the later, DsfTypeError when one takes the
    real part of a complex other.
    """
    if earlier.n_output != later.n_input:
        raise DsfShapeError(
            f"dsf.series: later: expected input={earlier.n_output}, got {later.n_input}; the "
            f"earlier system's output fixes it."
        )
    one, two = _comparable("dsf.series", earlier, later)
    (B1, C1), (B2, C2) = one.dense_input_output(), two.dense_input_output()
    A1, A2 = one.dense_transition(), two.dense_transition()
    lower = mm(mm(B2, C1), A1)
    upper = lower.new_zeros(1, 1, 1, one.n_state, two.n_state)
    A = _cat(_cat(A1, upper, -1), _cat(lower, A2, -1), -2)
    direct = mm(C1, B1) if one.D is None else mm(C1, B1) + one.D
    B = _cat(B1, mm(B2, direct), -2)
    read = C1.new_zeros(1, 1, 1, two.n_output, one.n_state) if two.D is None else mm(two.D, C1)
    D = None if one.D is None or two.D is None else mm(two.D, one.D)
    return Recurrence(
        Dense(A), B, _cat(read, C2, -1), D, _stack_states(one, two),
        system=f"series({later.system}, {earlier.system})", gauge="stacked",
        mode=_mode(later, earlier),
    )  # fmt: skip


def parallel(a: Recurrence, b: Recurrence) -> Recurrence:
    """The sum of two systems on the same input: states stacked, maps added.

    Identity, scalar and diagonal transitions give a diagonal one, in logarithms; anything else a
    dense one. Raises DsfShapeError unless inputs and outputs agree, DsfTypeError when one takes
    the real part and the other is complex.
    """
    if (a.n_input, a.n_output) != (b.n_input, b.n_output):
        raise DsfShapeError(
            f"dsf.parallel: b: expected input={a.n_input}, output={a.n_output}, got "
            f"input={b.n_input}, output={b.n_output}; they are fixed by a."
        )
    first, second = _comparable("dsf.parallel", a, b)
    (B1, C1), (B2, C2) = first.dense_input_output(), second.dense_input_output()
    D = b.D if a.D is None else a.D if b.D is None else a.D + b.D
    one, two = _as_diagonal(first), _as_diagonal(second)
    if one is not None and two is not None:
        A: Transition = _join_decays([one, two], lambda xs: _cat(xs[0], xs[1], -1))
    else:
        A1, A2 = first.dense_transition(), second.dense_transition()
        zero = A1.new_zeros(1, 1, 1, first.n_state, second.n_state)
        A = Dense(_cat(_cat(A1, zero, -1), _cat(zero.mT, A2, -1), -2))
    return Recurrence(
        A, _cat(B1, B2, -2), _cat(C1, C2, -1), D, _stack_states(first, second),
        system=f"parallel({a.system}, {b.system})", gauge="stacked", mode=_mode(a, b),
    )  # fmt: skip


def skip(recurrence: Recurrence, gain: float = 1.0) -> Recurrence:
    """The system plus `gain` times its input (a residual connection): D grows by gain I."""
    r = recurrence
    if r.n_input != r.n_output:
        raise DsfShapeError(
            f"dsf.skip: expected as many outputs as inputs, got {r.n_output} and {r.n_input}."
        )
    eye = gain * torch.eye(r.n_input, dtype=real_dtype(r.dtype), device=r.device)
    return r.replace(D=eye[None, None, None] if r.D is None else r.D + eye)


def change_of_basis(recurrence: Recurrence, basis: Inexact[Tensor, "*shape"]) -> Recurrence:
    """The same system in states T_t h_t: its map does not change, its A_t does.

        A'_t = T_t A_t T_{t-1}^{-1},   B'_t = T_t B_t,   C'_t = C_t T_t^{-1},   h'_0 = T_0 h_0

    basis: (batch, time + 1, head, state, state) for T_0..T_L, or with time of size 1 for one T.
    Raises DsfShapeError on other axes. Source: Sieber et al. (2024); eigenvalues of A_t belong
    to the basis, not to the map.
    """
    r = recurrence
    n, length = r.n_state, r.length
    if basis.ndim != 5 or basis.shape[-2:] != (n, n) or basis.shape[1] not in (1, length + 1):
        raise DsfShapeError(
            f"dsf.change_of_basis: basis: expected axes (batch, time={length + 1} or 1, head, "
            f"state={n}, state={n}), got {tuple(basis.shape)}; the recurrence fixes them."
        )
    fixed = basis.shape[1] == 1
    now, before = (basis, basis) if fixed else (basis[:, 1:], basis[:, :-1])
    inverse, inverse_before = torch.linalg.inv(now), torch.linalg.inv(before)
    A = Dense(mm(mm(now, r.dense_transition()), inverse_before))
    B, C = r.dense_input_output()
    h0 = None if r.initial_state is None else mm(basis[:, 0], r.initial_state)
    return r.replace(A=A, B=mm(now, B), C=mm(C, inverse), initial_state=h0, gauge="changed")


def realified(recurrence: Recurrence) -> Recurrence:
    """A complex system with real input as a real one of twice the states (real, imaginary).

        Re(C h) = [Re C, -Im C] [Re h; Im h],    a h -> [[Re a, -Im a], [Im a, Re a]] [Re h; Im h]

    The result gives the real part of the output. Its transition is dense.
    """
    r = recurrence
    A = _complex(r.dense_transition())
    upper, lower = torch.cat([A.real, -A.imag], -1), torch.cat([A.imag, A.real], -1)
    B, C = (_complex(x) for x in r.dense_input_output())
    D = r.D.real if r.D is not None and r.D.is_complex() else r.D
    h0 = r.initial_state
    if h0 is not None:
        h0 = torch.cat([_complex(h0).real, _complex(h0).imag], -2)
    return r.replace(
        A=Dense(torch.cat([upper, lower], -2)), B=torch.cat([B.real, B.imag], -2),
        C=torch.cat([C.real, -C.imag], -1), D=D, initial_state=h0, real_output=False,
        gauge="real and imaginary parts",
    )  # fmt: skip


def slice_time(recurrence: Recurrence, start: int, stop: int) -> Recurrence:
    """Steps start..stop-1 (0-based), starting from a zero state unless start is 0.

    Of a time-invariant system every slice is the system itself. Raises DsfShapeError on steps
    outside.
    """
    if not 0 <= start <= stop <= recurrence.length:
        raise DsfShapeError(
            f"dsf.slice_time: expected 0 <= start <= stop <= {recurrence.length}, got {start} "
            f"and {stop}; the recurrence fixes the length."
        )
    return recurrence.time_slice(start, stop)


def concatenate_time(parts: Sequence[Recurrence]) -> Recurrence:
    """One system that runs the parts one after another, carrying the state on.

    Parts of one structure keep it, others become dense; the initial state is the first part's.
    Raises DsfShapeError unless states, inputs and outputs agree.
    """
    if not parts:
        raise DsfShapeError("dsf.concatenate_time: parts: expected at least one, got none.")
    first = parts[0]
    for p in parts:
        sizes = [(x.n_state, x.n_input, x.n_output, x.real_output) for x in (first, p)]
        if sizes[0] != sizes[1]:
            raise DsfShapeError(
                f"dsf.concatenate_time: parts: expected (state, input, output, real_output) "
                f"{sizes[0]}, got {sizes[1]}; the first part fixes them."
            )
    lead = broadcast_shapes(*((x[0], x[2]) for x in (p.lead_shape() for p in parts)))
    lengths = [p.length for p in parts]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        full = [x.expand(lead[0], n, lead[1], *x.shape[3:])
                for x, n in zip(tensors, lengths, strict=True)]  # fmt: skip
        return torch.cat(full, dim=1)

    B, C = zip(*(p.dense_input_output() for p in parts), strict=True)
    D = next((p.D for p in parts if p.D is not None), None)
    if D is not None:
        D = join([D.new_zeros(1, 1, 1, *D.shape[3:]) if p.D is None else p.D for p in parts])
    return first.replace(A=_join_transitions(parts, join), B=join(B), C=join(C), D=D)


# -- helpers -----------------------------------------------------------------------------------


def _join_transitions(parts: Sequence[Recurrence], join: Join) -> Transition:
    kinds = {type(p.A) for p in parts}
    if len(kinds) == 1 and kinds <= {Scalar, Diagonal}:
        return _join_decays([p.A for p in parts], join)  # type: ignore[misc]
    alike = {(pytree.tree_structure(p.A), tuple(t.shape[3:] for t in p.A.tensors()))
             for p in parts}  # fmt: skip
    if len(alike) > 1:
        return Dense(join([p.dense_transition() for p in parts]))
    joined = iter([join(ts) for ts in zip(*(p.A.tensors() for p in parts), strict=True)])
    return parts[0].A.map_tensors(lambda _: next(joined))


def _join_decays(parts: Sequence[Decay], join: Join) -> Decay:
    """Scalars or diagonals joined along an axis; a missing sign is 1, a missing phase 0."""
    logs = [p.log_decay for p in parts]
    sign = phase = None
    if any(p.sign is not None for p in parts):
        sign = join([torch.ones_like(x) if p.sign is None else p.sign
                     for p, x in zip(parts, logs, strict=True)])  # fmt: skip
    if any(p.phase is not None for p in parts):
        phase = join([torch.zeros_like(x) if p.phase is None else p.phase
                      for p, x in zip(parts, logs, strict=True)])  # fmt: skip
    return dataclasses.replace(parts[0], log_decay=join(logs), sign=sign, phase=phase)


def _as_diagonal(r: Recurrence) -> Diagonal | None:
    A = r.A
    if isinstance(A, Identity):
        zero = torch.zeros(1, 1, 1, dtype=real_dtype(r.dtype), device=r.device)
        A = Scalar(zero, n_state=A.n_state)
    if isinstance(A, Scalar):
        A = A.widen()
    return A if isinstance(A, Diagonal) else None


def _comparable(function: str, a: Recurrence, b: Recurrence) -> tuple[Recurrence, Recurrence]:
    """Systems whose outputs are both as they are: those that take a real part made real."""
    if a.real_output == b.real_output and not a.real_output:
        return a, b
    for r in (a, b):
        if r.dtype.is_complex and not r.real_output:
            raise DsfTypeError(
                f"{function}: expected both systems complex or both real, got {r.system!r} with "
                f"complex output beside one that takes the real part. Use dsf.realified."
            )
    return tuple(realified(r) if r.dtype.is_complex else r.replace(real_output=False)
                 for r in (a, b))  # type: ignore[return-value]  # fmt: skip


def _complex(x: Tensor) -> Tensor:
    return x.to(complex_dtype(x.dtype))


def _cat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    own = a.ndim + dim if dim < 0 else dim
    lead = broadcast_shapes(
        *[[1 if i == own else s for i, s in enumerate(x.shape)] for x in (a, b)])  # fmt: skip

    def spread(x: Tensor) -> Tensor:
        return x.to(dtype).expand(*[x.shape[own] if i == own else s for i, s in enumerate(lead)])

    return torch.cat([spread(a), spread(b)], dim=dim)


def _stack_states(a: Recurrence, b: Recurrence) -> Tensor | None:
    if a.initial_state is None and b.initial_state is None:
        return None
    given = a.initial_state if a.initial_state is not None else b.initial_state
    assert given is not None

    def state(r: Recurrence) -> Tensor:
        if r.initial_state is not None:
            return r.initial_state
        return given.new_zeros(1, 1, r.n_state, 1)

    return _cat(state(a), state(b), -2)


def _mode(a: Recurrence, b: Recurrence) -> str:
    """The weaker of two claims."""
    order = ("exact", "exact_along_trajectory", "linearised")
    known = [m for m in order if m in (a.mode, b.mode)]
    return known[-1] if known else a.mode
