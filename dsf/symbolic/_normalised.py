"""Linear attention by feature maps, InLine attention and ZeroS: prefix sums that are divided."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import sympy
from sympy import Expr, Matrix, Rational, exp

from dsf.errors import DsfValueError
from dsf.symbolic._inputs import Inputs, column, dot, row, scalar, stack
from dsf.symbolic._registry import entry
from dsf.symbolic._systems import SymbolicSystem, identity

of = SymbolicSystem.of
Number = Callable[[int], Expr]
Vector = Callable[[int], Matrix]


def check_option(system: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise DsfValueError unless the option is known."""
    if value not in known:
        raise DsfValueError(
            f"dsf.symbolic.system: {name} of {system}: expected one of {known}, got {value!r}."
        )


def separable(
    name: str, x: Inputs, q: Vector, k: Vector, eta: Number, gauge: str
) -> SymbolicSystem:
    """M_tj = q_t.k_j / eta_t in the gauges A = I and A = eta_{t-1}/eta_t (eta_0 = 1)."""
    check_option(name, "gauge", gauge, ("identity", "dsf"))
    n = k(1).rows
    if gauge == "identity":
        return of(name, x, identity(n), k, lambda t: q(t).T / eta(t))

    def decay(t: int) -> Matrix:
        return (eta(t - 1) if t > 1 else 1) / eta(t) * sympy.eye(n)

    return of(name, x, decay, lambda t: k(t) / eta(t), lambda t: q(t).T)


def _summed(
    name: str, x: Inputs, q: Vector, k: Vector, normalise: bool, gauge: str
) -> SymbolicSystem:
    def eta(t: int) -> Expr:
        total = sum(dot(q(t), k(j)) for j in range(1, t + 1))
        return total if normalise else sympy.Integer(1)

    return separable(name, x, q, k, eta, gauge)


@entry
def linear_attention(
    x: Inputs, *, normalise: bool = True, gauge: str = "identity"
) -> SymbolicSystem:
    """A = I, B = k, C = q/eta, eta_t = sum_{j<=t} q_t.k_j (or 1); q, k are the features."""
    return _summed("linear_attention", x, x.vector("q"), x.vector("k"), normalise, gauge)


@entry
def normalized_attention(x: Inputs, *, gauge: str = "identity") -> SymbolicSystem:
    """A = I, B = k, C = q/eta, eta_t = exp(zn_t)."""
    zn = x.number("zn")
    q, k = x.vector("q"), x.vector("k")
    return separable("normalized_attention", x, q, k, lambda t: exp(zn(t)), gauge)


def _monomials(f: Vector, degrees: range) -> Vector:
    """sqrt(1/(n_1! ... n_m!)) x^n over all |n| in `degrees`: dot products sum (q.k)^p/p!."""

    def features(t: int) -> Matrix:
        v, found = list(f(t)), []
        for p in degrees:
            for chosen in itertools.combinations_with_replacement(range(len(v)), p):
                counts = [chosen.count(n) for n in range(len(v))]
                root = sympy.sqrt(Rational(1, sympy.prod(map(sympy.factorial, counts))))
                found.append(root * sympy.prod(v[n] for n in chosen))
        return column(found)

    return features


@entry
def taylor_attention(x: Inputs, *, order: int = 2, gauge: str = "identity") -> SymbolicSystem:
    """A = I, B = phi(k), C = phi(q)/eta, phi(q).phi(k) = sum of (q.k)^p/p! for p <= order."""
    q, k = (_monomials(x.vector(n), range(order + 1)) for n in "qk")
    return _summed("taylor_attention", x, q, k, True, gauge)


@entry
def based(x: Inputs) -> SymbolicSystem:
    """A = I, B = phi(k), C = phi(q)/eta, phi(q).phi(k) = 1 + q.k + (q.k)^2/2."""
    q, k = (_monomials(x.vector(n), range(3)) for n in "qk")
    return _summed("based", x, q, k, True, "identity")


@entry
def rebased(x: Inputs) -> SymbolicSystem:
    """A = I, B = phi(k), C = phi(q)/eta, phi(q).phi(k) = (q.k)^2."""

    def doubled(f: Vector) -> Vector:
        half = _monomials(f, range(2, 3))
        return lambda t: sympy.sqrt(2) * half(t)

    q, k = (doubled(x.vector(n)) for n in "qk")
    return _summed("rebased", x, q, k, True, "identity")


@entry
def random_feature_attention(x: Inputs) -> SymbolicSystem:
    """A = I, B = phi(k), C = phi(q)/eta, phi_m(x) = exp(w_m.x - |x|^2/2) over `size` directions.

    The numeric system divides by the largest key feature, which leaves the map.
    """
    w = x.constant("w", x.size, x.size)

    def features(f: Vector) -> Vector:
        return lambda t: (w * f(t)).applyfunc(lambda e: exp(e - dot(f(t), f(t)) / 2))

    q, k = (features(x.vector(n)) for n in "qk")
    return _summed("random_feature_attention", x, q, k, True, "identity")


