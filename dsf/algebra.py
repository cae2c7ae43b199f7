"""Systems made of systems: series, parallel, skip, change of basis, cuts and joins in time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsf.errors import DsfShapeError
from dsf.recurrence import Recurrence
from dsf.transitions import Dense, Diagonal
from dsf.transitions._base import mm
from dsf.wrappers import Anticausal, Bidirectional, Gated, anticausal, gated

__all__ = [
    "Anticausal", "Bidirectional", "Gated", "anticausal", "change_of_basis", "concatenate_time",
    "gated", "parallel", "realified", "series", "skip", "slice_time",
]  # fmt: skip


def series(later: Recurrence, earlier: Recurrence) -> Recurrence:
    """`later` applied to the output of `earlier`: its map is the product of the two maps.

        A = [[A1, 0], [B2 C1 A1, A2]],  B = [B1; B2 (C1 B1 + D1)],  C = [D2 C1, C2],  D = D2 D1

    with 1 the earlier and 2 the later. States add; the transition is dense. Raises DsfShapeError
    unless the output of the earlier fits the input of the later.
    """
    if earlier.n_output != later.n_input:
        raise DsfShapeError(
            f"dsf.series: later: expected input={earlier.n_output}, got {later.n_input}; the "
            f"earlier system's output fixes it."
        )
    one, two, lead = _common(earlier, later)
    A1, A2 = _full(one.A.as_dense(), lead), _full(two.A.as_dense(), lead)
    through = mm(two.B, one.C)
    lower = mm(through, A1)
    upper = lower.new_zeros(*lead, one.n_state, two.n_state)
    A = torch.cat([_cat(A1, upper, -1), _cat(lower, A2, -1)], dim=-2)
    direct = mm(one.C, one.B) + (0 if one.D is None else one.D)
    B = _cat(one.B, mm(two.B, direct), -2)
    D2C1 = mm(two.D, one.C) if two.D is not None else torch.zeros_like(
        mm(two.C.new_zeros(*two.C.shape[:-1], one.C.shape[-2]), one.C))  # fmt: skip
    C = _cat(D2C1, two.C, -1)
    D = None if one.D is None or two.D is None else mm(two.D, one.D)
    h0 = _stack_states(one, two)
    return Recurrence(
        Dense(A), B, C, D, h0, system=f"series({later.system}, {earlier.system})",
        gauge="stacked", mode=_mode(later, earlier),
    )  # fmt: skip


def parallel(a: Recurrence, b: Recurrence) -> Recurrence:
    """The sum of two systems on the same input: states stacked, maps added.

    Diagonal with diagonal stays diagonal; anything else becomes block-structured dense.
    """
    if (a.n_input, a.n_output) != (b.n_input, b.n_output):
        raise DsfShapeError(
            f"dsf.parallel: b: expected input={a.n_input}, output={a.n_output}, got "
            f"input={b.n_input}, output={b.n_output}."
        )
    a, b, lead = _common(a, b)
    B, C = _cat(a.B, b.B, -2), _cat(a.C, b.C, -1)
    D = b.D if a.D is None else a.D if b.D is None else a.D + b.D
    if isinstance(a.A, Diagonal) and isinstance(b.A, Diagonal):
        A = Diagonal.from_decay(_cat(a.A.decay(), b.A.decay(), -1))
    else:
        A1, A2 = _full(a.A.as_dense(), lead), _full(b.A.as_dense(), lead)
        zero = A1.new_zeros(*lead, a.n_state, b.n_state)
        A = Dense(torch.cat([_cat(A1, zero, -1), _cat(zero.mT, A2, -1)], dim=-2))
    return Recurrence(
        A, B, C, D, _stack_states(a, b), system=f"parallel({a.system}, {b.system})",
        gauge="stacked", mode=_mode(a, b),
    )  # fmt: skip


def skip(recurrence: Recurrence, gain: float = 1.0) -> Recurrence:
    """The system plus `gain` times its input (a residual connection): D grows by gain I."""
    r = recurrence
    if r.n_input != r.n_output:
        raise DsfShapeError(
            f"dsf.skip: expected as many outputs as inputs, got {r.n_output} and {r.n_input}."
        )
    eye = gain * torch.eye(r.n_input, dtype=r.dtype.to_real(), device=r.device)
    return r.replace(D=eye[None, None, None] if r.D is None else r.D + eye)


def change_of_basis(recurrence: Recurrence, basis: Tensor) -> Recurrence:
    """The same system in states T_t h_t: its map does not change, its A_t does.

        A'_t = T_t A_t T_{t-1}^{-1},   B'_t = T_t B_t,   C'_t = C_t T_t^{-1},   h'_0 = T_0 h_0

    basis: (batch, time + 1, head, state, state) for T_0..T_L, or with time of size 1 for one T.
    Source: Sieber et al. (2024); eigenvalues of A_t belong to the basis, not to the map.
    """
    r = recurrence.dense_factors()
    n, length = r.n_state, r.length
    if basis.ndim != 5 or basis.shape[-2:] != (n, n) or basis.shape[1] not in (1, length + 1):
        raise DsfShapeError(
            f"dsf.change_of_basis: basis: expected axes (batch, time={length + 1} or 1, head, "
            f"state={n}, state={n}), got {tuple(basis.shape)}."
        )
    fixed = basis.shape[1] == 1
    now, before = (basis, basis) if fixed else (basis[:, 1:], basis[:, :-1])
    inverse, inverse_before = torch.linalg.inv(now), torch.linalg.inv(before)
    A = Dense(mm(mm(now, r.A.as_dense().to(r.device)), inverse_before))
    h0 = None if r.initial_state is None else mm(basis[:, 0], r.initial_state)
    return r.replace(A=A, B=mm(now, r.B), C=mm(r.C, inverse), initial_state=h0, gauge="changed")


def realified(recurrence: Recurrence) -> Recurrence:
    """A complex system with real input as a real one of twice the states (real, imaginary).

    Re(C h) = [Re C, -Im C] [Re h; Im h]; a multiplication by a becomes [[Re a, -Im a], [Im a, Re a]].
    """
    r = recurrence.dense_factors()
    A = r.A.as_dense()
    A = A if A.is_complex() else A.to(A.dtype.to_complex())
    top = torch.cat([A.real, -A.imag], -1)
    A = Dense(torch.cat([top, torch.cat([A.imag, A.real], -1)], -2))
    B, C = (x if x.is_complex() else x.to(x.dtype.to_complex()) for x in (r.B, r.C))
    h0 = r.initial_state
    if h0 is not None:
        h0 = torch.cat([h0.real, h0.imag if h0.is_complex() else torch.zeros_like(h0)], -2)
    return r.replace(
        A=A, B=torch.cat([B.real, B.imag], -2), C=torch.cat([C.real, -C.imag], -1),
        initial_state=h0, real_output=False, gauge="real and imaginary parts",
    )  # fmt: skip


def slice_time(recurrence: Recurrence, start: int, stop: int) -> Recurrence:
    """Steps start..stop-1 (0-based), starting from a zero state unless start is 0."""
    if not 0 <= start <= stop <= recurrence.length:
        raise DsfShapeError(
            f"dsf.slice_time: expected 0 <= start <= stop <= {recurrence.length}, got {start}, {stop}."
        )
    return recurrence.time_slice(start, stop)


def concatenate_time(parts: Sequence[Recurrence]) -> Recurrence:
    """One system that runs the parts one after another, carrying the state on.

    The parts share state size and structure (else their transitions widen to dense); the initial
    state is the first part's.
    """
    if not parts:
        raise DsfShapeError("dsf.concatenate_time: parts: expected at least one, got none.")
    parts = [p.dense_factors() for p in parts]
    batch = max(p.lead_shape()[0] for p in parts)
    head = max(p.lead_shape()[2] for p in parts)

    def join(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        return torch.cat(
            [x.expand(batch, n, head, *x.shape[3:])
             for x, n in zip(tensors, lengths, strict=True)], dim=1)  # fmt: skip

    lengths = [p.length for p in parts]
    same = len({type(p.A) for p in parts}) == 1 and len(
        {tuple(x is None for x in vars(p.A).values()) for p in parts}) == 1  # fmt: skip
    if same:
        tensors = iter(
            [join(ts, lengths) for ts in zip(*(p.A.tensors() for p in parts), strict=True)]
        )
        A = parts[0].A.map_tensors(lambda _: next(tensors))
    else:
        A = Dense(join([p.A.as_dense().to(p.dtype) for p in parts], lengths))
    D = None
    if any(p.D is not None for p in parts):
        shape = next(p.D for p in parts if p.D is not None).shape[3:]
        D = join([p.B.new_zeros(1, 1, 1, *shape) if p.D is None else p.D for p in parts], lengths)
    return parts[0].replace(
        A=A, B=join([p.B for p in parts], lengths), C=join([p.C for p in parts], lengths), D=D
    )


# -- helpers -----------------------------------------------------------------------------------


def _common(a: Recurrence, b: Recurrence) -> tuple[Recurrence, Recurrence, tuple[int, ...]]:
    """Dense factors, real form where only one is complex, one dtype, and the common lead shape."""
    a, b = a.dense_factors(), b.dense_factors()
    if a.real_output or b.real_output:
        a = realified(a) if a.dtype.is_complex else a
        b = realified(b) if b.dtype.is_complex else b
    lead = torch.broadcast_shapes(a.lead_shape(), b.lead_shape())
    return a, b, tuple(lead)


def _full(x: Tensor, lead: Sequence[int]) -> Tensor:
    return x.expand(*lead, *x.shape[-2:])


def _cat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    own = a.ndim + dim if dim < 0 else dim
    lead = torch.broadcast_shapes(
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
        return given.new_zeros(*given.shape[:2], r.n_state, given.shape[3])

    return _cat(state(a), state(b), -2)


def _mode(a: Recurrence, b: Recurrence) -> str:
    return a.mode if a.mode == b.mode or b.mode == "exact" else b.mode
