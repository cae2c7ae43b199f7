"""State space models and convolutions."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy import Expr, Matrix

from dsf.symbolic._inputs import Inputs, column, row, scalar, stack
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import SymbolicSystem

of = SymbolicSystem.of


@entry
def mamba(x: Inputs) -> SymbolicSystem:
    """A = diag(exp(-delta rho_n)), B = delta k, C = q, D = d: one channel."""
    delta, k, q, rho = x.number("delta"), x.vector("k"), x.vector("q"), x.constant("rho", x.size)
    return of(
        "mamba", x, lambda t: sympy.diag(*(sympy.exp(-delta(t) * rate) for rate in rho)),
        lambda t: delta(t) * k(t), lambda t: q(t).T, lambda t: scalar(x.at("d")),
    )  # fmt: skip


@entry
def mamba2(x: Inputs) -> SymbolicSystem:
    """A = exp(-delta r) I, B = delta k, C = q, D = d: one head."""
    delta, k, q = x.number("delta"), x.vector("k"), x.vector("q")
    return of(
        "mamba2", x, lambda t: sympy.exp(-delta(t) * x.at("r")) * sympy.eye(x.size),
        lambda t: delta(t) * k(t), lambda t: q(t).T, lambda t: scalar(x.at("d")),
    )  # fmt: skip


@entry
def mamba3(x: Inputs) -> SymbolicSystem:
    """A = [[f I, (1 - l) delta f k_{t-1}], [0, 0]], B = (l delta k, 1), C = (q, 0), D = d."""
    f, delta, ell = x.number("f"), x.number("delta"), x.number("l")
    k, q = x.vector("k"), x.vector("q")

    def keep(t: int) -> Matrix:
        before = k(t - 1) if t > 1 else sympy.zeros(x.size, 1)
        top = Matrix.hstack(f(t) * sympy.eye(x.size), (1 - ell(t)) * delta(t) * f(t) * before)
        return stack(top, sympy.zeros(1, x.size + 1))

    return of(
        "mamba3", x, keep, lambda t: stack(ell(t) * delta(t) * k(t), scalar(1)),
        lambda t: row([*q(t), 0]), lambda t: scalar(x.at("d")),
    )  # fmt: skip


@entry
def short_convolution(x: Inputs) -> SymbolicSystem:
    """A = shift, B = i e_1, C = o (w_1, ..., w_n), w_n on the oldest of n = size tokens."""
    i, o, w = x.number("i"), x.number("o"), x.constant("w", x.size)
    shift = Matrix(x.size, x.size, lambda a, b: int(a == b + 1))
    first = Matrix(x.size, 1, lambda a, b: int(a == 0))
    return of(
        "short_convolution", x, lambda t: shift, lambda t: i(t) * first, lambda t: o(t) * w.T
    )


# -- constant, complex: a state and its conjugate for every pair -------------------------------


def _conjugate_pairs(
    name: str, x: Inputs, A: Matrix, B: Matrix, C: Matrix, factor: Expr | int = 1
) -> SymbolicSystem:
    """factor Re(C h) + d u as a system of twice the states."""
    both = (sympy.diag(A, A.conjugate()), stack(B, B.conjugate()))
    C = Matrix.hstack(C, C.conjugate()) * sympy.Rational(factor, 2)
    D = sympy.diag(*(x.at("d", n) for n in range(1, B.cols + 1)))
    return of(name, x, lambda t: both[0], lambda t: both[1], lambda t: C, lambda t: D)


@entry
def lru(x: Inputs) -> SymbolicSystem:
    """A = diag(exp(-exp(nu) + i exp(theta))), B = bc, y = Re(cc h) + d u; `size` in- and outputs.

    One complex state, and its conjugate. bc is taken with its factor gamma.
    """
    eigenvalue = sympy.exp(-sympy.exp(x.at("nu")) + sympy.I * sympy.exp(x.at("theta")))
    B, C = x.constant("bc", 1, x.size), x.constant("cc", x.size, 1)
    return _conjugate_pairs("lru", x, scalar(eigenvalue), B, C)


def _held(x: Inputs, n: int) -> tuple[Expr, Expr]:
    """exp(delta xi) and (exp(delta xi) - 1)/xi: the zero-order hold of one eigenvalue."""
    xi, delta = x.at("xi", n), x.at("delta")
    return sympy.exp(delta * xi), (sympy.exp(delta * xi) - 1) / xi


@entry
def s5(x: Inputs) -> SymbolicSystem:
    """A = exp(delta xi), B = (exp(delta xi) - 1)/xi bc, y = 2 Re(cc h) + d u; as `lru`."""
    A, factor = _held(x, 1)
    B, C = factor * x.constant("bc", 1, x.size), x.constant("cc", x.size, 1)
    return _conjugate_pairs("s5", x, scalar(A), B, C, 2)


@entry
def s4d(x: Inputs) -> SymbolicSystem:
    """A = diag exp(delta xi), B = (exp(delta xi) - 1)/xi, y = 2 Re(cc h) + d u: one channel."""
    held = [_held(x, n) for n in range(1, x.size + 1)]
    C = x.constant("cc", x.size).T
    return _conjugate_pairs(
        "s4d", x, sympy.diag(*(a for a, _ in held)), column(b for _, b in held), C, 2
    )


@entry
def s4(x: Inputs) -> SymbolicSystem:
    """A = (I - delta/2 F)^-1 (I + delta/2 F), B = delta (I - delta/2 F)^-1 bc, y = 2 Re(cc h).

    F = diag(xi, conj xi) - p p^*, p = (P, conj P): one pair of states, one channel.
    """
    conj: Callable[[Expr], Expr] = sympy.conjugate
    xi, p, b, c = (x.at(name, 1) for name in ("xi", "P", "bc", "cc"))
    half = x.at("delta") / 2
    low_rank = column([p, conj(p)])
    F = sympy.diag(xi, conj(xi)) - low_rank * low_rank.H
    ahead, back = sympy.eye(2) + half * F, sympy.eye(2) - half * F
    inverse = back.adjugate() / back.det()
    return of(
        "s4", x, lambda t: inverse * ahead, lambda t: 2 * half * inverse * column([b, conj(b)]),
        lambda t: row([c, conj(c)]), lambda t: scalar(x.at("d", 1)),
    )  # fmt: skip
