"""Systems whose A_t is diagonal or a number: gated linear attention and gated units."""

from __future__ import annotations

import sympy
from sympy import Expr, Matrix

from dsf.symbolic._inputs import Inputs, column, dot, row, scalar, sigmoid, stack
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import Coefficient, SymbolicSystem, one

of = SymbolicSystem.of


def _ones(x: Inputs) -> Matrix:
    return sympy.ones(x.size, 1)


def _diagonal(f: Coefficient) -> Coefficient:
    return lambda t: sympy.diag(*f(t))


def _row(f: Coefficient) -> Coefficient:
    return lambda t: f(t).T


@entry
def gla(x: Inputs) -> SymbolicSystem:
    """A = diag(a), B = k, C = q."""
    return of("gla", x, _diagonal(x.vector("a")), x.vector("k"), _row(x.vector("q")))


def _key_free(name: str, x: Inputs) -> SymbolicSystem:
    a = x.vector("a")
    return of(name, x, _diagonal(a), lambda t: _ones(x) - a(t), _row(x.vector("q")))


@entry
def metala(x: Inputs) -> SymbolicSystem:
    """A = diag(a), B = 1 - a, C = q."""
    return _key_free("metala", x)


@entry
def hgrn2(x: Inputs) -> SymbolicSystem:
    """A = diag(a), B = 1 - a, C = q."""
    return _key_free("hgrn2", x)


def _fixed_decay(name: str, x: Inputs) -> SymbolicSystem:
    gamma = x.at("gamma")
    return of(name, x, lambda t: gamma * sympy.eye(x.size), x.vector("k"), _row(x.vector("q")))


@entry
def lightning_attention(x: Inputs) -> SymbolicSystem:
    """A = gamma I, B = k, C = q."""
    return _fixed_decay("lightning_attention", x)


@entry
def retention(x: Inputs) -> SymbolicSystem:
    """A = gamma I, B = k, C = q, both turned beforehand."""
    return _fixed_decay("retention", x)


@entry
def gated_slot_attention(x: Inputs) -> SymbolicSystem:
    """A = diag(a), B = 1 - a, C = softmax over slots of K q; K = diag(a) K + (1 - a) k^T."""
    a, q, k = x.vector("a"), x.vector("q"), x.vector("k")

    def read(t: int) -> Matrix:
        held = sympy.zeros(x.size, x.size)
        for j in range(1, t + 1):
            held = sympy.diag(*a(j)) * held + (_ones(x) - a(j)) * k(j).T
        weights = (held * q(t)).applyfunc(sympy.exp)
        return weights.T / sum(weights)

    return of("gated_slot_attention", x, _diagonal(a), lambda t: _ones(x) - a(t), read)


@entry
def mlstm(x: Inputs, *, normalise: bool = True, stabilised: bool = False) -> SymbolicSystem:
    """A = sigmoid(zf) I, B = exp(zi) k, C = q / max(|q.n|, 1), n the sum of keys so kept.

    stabilised: states divided by exp(m_t), m_0..m_t any numbers (the running maximum).
    """
    q, k, zf, zi = x.vector("q"), x.vector("k"), x.number("zf"), x.number("zi")
    m = x.number("m") if stabilised else lambda t: sympy.Integer(0)

    def eta(t: int) -> Expr:
        total = sympy.zeros(x.size, 1)
        for j in range(1, t + 1):
            total = sigmoid(zf(j)) * total + sympy.exp(zi(j)) * k(j)
        return sympy.Max(sympy.Abs(dot(q(t), total)), 1) if normalise else sympy.Integer(1)

    return of(
        "mlstm", x,
        lambda t: sigmoid(zf(t)) * sympy.exp(m(t - 1) - m(t)) * sympy.eye(x.size),
        lambda t: sympy.exp(zi(t) - m(t)) * k(t),
        lambda t: q(t).T * sympy.exp(m(t)) / eta(t),
    )  # fmt: skip


