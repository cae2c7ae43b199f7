"""The symbols of systems: one family for each input, one symbol for each token and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import sympy
from sympy import Expr, Matrix, Symbol

Place = tuple[str, tuple[int, ...]]
"""Family and indices of a symbol: token first, then what it has more."""


class Family(NamedTuple):
    """What a family of symbols stands for, where its values lie, how its letter is set."""

    meaning: str
    domain: str = "real"
    tex: str = ""


FAMILIES = {
    "q": Family("query, after its scale and feature map; c of state space models"),
    "k": Family("key, after its feature map; b of state space models"),
    "a": Family("forget gate, one a state", "unit"),
    "f": Family("forget gate, one a head", "unit"),
    "gamma": Family("fixed decay", "unit"),
    "z": Family("update gate", "unit"),
    "i": Family("input gate", "unit"),
    "o": Family("output gate", "unit"),
    "l": Family("trapezoid weight", "unit", r"\ell"),
    "zf": Family("logit of the forget gate", tex="z^{f}"),
    "zi": Family("logit of the input gate", tex="z^{i}"),
    "zo": Family("logit of the output gate", tex="z^{o}"),
    "zr": Family("logit of the recurrence gate", tex="z^{r}"),
    "zn": Family("logit of the normaliser", tex=r"z^{\eta}"),
    "beta": Family("write strength", "positive"),
    "p": Family("what the delta rule erases along"),
    "b": Family("what the erased part of a delta rule is written to"),
    "w": Family("direction, or tap of a convolution"),
    "delta": Family("step size, learning rate", "positive"),
    "rho": Family("decay rate of a state space model, one a state", "positive"),
    "r": Family("decay rate of a state space model, one a head", "positive"),
    "d": Family("skip"),
    "u": Family("bonus of the own token"),
    "s": Family("logit of a token (ZeroS)"),
    "g0": Family("gate of the zero order", tex="g^{0}"),
    "g1": Family("gate of the first order", tex="g^{1}"),
    "gh": Family("gate of the higher orders", tex="g^{h}"),
    "g": Family("gain of a nonlinearity along the trajectory"),
    "U": Family("weights from state to state"),
    "m": Family("running maximum: any numbers will do"),
    "e": Family("exponent of the forget gate", "positive"),
    "c": Family("scale of a decay", "positive"),
    "Lambda": Family("parameter of a decay"),
    "nu": Family("log of minus the log of a modulus"),
    "theta": Family("log of a phase"),
    "xi": Family("eigenvalue in continuous time", "complex"),
    "P": Family("low-rank part of an eigenvalue matrix", "complex"),
    "bc": Family("complex input vector", "complex", "b"),
    "cc": Family("complex output vector", "complex", "c"),
}
"""Every family; the same name is the same thing in all systems, so that systems compare."""


def symbol(family: str, *indices: int) -> Symbol:
    """The symbol of a family (`FAMILIES`, or a new name) at these indices, from 1 on.

    Gates and other positive families are positive symbols; new names are real.
    """
    known = FAMILIES.get(family, Family("", "real"))
    name = known.tex or family
    if indices:
        name += "_{" + ",".join(map(str, indices)) + "}"
    kinds = {"real": {"real": True}, "complex": {"complex": True}}
    return Symbol(name, **kinds.get(known.domain, {"positive": True}))


class Inputs:
    """The symbols of one system of `length` tokens and `size` states; remembers what it gave."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size
        self.places: dict[Symbol, Place] = {}

    def at(self, family: str, *indices: int) -> Symbol:
        """One symbol."""
        made = symbol(family, *indices)
        self.places[made] = (family, indices)
        return made

    def number(self, family: str) -> Callable[[int], Expr]:
        """One number a token."""
        return lambda t: self.at(family, t)

    def vector(self, family: str, size: int | None = None) -> Callable[[int], Matrix]:
        """One column a token."""
        n = self.size if size is None else size
        return lambda t: column(self.at(family, t, i) for i in range(1, n + 1))

    def constant(self, family: str, *shape: int) -> Matrix:
        """A vector (n,) or a matrix (n, m) that all tokens share; a number is `at(family)`."""
        rows, columns = (*shape, 1)[:2]
        if len(shape) == 1:
            return column(self.at(family, i) for i in range(1, rows + 1))
        return Matrix(rows, columns, lambda i, j: self.at(family, i + 1, j + 1))


def column(entries: object) -> Matrix:
    """A column of expressions."""
    return Matrix(list(entries))  # type: ignore[call-overload]


def row(entries: object) -> Matrix:
    """A row of expressions."""
    return column(entries).T


def stack(*parts: Matrix) -> Matrix:
    """Columns, one above the other."""
    return Matrix.vstack(*parts)


def scalar(x: Expr | int) -> Matrix:
    """A 1 x 1 matrix."""
    return Matrix([[x]])


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + sympy.exp(-x))


def dot(x: Matrix, y: Matrix) -> Expr:
    """x.y, nothing conjugated."""
    return (x.T * y)[0, 0]
