"""The change of basis between two systems of one map, found and checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import sympy
from sympy import Expr, ImmutableMatrix, Matrix, Symbol

from dsf.symbolic._proving import is_proved_zero, rational_form
from dsf.symbolic._systems import SymbolicSystem

Bases = tuple[ImmutableMatrix, ...]


def change_of_basis(a: SymbolicSystem, b: SymbolicSystem) -> Bases | None:
    """T_t of t = 1..length: B~_t = T_t B_t, C_t = C~_t T_t, T_t A_t = A~_t T_{t-1} (t > 1).

    The systems are `a` and (with ~) `b`, of equally many states; None where no T was found, which
    is no proof that there is none. Tried: diagonal T from B and B~; then T_t from n reachable
    states of token n = number of states, carried to the other tokens by the third equation
    (wherever A or A~ has an inverse). Every T returned satisfies all equations, proved; A_1 acts
    on a zero state and has no part. Source: Kailath (1980), for time-varying systems.
    """
    if a.n_state != b.n_state or a.length != b.length or a.length == 0:
        return None
    a, b, meaning = _rational(a, b)
    for search in (_diagonal, _from_reachable_states):
        found = search(a, b)
        if found is not None and links(a, b, found):
            return tuple(
                ImmutableMatrix(T.applyfunc(sympy.factor).xreplace(meaning)) for T in found
            )
    return None


def _rational(
    a: SymbolicSystem, b: SymbolicSystem
) -> tuple[SymbolicSystem, SymbolicSystem, dict[Symbol, Expr]]:
    """Both with the same new symbols for their exponentials: rational functions are fast."""
    groups = [m for s in (a, b) for ms in s.coefficients().values() for m in ms]
    flat, meaning = rational_form(sympy.Tuple(*(e for m in groups for e in m)))
    entries = iter(flat.args)
    made = iter([
        ImmutableMatrix(*m.shape, list(itertools.islice(entries, len(m)))) for m in groups
    ])  # fmt: skip
    systems = [
        dataclasses.replace(
            s, **{n: tuple(itertools.islice(made, s.length)) for n in s.coefficients()}
        )
        for s in (a, b)
    ]
    return systems[0], systems[1], meaning


def links(a: SymbolicSystem, b: SymbolicSystem, T: Sequence[Matrix]) -> bool:
    """Whether T satisfies the three equations of `change_of_basis`, each proved."""
    gaps = [x - basis * y for x, basis, y in zip(b.B, T, a.B, strict=True)]
    gaps += [x - y * basis for x, basis, y in zip(a.C, T, b.C, strict=True)]
    for t in range(1, a.length):
        gaps.append(T[t] * a.A[t] - b.A[t] * T[t - 1])
    return all(is_proved_zero(e) for gap in gaps for e in gap)


def _diagonal(a: SymbolicSystem, b: SymbolicSystem) -> list[Matrix] | None:
    found = []
    for old, new in zip(a.B, b.B, strict=True):
        ratios = []
        for n in range(a.n_state):
            pair = next((p for p in zip(old.row(n), new.row(n), strict=True) if p[0] != 0), None)
            if pair is None or pair[1] == 0:
                return None
            ratios.append(sympy.cancel(pair[1] / pair[0]))
        found.append(sympy.diag(*ratios))
    return found


def _from_reachable_states(a: SymbolicSystem, b: SymbolicSystem) -> list[Matrix] | None:
    for t in range(a.length):
        old, new = _reachable(a, t), _reachable(b, t)
        if old.cols < a.n_state:
            continue
        old, new = old[:, -a.n_state :], new[:, -a.n_state :]
        if _is_singular(old) or _is_singular(new):
            continue
        T = _simplified(new * old.inv())
        return _carried(a, b, t, T)
    return None


def _reachable(r: SymbolicSystem, t: int) -> Matrix:
    """What each earlier input leaves in the state of token t (0-based), side by side."""
    columns = r.B[0]
    for step in range(1, t + 1):
        columns = Matrix.hstack(r.A[step] * columns, r.B[step])
    return Matrix(columns)


def _carried(a: SymbolicSystem, b: SymbolicSystem, t: int, T: Matrix) -> list[Matrix] | None:
    found: dict[int, Matrix] = {t: T}
    for step in range(t + 1, a.length):  # T_t = A~_t T_{t-1} A_t^-1
        if _is_singular(a.A[step]):
            return None
        found[step] = _simplified(b.A[step] * found[step - 1] * a.A[step].inv())
    for step in range(t, 0, -1):  # T_{t-1} = A~_t^-1 T_t A_t
        if _is_singular(b.A[step]):
            return None
        found[step - 1] = _simplified(b.A[step].inv() * found[step] * a.A[step])
    return [found[step] for step in range(a.length)]


def _simplified(m: Matrix) -> Matrix:
    f: Callable = sympy.cancel
    return Matrix(m.applyfunc(f))


def _is_singular(m: Matrix) -> bool:
    return is_proved_zero(m.det())