@entry
def rwkv6(x: Inputs) -> SymbolicSystem:
    """Two states a channel: A = [[a_{t-1}, 1], [0, 0]], B = (0, k), C = (q, u q)."""
    a, q, k, u = x.vector("a"), x.vector("q"), x.vector("k"), x.constant("u", x.size)

    def decay(t: int) -> Matrix:
        before = a(t - 1) if t > 1 else _ones(x)
        return sympy.diag(*(Matrix([[g, 1], [0, 0]]) for g in before))

    return of(
        "rwkv6", x, decay,
        lambda t: stack(*(Matrix([0, entry]) for entry in k(t))),
        lambda t: row(part for n, r in enumerate(q(t)) for part in (r, u[n] * r)),
    )  # fmt: skip


# -- one state a channel -----------------------------------------------------------------------


@entry
def hgrn(x: Inputs) -> SymbolicSystem:
    """A = f, B = 1 - f, C = 1."""
    f = x.number("f")
    return of("hgrn", x, lambda t: scalar(f(t)), lambda t: scalar(1 - f(t)), one)


@entry
def min_gru(x: Inputs) -> SymbolicSystem:
    """A = 1 - z, B = z, C = 1."""
    z = x.number("z")
    return of("min_gru", x, lambda t: scalar(1 - z(t)), lambda t: scalar(z(t)), one)


@entry
def qlstm(x: Inputs, *, reversed_sigmoid: bool = False) -> SymbolicSystem:
    """A = sigmoid(zf), or sigmoid(-zf)^e if reversed, B = sigmoid(zi), C = sigmoid(zo)."""
    zf, zi, zo = x.number("zf"), x.number("zi"), x.number("zo")

    def forget(t: int) -> Matrix:
        return scalar(sigmoid(-zf(t)) ** x.at("e") if reversed_sigmoid else sigmoid(zf(t)))

    return of(
        "qlstm", x, forget, lambda t: scalar(sigmoid(zi(t))), lambda t: scalar(sigmoid(zo(t)))
    )


def _softplus_decay(x: Inputs, parameter: Expr, t: int) -> Expr:
    """exp(-c sigmoid(zr) softplus(parameter))."""
    return (1 + sympy.exp(parameter)) ** (-x.at("c") * sigmoid(x.at("zr", t)))


@entry
def rglru(x: Inputs) -> SymbolicSystem:
    """A = a, B = sqrt(1 - a^2) sigmoid(zi), C = 1, log a = -c sigmoid(zr) softplus(Lambda)."""
    zi = x.number("zi")

    def decay(t: int) -> Expr:
        return _softplus_decay(x, x.at("Lambda"), t)

    return of(
        "rglru", x, lambda t: scalar(decay(t)),
        lambda t: scalar(sympy.sqrt(1 - decay(t) ** 2) * sigmoid(zi(t))), one,
    )  # fmt: skip


@entry
def expanded_rglru(x: Inputs) -> SymbolicSystem:
    """A = diag(a), B = sqrt(1 - a^2) k, C = q, log a_n = -c sigmoid(zr) softplus(Lambda_n)."""
    k, Lambda = x.vector("k"), x.constant("Lambda", x.size)

    def decay(t: int) -> Matrix:
        return column(_softplus_decay(x, parameter, t) for parameter in Lambda)

    return of(
        "expanded_rglru", x, _diagonal(decay),
        lambda t: column(
            sympy.sqrt(1 - a**2) * b for a, b in zip(decay(t), k(t), strict=True)
        ),
        _row(x.vector("q")),
    )  # fmt: skip


@entry
def rwkv4(x: Inputs, *, normalise: bool = True) -> SymbolicSystem:
    """A = [[gamma, 1], [0, 0]], B = (0, exp(k)), C = (1, exp(u)) / eta, eta the row's sum."""
    k, u, gamma = x.number("k"), x.at("u"), x.at("gamma")

    def eta(t: int) -> Expr:
        past = sum(gamma ** (t - 1 - j) * sympy.exp(k(j)) for j in range(1, t))
        return past + sympy.exp(u + k(t)) if normalise else sympy.Integer(1)

    return of(
        "rwkv4", x, lambda t: Matrix([[gamma, 1], [0, 0]]),
        lambda t: column([0, sympy.exp(k(t))]), lambda t: row([1, sympy.exp(u)]) / eta(t),
    )  # fmt: skip
