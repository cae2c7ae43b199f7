"""Is an expression zero everywhere? A proof by rational functions, or a point where it is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping

import sympy
from sympy import Basic, Expr, Function, I, Rational, Symbol, exp

DIGITS = 60
"""Digits a value with exponentials is evaluated to."""
FLOOR = Rational(1, 10**30)
"""A value of at least this modulus at 60 digits is not zero."""


def is_proved_zero(e: Expr) -> bool:
    """Whether the expression simplifies to 0: exact for rational functions of the symbols and of
    exponentials of their polynomials; False says nothing.

    Every exponential is split into powers of exp(monomial), each a new symbol, and every other
    function stays whole, so that a rational function is left (`rational_form`), whose numerator
    is expanded, unless its value at one rational point already says that it is not zero.
    """
    if e == 0:
        return True
    form = rational_form(e)[0]
    rng = random.Random(1)
    letters = sorted(form.free_symbols, key=str)
    value = form.xreplace({s: _number("positive", rng) for s in letters})
    if value.is_Rational and value != 0:
        return False
    return sympy.expand(sympy.fraction(sympy.together(form))[0]) == 0


def counterexample(
    e: Expr, domains: Mapping[Symbol, str], tries: int = 8
) -> tuple[dict[Symbol, Expr], Expr] | None:
    """A point of rational numbers inside the domains where e is not zero, and its value there.

    The value is exact if e is rational, else good to 60 digits and no smaller than 1e-30.
    """
    rng = random.Random(0)
    symbols = sorted(e.free_symbols, key=str)
    for _ in range(tries):
        point = {s: _number(domains.get(s, _domain(s)), rng) for s in symbols}
        value = e.xreplace(point)
        if not value.is_Rational:
            value = sympy.N(value, DIGITS)
        if value.is_number and value.is_finite and sympy.Abs(value) > FLOOR:
            return point, value
    return None


def _domain(s: Symbol) -> str:
    if s.is_positive:
        return "positive"
    return "real" if s.is_real else "complex"


def _number(domain: str, rng: random.Random) -> Expr:
    if domain == "unit":
        return Rational(rng.randint(1, 12), 13)
    size = Rational(rng.randint(1, 20), rng.randint(7, 13))
    if domain == "positive":
        return size
    if domain == "complex":
        return size - 1 + I * Rational(rng.randint(1, 20), 11)
    return size * rng.choice((-1, 1))


def rational_form(e: Basic) -> tuple[Basic, dict[Symbol, Expr]]:
    """e as a rational function of new symbols, and what these stand for.

    One symbol for exp(monomial / n) of each monomial in any exponent of e, n the common
    denominator of its factors, and one for every other function, taken whole. What holds for the
    new symbols holds for e; the converse needs them to be algebraically independent. e may be a
    Tuple.
    """
    found = list(dict.fromkeys(_transcendental(e)))
    parts = {x: _exponent_parts(x) for x in found if not isinstance(x, Function) or x.func == exp}
    unit: dict[Expr, int] = {}
    for monomials in parts.values():
        for monomial, factor in monomials.items():
            unit[monomial] = math.lcm(unit.get(monomial, 1), int(factor.q))
    letters = {
        m: sympy.Dummy(positive=True) if m.is_real else sympy.Dummy(complex=True) for m in unit
    }
    swap: dict[Basic, Expr] = {
        x: sympy.Mul(*(letters[m] ** (factor * unit[m]) for m, factor in monomials.items()))
        for x, monomials in parts.items()
    }
    meaning = {letters[m]: exp(m / n) for m, n in unit.items()}
    for x in found:
        if x not in swap:
            swap[x] = sympy.Dummy(
                **{name: True for name, is_so in x.assumptions0.items() if is_so}
            )
            meaning[swap[x]] = x
    return _replace_outermost(e, swap), meaning


def _transcendental(e: Basic) -> Iterator[Basic]:
    """Functions and powers of symbolic exponent, none inside another."""
    if isinstance(e, Function | sympy.Max | sympy.Min) or (
        isinstance(e, sympy.Pow) and e.exp.free_symbols
    ):
        yield e
    else:
        for part in e.args:
            yield from _transcendental(part)


def _replace_outermost(e: Basic, swap: Mapping[Basic, Expr]) -> Basic:
    if e in swap:
        return swap[e]
    if not e.args:
        return e
    return e.func(*(_replace_outermost(part, swap) for part in e.args))


def _exponent_parts(x: Expr) -> dict[Expr, Rational]:
    """x as exp(sum of rational factor times monomial)."""
    base, exponent = x.as_base_exp()
    if isinstance(x, exp):
        total = x.args[0]
    else:
        whole = sympy.together(base)
        # log(a b) = log a + log b, and log a^-1 = -log a, hold if every factor is positive
        positive = all(factor.is_positive for factor in whole.as_powers_dict())
        total = exponent * sympy.expand_log(sympy.log(whole), force=positive)
    return dict(_terms(sympy.expand(total)))


def _terms(total: Expr) -> Iterable[tuple[Expr, Rational]]:
    found: dict[Expr, Rational] = {}
    for term in sympy.Add.make_args(total):
        factor, monomial = term.as_coeff_Mul()
        if not factor.is_Rational:
            factor, monomial = Rational(1), term
        found[monomial] = found.get(monomial, Rational(0)) + factor
    return found.items()
