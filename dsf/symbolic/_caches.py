"""Attention that keeps a cache: A = I, B_t = e_t, C_t the row of the map; one state a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
from sympy import Expr, Matrix, Rational, exp, log

from dsf.symbolic._inputs import Inputs, dot, row, sigmoid
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import SymbolicSystem, identity

of = SymbolicSystem.of
Logit = Callable[[int, int], Expr]


def softmax(logits: Sequence[Expr]) -> list[Expr]:
    """exp / sum of exp."""
    weights = [exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def cache(name: str, x: Inputs, weights: Callable[[int], Sequence[Expr]]) -> SymbolicSystem:
    """A = I, B = e_t, C = weights of tokens 1..t."""
    n = x.length

    def read(t: int) -> Matrix:
        seen = list(weights(t))
        return row(seen + [0] * (n - len(seen)))

    return of(name, x, identity(n), lambda t: sympy.eye(n)[:, t - 1], read)


def scores(x: Inputs) -> Logit:
    """q_t.k_j."""
    q, k = x.vector("q"), x.vector("k")
    return lambda t, j: dot(q(t), k(j))


def _rows(name: str, x: Inputs, logit: Logit) -> SymbolicSystem:
    """Softmax of the logits over tokens 1..t."""
    return cache(name, x, lambda t: softmax([logit(t, j) for j in range(1, t + 1)]))


def _fading(x: Inputs, t: int, j: int) -> Expr:
    return sum((log(x.at("f", i)) for i in range(j + 1, t + 1)), sympy.Integer(0))


@entry
def softmax_attention(x: Inputs) -> SymbolicSystem:
    """C_t = softmax_j(q_t.k_j)."""
    return _rows("softmax_attention", x, scores(x))


@entry
def forgetting_attention(x: Inputs) -> SymbolicSystem:
    """C_t = softmax_j(q_t.k_j + sum of log f over j < i <= t)."""
    z = scores(x)
    return _rows("forgetting_attention", x, lambda t, j: z(t, j) + _fading(x, t, j))


@entry
def path_attention(x: Inputs) -> SymbolicSystem:
    """C_t = softmax_j(q_t.H_t ... H_{j+1} k_j), H = I - beta w w^T."""
    q, k, w = x.vector("q"), x.vector("k"), x.vector("w")

    def logit(t: int, j: int) -> Expr:
        moved = k(j)
        for i in range(j + 1, t + 1):
            moved = moved - x.at("beta", i) * dot(w(i), moved) * w(i)
        return dot(q(t), moved)

    return _rows("path_attention", x, logit)


@entry
def gated_attention(x: Inputs) -> SymbolicSystem:
    """C_t = o_t softmax_j(q_t.k_j), B_t = i_t e_t: gates on outputs and on values."""
    i, o = x.number("i"), x.number("o")
    plain = softmax_attention(x)
    return of(
        "gated_attention", x, identity(x.length), lambda t: i(t) * Matrix(plain.B[t - 1]),
        lambda t: o(t) * Matrix(plain.C[t - 1]),
    )  # fmt: skip


@entry
def sigmoid_attention(x: Inputs) -> SymbolicSystem:
    """C_t = sigmoid(q_t.k_j - log(length)), rows undivided."""
    z, n = scores(x), log(sympy.Integer(x.length))
    return cache("sigmoid_attention", x, lambda t: [sigmoid(z(t, j) - n) for j in range(1, t + 1)])


@entry
def zeros_softmax(x: Inputs) -> SymbolicSystem:
    """C_t = gh (p - 1/t) + (g1 - gh) d/t + g0/t, p = softmax(q_t.k_j), d = q_t.k_j - mean."""
    z = scores(x)
    g0, g1, gh = x.number("g0"), x.number("g1"), x.number("gh")

    def weights(t: int) -> list[Expr]:
        logits = [z(t, j) for j in range(1, t + 1)]
        mean, each = sum(logits, sympy.Integer(0)) / t, Rational(1, t)
        return [
            gh(t) * (p - each) + (g1(t) - gh(t)) * (logit - mean) / t + g0(t) / t
            for p, logit in zip(softmax(logits), logits, strict=True)
        ]

    return cache("zeros_softmax", x, weights)


@entry
def sliding_window_attention(x: Inputs, *, window: int = 2) -> SymbolicSystem:
    """A = shift, B = e_1, C = softmax over the last `window` tokens, the newest first."""
    z = scores(x)
    shift = Matrix(window, window, lambda a, b: int(a == b + 1))

    def read(t: int) -> Matrix:
        seen = softmax([z(t, t - lag) for lag in range(min(window, t))])
        return row(seen + [0] * (window - len(seen)))

    return of(
        "sliding_window_attention", x, lambda t: shift, lambda t: sympy.eye(window)[:, 0], read
    )


@entry
def hierarchical_attention(x: Inputs, *, branching: tuple[int, ...] = (2, 2)) -> SymbolicSystem:
    """C_t = softmax_G(q_t.mean of k in G + log n_G)/n_G over the token and finished groups.

    Causal with free rows (rows="free" of the numeric system): groups of branching[-1] tokens,
    groups of branching[-2] of these, ..., the root over all there are. A row over a cache, whose
    map is that of the numeric stream of groups.
    """
    q, k = x.vector("q"), x.vector("k")

    def groups(t: int) -> list[tuple[int, int]]:
        """First and last token of what row t sees: siblings on its left, level by level."""
        found, start, size = [(t, t)], t, 1
        for n in branching[:0:-1]:
            family = (t - 1) // (size * n) * size * n + 1
            found += [(i, i + size - 1) for i in range(family, start, size)]
            start, size = family, size * n
        return found + [(i, i + size - 1) for i in range(1, start, size)]  # under the root

    def weights(t: int) -> list[Expr]:
        seen = groups(t)
        logits = []
        for first, last in seen:
            n = last - first + 1
            mean = sum((dot(q(t), k(j)) for j in range(first, last + 1)), sympy.Integer(0)) / n
            logits.append(mean + log(sympy.Integer(n)))
        result = [sympy.Integer(0)] * t
        for p, (first, last) in zip(softmax(logits), seen, strict=True):
            for j in range(first, last + 1):
                result[j - 1] = p / (last - first + 1)
        return result

    return cache("hierarchical_attention", x, weights)


@entry
def monarch_attention(x: Inputs, *, block: int = 2) -> SymbolicSystem:
    """C_t = softmax over own-block keys and past blocks, each of these spread by its R (causal).

    R of place p in block b is softmax_i(q_p.k_i) over the block, its score q_t.(sum R k) minus
    sum R log R.
    """
    z = scores(x)

    def spread(first: int, place: int) -> tuple[list[Expr], Expr]:
        """R of a past block, and the log of what it weighs before q is known: its entropy."""
        logits = [z(first + place, first + i) for i in range(block)]
        R = softmax(logits)
        total = log(sum(exp(e) for e in logits))
        return R, total - sum(r * e for r, e in zip(R, logits, strict=True))

    def weights(t: int) -> list[Expr]:
        own = (t - 1) // block * block + 1
        logits, parts = [], []
        for first in range(1, own, block):
            R, entropy = spread(first, t - own)
            logits.append(entropy + sum(r * z(t, first + i) for i, r in enumerate(R)))
            parts.append(R)
        logits += [z(t, j) for j in range(own, t + 1)]
        p = softmax(logits)
        past = [p[b] * r for b, R in enumerate(parts) for r in R]
        return past + p[len(parts) :]

    return cache("monarch_attention", x, weights)
