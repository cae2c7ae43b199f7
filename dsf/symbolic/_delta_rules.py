"""Delta rules: what a key reads out of the state is taken away before its value is written."""

from __future__ import annotations

import sympy
from sympy import Expr, Matrix

from dsf.symbolic._inputs import Inputs, column
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import Coefficient, SymbolicSystem

of = SymbolicSystem.of


def _written(x: Inputs, name: str, A: Coefficient) -> SymbolicSystem:
    """B = beta k and C = q, whatever A is."""
    beta, k, q = x.number("beta"), x.vector("k"), x.vector("q")
    return of(name, x, A, lambda t: beta(t) * k(t), lambda t: q(t).T)


def _erasure(x: Inputs, t: int) -> Matrix:
    """I - beta k k^T."""
    k = x.vector("k")(t)
    return sympy.eye(x.size) - x.at("beta", t) * k * k.T


@entry
def delta_net(x: Inputs) -> SymbolicSystem:
    """A = I - beta k k^T, B = beta k, C = q."""
    return _written(x, "delta_net", lambda t: _erasure(x, t))


@entry
def gated_delta_net(x: Inputs) -> SymbolicSystem:
    """A = f (I - beta k k^T), B = beta k, C = q."""
    f = x.number("f")
    return _written(x, "gated_delta_net", lambda t: f(t) * _erasure(x, t))


@entry
def kimi_delta_attention(x: Inputs) -> SymbolicSystem:
    """A = (I - beta k k^T) diag(a), B = beta k, C = q."""
    a = x.vector("a")
    return _written(x, "kimi_delta_attention", lambda t: _erasure(x, t) * sympy.diag(*a(t)))


@entry
def comba(x: Inputs, *, decay_first: bool = True) -> SymbolicSystem:
    """A = f (I - beta k p^T), or f I - beta k p^T if p reads before the decay, B = beta k."""
    f, k, p, beta = x.number("f"), x.vector("k"), x.vector("p"), x.number("beta")

    def forget(t: int) -> Matrix:
        erased = beta(t) * k(t) * p(t).T
        return f(t) * sympy.eye(x.size) - (f(t) if decay_first else 1) * erased

    return _written(x, "comba", forget)


@entry
def gated_delta_product(x: Inputs, *, n_write: int = 2) -> SymbolicSystem:
    """A = H_n ... H_1 f, B[:, j] = beta_j H_n ... H_{j+1} k_j, C = q, n inputs a token."""
    f, q = x.number("f"), x.vector("q")

    def key(t: int, j: int) -> Matrix:
        return column(x.at("k", t, j, n) for n in range(1, x.size + 1))

    def later(t: int, first: int) -> Matrix:
        product = sympy.eye(x.size)
        for j in range(first, n_write + 1):
            product = product - x.at("beta", t, j) * key(t, j) * (key(t, j).T * product)
        return product

    def write(t: int) -> Matrix:
        each = range(1, n_write + 1)
        return Matrix.hstack(*(x.at("beta", t, j) * later(t, j + 1) * key(t, j) for j in each))

    return of("gated_delta_product", x, lambda t: f(t) * later(t, 1), write, lambda t: q(t).T)


@entry
def rwkv7(x: Inputs) -> SymbolicSystem:
    """A = diag(a) - b p^T, B = k, C = q; the layer has b a gate times the unit vector p."""
    a, b, p, k, q = (x.vector(name) for name in ("a", "b", "p", "k", "q"))
    return of("rwkv7", x, lambda t: sympy.diag(*a(t)) - b(t) * p(t).T, k, lambda t: q(t).T)


def _with_one(v: Matrix) -> Matrix:
    return Matrix([*v, 1])


@entry
def ttt_linear(x: Inputs, *, normalised: bool = True) -> SymbolicSystem:
    """B = delta beta (k, 1), C = (q, 1), mini-batches of one token.

    normalised: A = I and the values are the gradients along the trajectory; without the norm
    A = I - delta beta (k, 1)(k, 1)^T, and the system is exact.
    """
    k, q = x.vector("k"), x.vector("q")

    def strength(t: int) -> Expr:
        return x.at("delta", t) * x.at("beta", t)

    def erase(t: int) -> Matrix:
        key = _with_one(k(t))
        return sympy.eye(x.size + 1) - (0 if normalised else strength(t)) * key * key.T

    return of(
        "ttt_linear", x, erase, lambda t: strength(t) * _with_one(k(t)),
        lambda t: _with_one(q(t)).T, mode="exact_along_trajectory" if normalised else "exact",
    )  # fmt: skip


@entry
def ttt_mlp(x: Inputs) -> SymbolicSystem:
    """A = I, B = delta beta (k, 1), C = (q, 1): k, q are hidden activations of the trajectory."""
    k, q = x.vector("k"), x.vector("q")
    return of(
        "ttt_mlp", x, lambda t: sympy.eye(x.size + 1),
        lambda t: x.at("delta", t) * x.at("beta", t) * _with_one(k(t)),
        lambda t: _with_one(q(t)).T, mode="exact_along_trajectory",
    )  # fmt: skip
