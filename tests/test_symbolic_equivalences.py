"""Published equivalences of systems proved in symbols, and published differences refuted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

sympy = pytest.importorskip("sympy", reason="sympy is not installed")

from symbolic_pairs import LENGTH, PROVED, REFUTED  # noqa: E402

from dsf import symbolic  # noqa: E402
from dsf.errors import DsfShapeError, DsfValueError  # noqa: E402
from dsf.symbolic import Inputs, SymbolicSystem, equivalent, symbol  # noqa: E402
from dsf.symbolic import system as make  # noqa: E402


@pytest.mark.parametrize("name", PROVED)
def test_proved(name: str) -> None:
    a, b, assumptions = PROVED[name]()
    found = equivalent(a, b, assumptions, length=LENGTH, basis=False)
    assert found.verdict == "yes"
    assert bool(found)
    assert not found.a.map().is_zero_matrix


@pytest.mark.parametrize("name", REFUTED)
def test_refuted(name: str) -> None:
    """The counterexample is checked on the maps themselves."""
    a, b, assumptions = REFUTED[name]()
    found = equivalent(a, b, assumptions, length=LENGTH)
    assert found.verdict == "no"
    assert not found
    assert found.point is not None
    assert found.entry is not None
    gap = (found.a.map() - found.b.map())[found.entry].xreplace(dict(found.point))
    assert abs(complex(sympy.N(gap - found.value, 30))) < 1e-25
    assert abs(complex(found.value)) > 1e-20


# -- the change of basis -----------------------------------------------------------------------

LINKED: dict[str, Callable[[], tuple[SymbolicSystem, SymbolicSystem]]] = {
    "linear_attention": lambda: (
        make("linear_attention"), make("linear_attention", gauge="dsf")),
    "inline_attention": lambda: (
        make("inline_attention"), make("inline_attention", coordinates="centred")),
    "zeros": lambda: (
        make("zeros", size=1, realisation="raw"), make("zeros", size=1)),
    "slstm": lambda: (make("slstm"), make("slstm", stabilised=True)),
}  # fmt: skip


@cache
def linked(name: str) -> tuple[SymbolicSystem, SymbolicSystem, Any]:
    """Both systems and the change of basis found."""
    a, b = LINKED[name]()
    return a, b, equivalent(a, b).basis


def is_zero(m: Any) -> bool:
    return all(sympy.cancel(e) == 0 for e in m)


@pytest.mark.parametrize("name", LINKED)
def test_change_of_basis_carries_one_system_into_the_other(name: str) -> None:
    a, b, T = linked(name)
    assert T is not None
    moved = a.change_of_basis(lambda t: T[t - 1])
    for t in range(LENGTH):
        names = ("B", "C") if t == 0 else ("A", "B", "C")  # A_1 acts on a zero state
        assert all(is_zero(getattr(moved, field)[t] - getattr(b, field)[t]) for field in names)


def test_published_bases() -> None:
    """T_t = I/eta_t of the DSF gauge, and those of InLine and ZeroS."""
    T = linked("linear_attention")[2]
    eta = sum(symbol("q", 2, n) * symbol("k", j, n) for n in (1, 2) for j in (1, 2))
    assert is_zero(T[1] * eta - sympy.eye(2))
    T = linked("inline_attention")[2]
    mean = [(symbol("k", 1, n) + symbol("k", 2, n)) / 2 for n in (1, 2)]
    expected = sympy.Matrix([[1, 0, -mean[0]], [0, 1, -mean[1]], [0, 0, sympy.Rational(1, 2)]])
    assert is_zero(T[1] - expected)
    T = linked("zeros")[2]
    s = [symbol("s", t) for t in (1, 2, 3)]
    total, third = sum(map(sympy.exp, s)), sympy.Rational(1, 3)
    expected = sympy.Matrix([[1 / total, 0, 0], [0, third, -sum(s) / 9], [0, 0, third]])
    assert is_zero(T[2] - expected)


def test_no_basis_between_different_numbers_of_states() -> None:
    found = equivalent("sliding_window_attention", "softmax_attention", length=2)
    assert found.verdict == "yes"
    found = equivalent(make("gla", size=1), make("gla", size=2).substitute(
        {"k": lambda t, n: symbol("k", t, n) if n < 2 else 0}))  # fmt: skip
    assert found.verdict == "yes"
    assert found.basis is None


# -- what cannot be decided, and what is no question -------------------------------------------


def _skipping(e: Any) -> SymbolicSystem:
    x = Inputs(1, 1)
    s = x.at("s", 1)
    zero = sympy.zeros(1, 1)
    return SymbolicSystem.of(
        "skip", x, lambda t: zero, lambda t: zero, lambda t: zero, lambda t: sympy.Matrix([[e(s)]])
    )


def test_undecided_where_the_proof_does_not_reach() -> None:
    """max(s, 0) = (s + |s|)/2 is true, and no identity of rational functions."""
    a = _skipping(lambda s: sympy.Max(s, 0, evaluate=False))
    b = _skipping(lambda s: (s + sympy.Abs(s)) / 2)
    found = equivalent(a, b)
    assert found.verdict == "undecided"
    assert not found
    assert found.point is None


def test_powers_of_symbols_are_rational_forms() -> None:
    a = _skipping(lambda s: (1 + sympy.exp(2 * s)) ** (-2 * symbol("e")) * sympy.exp(s / 2))
    b = _skipping(
        lambda s: (
            (sympy.exp(-2 * s) / (1 + sympy.exp(-2 * s))) ** (2 * symbol("e"))
            * sympy.exp(s / 6) ** 3
        )
    )
    assert equivalent(a, b).verdict == "yes"
    assert equivalent(a, _skipping(lambda s: sympy.exp(s / 2))).verdict == "no"


def test_no_false_proof_by_signs() -> None:
    """(x^2)^(1/2) and (-x)^e (-x)^e are not x and x^(2e), whatever letters stand for them."""
    e = symbol("e")
    root = _skipping(lambda s: sympy.sqrt(s**2))
    assert equivalent(root, _skipping(lambda s: s)).verdict == "no"
    both = _skipping(lambda s: (-s) ** e * (-s) ** e)
    assert equivalent(both, _skipping(lambda s: s ** (2 * e))).verdict == "no"
    z = symbol("xi")
    turned = _skipping(lambda s: sympy.sqrt(sympy.exp(2 * z)))
    assert equivalent(turned, _skipping(lambda s: sympy.exp(z))).verdict != "yes"


def test_errors() -> None:
    with pytest.raises(DsfValueError, match="families among"):
        equivalent("gla", "metala", {"nothing": 1})
    with pytest.raises(DsfShapeError, match="expected a map"):
        equivalent(make("gla", length=2), "metala")
    with pytest.raises(DsfValueError, match="name: expected one of"):
        equivalent("gla", "nothing")
    with pytest.raises(DsfValueError, match="options of gla"):
        symbolic.system("gla", gauge="dsf")
    with pytest.raises(DsfValueError, match="gauge"):
        symbolic.system("linear_attention", gauge="other")
    with pytest.raises(DsfValueError, match="at least 1"):
        symbolic.system("gla", length=0)


# -- every system ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", symbolic.registered())
def test_verdicts_with_known_answers(name: str) -> None:
    """Another basis is proved equal, and a map that differs in its last row is refuted."""
    a = make(name, length=2, size=1)

    def basis(t: int) -> Any:
        return sympy.diag(*(symbol("c") ** t + n for n in range(a.n_state)))

    b = a.change_of_basis(basis)
    assert equivalent(a, b, basis=False).verdict == "yes"
    changed = dataclasses.replace(b, C=(b.C[0], b.C[1] * (1 + sympy.Rational(1, 10**12))))
    found = equivalent(a, changed, basis=False)
    assert found.verdict == "no"
    assert found.entry is not None
    assert found.entry[0] >= a.C[0].rows