@entry
def inline_attention(x: Inputs, *, coordinates: str = "sums") -> SymbolicSystem:
    """M_tj = q_t.(k_j - mean) + 1/t, q with its factor g: prefix sums or centred coordinates.

    sums     A = I, B = (k, 1), C = (q, 1/t - q.mean)
    centred  A = [[I, -e], [0, 1 - 1/t]], B = (e, 1/t), C = (q, 1), e = k_t - mean_t
    """
    check_option("inline_attention", "coordinates", coordinates, ("sums", "centred"))
    q, k, n = x.vector("q"), x.vector("k"), x.size

    def mean(t: int) -> Matrix:
        return sum((k(j) for j in range(1, t + 1)), sympy.zeros(n, 1)) / t

    if coordinates == "sums":
        return of(
            "inline_attention", x, identity(n + 1), lambda t: stack(k(t), scalar(1)),
            lambda t: row([*q(t), Rational(1, t) - dot(q(t), mean(t))]),
        )  # fmt: skip

    def keep(t: int) -> Matrix:
        top = Matrix.hstack(sympy.eye(n), mean(t) - k(t))
        return stack(top, row([0] * n + [1 - Rational(1, t)]))

    return of(
        "inline_attention", x, keep, lambda t: stack(k(t) - mean(t), scalar(Rational(1, t))),
        lambda t: row([*q(t), 1]),
    )  # fmt: skip


class _Moments:
    """a, b, c of ZeroS (3 x 3, 3, 3) in one realisation; A = I (x) a, B = k (x) b, C = q (x) c."""

    def __init__(self, x: Inputs) -> None:
        self.s, self.m = x.number("s"), x.number("m")
        self.g0, self.g1, self.gh = x.number("g0"), x.number("g1"), x.number("gh")

    def total(self, f: Callable[[int], Expr], t: int) -> Expr:
        return sum((f(j) for j in range(1, t + 1)), sympy.Integer(0))

    def reads(self, t: int, total: Expr) -> list[Expr]:
        """alpha, beta, gamma of the raw sums; `total` is that of exp(s), in the units of F."""
        beta = (self.g1(t) - self.gh(t)) / t
        mean = self.total(self.s, t) / t
        return [self.gh(t) / total, beta, (self.g0(t) - self.gh(t)) / t - beta * mean]

    def raw(self, t: int) -> tuple[Matrix, list[Expr], list[Expr]]:
        total = self.total(lambda j: exp(self.s(j)), t)
        return sympy.eye(3), [exp(self.s(t)), self.s(t), sympy.Integer(1)], self.reads(t, total)

    def running_max(self, t: int) -> tuple[Matrix, list[Expr], list[Expr]]:
        total = self.total(lambda j: exp(self.s(j) - self.m(t)), t)
        a = sympy.diag(exp(self.m(t - 1) - self.m(t)), 1, 1)
        b = [exp(self.s(t) - self.m(t)), self.s(t), sympy.Integer(1)]
        return a, b, self.reads(t, total)

    def normalised(self, t: int) -> tuple[Matrix, list[Expr], list[Expr]]:
        share = exp(self.s(t)) / self.total(lambda j: exp(self.s(j)), t)
        past = self.total(self.s, t - 1) / (t - 1) if t > 1 else 0
        kept = 1 - Rational(1, t)
        pull = kept * (self.s(t) - past) / t
        a = Matrix([[1 - share, 0, 0], [0, kept, -pull], [0, 0, kept]])
        g0, g1, gh = self.g0(t), self.g1(t), self.gh(t)
        return a, [share, pull, Rational(1, t)], [gh, g1 - gh, g0 - gh]


@entry
def zeros(x: Inputs, *, realisation: str = "normalised") -> SymbolicSystem:
    """M_tj = r_tj q_t.k_j, r = gh (softmax - 1/t) + (g1 - gh)(s_j - mean)/t + g0/t.

    Three moments a key channel: raw, running_max (m any numbers) or normalised.
    """
    known = ("raw", "running_max", "normalised")
    check_option("zeros", "realisation", realisation, known)
    at = getattr(_Moments(x), realisation)
    q, k, n = x.vector("q"), x.vector("k"), x.size

    def spread(v: Matrix, each: list[Expr]) -> Matrix:
        return column(entry * e for entry in v for e in each)

    return of(
        "zeros", x, lambda t: sympy.diag(*[at(t)[0]] * n), lambda t: spread(k(t), at(t)[1]),
        lambda t: spread(q(t), at(t)[2]).T,
    )  # fmt: skip
