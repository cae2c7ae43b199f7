"""Are the maps of two systems the same? A proof, a counterexample, or neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import sympy
from sympy import Expr, ImmutableMatrix, Symbol

from dsf.errors import DsfShapeError
from dsf.symbolic._bases import change_of_basis
from dsf.symbolic._inputs import FAMILIES
from dsf.symbolic._proving import counterexample, is_proved_zero
from dsf.symbolic._systems import Assumption, SymbolicSystem
from dsf.symbolic.entries import system


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What `equivalent` found.

    verdict: "yes" (each entry of the difference was proved to be zero), "no" (`point` is a
    counterexample: numbers for the symbols at which `entry` (row, column, from 0) of the maps
    differs by `value`), or "undecided". a and b are the systems after the assumptions; basis has
    T_t with h~_t = T_t h_t where one was found.
    """

    verdict: str
    a: SymbolicSystem
    b: SymbolicSystem
    point: Mapping[Symbol, Expr] | None = None
    entry: tuple[int, int] | None = None
    value: Expr | None = None
    basis: tuple[ImmutableMatrix, ...] | None = None

    def __bool__(self) -> bool:
        """Whether the equality is proved."""
        return self.verdict == "yes"

    def latex(self) -> str:
        """The map both share, or the counterexample, as one formula."""
        if self.verdict == "yes":
            return f"M = \\tilde M = {sympy.latex(self.a.map())}"
        if self.point is None or self.entry is None:
            return "M \\overset{?}{=} \\tilde M"
        at = ",\\ ".join(f"{sympy.latex(s)} = {sympy.latex(v)}" for s, v in self.point.items())
        t, j = (i + 1 for i in self.entry)
        value = sympy.latex(sympy.N(self.value, 6))
        return f"M_{{{t},{j}}} - \\tilde M_{{{t},{j}}} = {value} \\quad ({at})"


def equivalent(
    system_a: SymbolicSystem | str,
    system_b: SymbolicSystem | str,
    assumptions: Mapping[str | Symbol, Assumption] | None = None,
    *,
    length: int = 3,
    size: int = 2,
    basis: bool = True,
) -> Equivalence:
    """Whether two systems have the same map for every value of their inputs, at this length.

    Equal families of symbols are equal inputs; `assumptions` put some in terms of others, in both
    systems (see `SymbolicSystem.substitute`): {"k": "1 - a"}. Names are built with `length` and
    `size` (the states of a head). Each entry of the difference is proved to be zero as a rational
    function of the symbols and their exponentials, or evaluated at rational points inside the
    domains of the inputs; what neither settles is "undecided". With `basis` a change of basis is
    looked for where the answer is yes. "yes" is proved for this length and size alone, wherever
    both maps are defined.

    Cost: the map has length^2 entries, whose size grows with the number of states and past
    tokens; meant for lengths of 2 to 5. Raises DsfShapeError where lengths, inputs or outputs
    differ, DsfValueError on unknown names and families.
    """
    a, b = (
        system(s, length=length, size=size) if isinstance(s, str) else s
        for s in (system_a, system_b)
    )
    a, b = (s.substitute(assumptions or {}, like=o) for s, o in ((a, b), (b, a)))
    left, right = a.map(), b.map()
    if a.length != b.length or left.shape != right.shape:
        raise DsfShapeError(
            f"dsf.symbolic.equivalent: system_b: expected a map {left.shape} over {a.length} "
            f"tokens, got {right.shape} over {b.length}; both are fixed by system_a."
        )
    difference = left - right
    places = {**a.places, **b.places}
    domains = {s: FAMILIES[f].domain for s, (f, _) in places.items() if f in FAMILIES}
    verdict = "yes"
    for entry in ((i, j) for i in range(left.rows) for j in range(left.cols)):
        e = difference[entry]
        if is_proved_zero(e):
            continue
        found = counterexample(e, domains)
        if found is not None:
            return Equivalence("no", a, b, found[0], entry, found[1])
        verdict = "undecided"
    if verdict == "undecided":
        return Equivalence(verdict, a, b)
    return Equivalence(verdict, a, b, basis=change_of_basis(a, b) if basis else None)
