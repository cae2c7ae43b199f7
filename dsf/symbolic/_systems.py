"""One system in symbols: A_t, B_t, C_t, D_t of every token, and the map they imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import sympy
from sympy import Expr, ImmutableMatrix, Matrix, Symbol

from dsf.errors import DsfValueError
from dsf.symbolic._formulas import parsed
from dsf.symbolic._inputs import FAMILIES, Inputs, Place, scalar, symbol

Assumption: TypeAlias = "str | float | Expr | Callable[..., Expr | int]"
Coefficient = Callable[[int], Matrix]


@dataclasses.dataclass(frozen=True)
class SymbolicSystem:
    """h_t = A_t h_{t-1} + B_t u_t,  y_t = C_t h_t + D_t u_t for t = 1..length, h_0 = 0.

    A, B, C, D: one matrix a token, (state, state), (state, input), (output, state), (output,
    input). places tells family and indices of every symbol. mode is that of the numeric system:
    "exact", or "exact_along_trajectory" where gates or values depend on the state, so that the
    symbols are the numbers of one trajectory. Source: Sieber et al. (2024), equation 11.
    """

    name: str
    A: tuple[ImmutableMatrix, ...]
    B: tuple[ImmutableMatrix, ...]
    C: tuple[ImmutableMatrix, ...]
    D: tuple[ImmutableMatrix, ...]
    places: Mapping[Symbol, Place]
    mode: str = "exact"

    @classmethod
    def of(
        cls, name: str, x: Inputs, A: Coefficient, B: Coefficient, C: Coefficient,
        D: Coefficient | None = None, mode: str = "exact",
    ) -> SymbolicSystem:  # fmt: skip
        """The system whose coefficients are functions of the token, in the symbols of `x`."""
        steps = range(1, x.length + 1)
        a, b, c = ([ImmutableMatrix(f(t)) for t in steps] for f in (A, B, C))
        zero = [sympy.zeros(c[0].rows, b[0].cols)] * x.length if c else []
        d = [ImmutableMatrix(m) for m in (zero if D is None else [D(t) for t in steps])]
        return cls(name, tuple(a), tuple(b), tuple(c), tuple(d), dict(x.places), mode)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.A)

    @property
    def n_state(self) -> int:
        """Number of states."""
        return self.A[0].rows

    def map(self) -> ImmutableMatrix:
        """M_tj = C_t A_t ... A_{j+1} B_j + [t = j] D_t for j <= t, zero above.

        (length output, length input): the rows of token t stand together. Nothing is simplified.
        Cost: length^2 products of a matrix with a column.
        """
        n_out, n_in = self.D[0].shape
        result = sympy.zeros(self.length * n_out, self.length * n_in)
        for j in range(self.length):
            state = self.B[j]
            for t in range(j, self.length):
                state = self.A[t] * state if t > j else state
                weight = self.C[t] * state + (self.D[t] if t == j else sympy.zeros(n_out, n_in))
                result[t * n_out : (t + 1) * n_out, j * n_in : (j + 1) * n_in] = weight
        return ImmutableMatrix(result)

    def coefficients(self) -> dict[str, tuple[ImmutableMatrix, ...]]:
        """A, B, C, D by name."""
        return {"A": self.A, "B": self.B, "C": self.C, "D": self.D}

    def substitute(
        self, assumptions: Mapping[str | Symbol, Assumption], like: SymbolicSystem | None = None
    ) -> SymbolicSystem:
        """The system with families of symbols put in terms of others, all at once.

        A key is a family (`dsf.symbolic.FAMILIES`), all of whose symbols are replaced, or one
        symbol. A value is a number, a sympy expression, text ("1 - a": families at the same
        indices, or at as many of them as they have here or in `like`), or a function of the
        indices. Raises DsfValueError on a family that is none and on text that is no formula.
        """
        known = {**({} if like is None else like.places), **self.places}
        swap: dict[Symbol, Expr] = {}
        for key, value in assumptions.items():
            if isinstance(key, str) and key not in FAMILIES:
                raise DsfValueError(
                    f"dsf.symbolic: assumptions: expected families among {list(FAMILIES)}, got "
                    f"{key!r}."
                )
            for made, (family, indices) in self.places.items():
                if key in (family, made):
                    swap[made] = _value(value, indices, known)
        changed = {
            name: tuple(m.xreplace(swap) for m in matrices)
            for name, matrices in self.coefficients().items()
        }
        return dataclasses.replace(self, **changed, places=known)

    def change_of_basis(self, T: Mapping[int, Matrix] | Callable[[int], Matrix]) -> SymbolicSystem:
        """T_t A_t T_{t-1}^-1, T_t B_t, C_t T_t^-1 for t = 1..length; T_0 is the identity.

        The map stays what it is. Source: Sieber et al. (2024); Kailath (1980).
        """
        bases = [T(t) if callable(T) else T[t] for t in range(1, self.length + 1)]
        inverses = [sympy.eye(self.n_state), *(basis.inv() for basis in bases)]
        A = [b * a * i for b, a, i in zip(bases, self.A, inverses[:-1], strict=True)]
        B = [b * x for b, x in zip(bases, self.B, strict=True)]
        C = [x * i for x, i in zip(self.C, inverses[1:], strict=True)]
        names = {"A": A, "B": B, "C": C}
        return dataclasses.replace(
            self, **{n: tuple(map(ImmutableMatrix, x)) for n, x in names.items()}
        )

    def text(self) -> str:
        """A, B, C, D of the last token and the map, for a terminal."""
        t = self.length
        named = {f"{name}_{t}": ms[-1] for name, ms in self.coefficients().items()}
        return "\n\n".join(
            f"{name} =\n{sympy.pretty(m, use_unicode=True, wrap_line=False)}"
            for name, m in {**named, "M": self.map()}.items()
        )

    def latex(self, t: int | None = None) -> str:
        """A, B, C, D of token t (the last one unless given) and the map, as an `align*`."""
        t = self.length if t is None else t
        if not 1 <= t <= self.length:
            raise DsfValueError(f"dsf.symbolic: t: expected a token of 1..{self.length}, got {t}.")
        lines = [
            f"{name}_{{{t}}} &= {sympy.latex(matrices[t - 1])}"
            for name, matrices in self.coefficients().items()
        ]
        lines.append(f"M &= {sympy.latex(self.map())}")
        return "\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}"


def _value(value: Assumption, indices: tuple[int, ...], places: dict[Symbol, Place]) -> Expr:
    """What a symbol with these indices becomes; new symbols are added to `places`."""
    if callable(value) and not isinstance(value, Expr):
        made = sympy.sympify(value(*indices))
    elif isinstance(value, str):
        known = {place: s for s, place in places.items()}
        names = {n: _same_place(n, indices, known) for n in FAMILIES}
        made = parsed(value, names)
    else:
        made = sympy.sympify(value)
    for s in made.free_symbols - set(places):
        alike = ((n, i) for n in FAMILIES for i in _heads(indices) if symbol(n, *i) == s)
        places[s] = next(alike, (str(s), ()))  # type: ignore[index]
    return made


def _heads(indices: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [indices[:n] for n in range(len(indices), -1, -1)]


def _same_place(family: str, indices: tuple[int, ...], known: Mapping[Place, Symbol]) -> Symbol:
    """The family's symbol with the most of these indices; with all of them if it is new."""
    for part in (*_heads(indices), indices[1:]):
        if (family, part) in known:
            return known[family, part]
    return symbol(family, *indices)


def identity(n: int) -> Coefficient:
    """A_t = I."""
    return lambda t: sympy.eye(n)


def one(t: int) -> Matrix:
    """The number one as a matrix: C of a system that puts its only state out."""
    return scalar(1)
