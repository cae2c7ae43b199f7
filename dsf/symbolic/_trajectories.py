"""Networks whose gates depend on their own state: the numbers of one trajectory as symbols."""

from __future__ import annotations

import sympy
from sympy import Expr

from dsf.symbolic._inputs import Inputs, scalar, sigmoid
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import SymbolicSystem, identity, one

of = SymbolicSystem.of
MODE = "exact_along_trajectory"


@entry
def gru(x: Inputs) -> SymbolicSystem:
    """A = z, B = 1 - z, C = 1; the values are the candidates."""
    z = x.number("z")
    return of("gru", x, lambda t: scalar(z(t)), lambda t: scalar(1 - z(t)), one, mode=MODE)


@entry
def lstm(x: Inputs) -> SymbolicSystem:
    """A = f, B = i, C = 1: the cell; the values are the candidates."""
    f, i = x.number("f"), x.number("i")
    return of("lstm", x, lambda t: scalar(f(t)), lambda t: scalar(i(t)), one, mode=MODE)


@entry
def slstm(x: Inputs, *, stabilised: bool = False) -> SymbolicSystem:
    """A = sigmoid(zf), B = exp(zi), C = sigmoid(zo) / n, n = A n + B.

    stabilised: states and n divided by exp(m_t), m any numbers (the running maximum).
    """
    zf, zi, zo = x.number("zf"), x.number("zi"), x.number("zo")
    m = x.number("m") if stabilised else lambda t: sympy.Integer(0)

    def forget(t: int) -> Expr:
        return sigmoid(zf(t)) * sympy.exp(m(t - 1) - m(t))

    def total(t: int) -> Expr:
        before = forget(t) * total(t - 1) if t > 1 else 0
        return before + sympy.exp(zi(t) - m(t))

    return of(
        "slstm", x, lambda t: scalar(forget(t)), lambda t: scalar(sympy.exp(zi(t) - m(t))),
        lambda t: scalar(sigmoid(zo(t)) / total(t)), mode=MODE,
    )  # fmt: skip


@entry
def rnn(x: Inputs) -> SymbolicSystem:
    """A = diag(g) U, B = diag(g), C = I; g_t = f(a_t)/a_t, `size` in- and outputs."""
    g, U = x.vector("g"), x.constant("U", x.size, x.size)
    return of(
        "rnn", x, lambda t: sympy.diag(*g(t)) * U, lambda t: sympy.diag(*g(t)),
        identity(x.size), mode=MODE,
    )  # fmt: skip
