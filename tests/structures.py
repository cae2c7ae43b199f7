"""Seeded transitions and recurrences of every structure: the material of the laws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dsf
from dsf.transitions import (
    BlockDiagonal,
    Dense,
    Diagonal,
    DiagonalLowRank,
    Householder,
    Identity,
    Scalar,
    Shift,
    Transition,
)

EDGES = (0.0, 1.0, -1.0, 0.5, 1 - 1e-6, 1e-30, -1e-30, 1e-4)
"""Decays at which a scan may break; mixed with uniform ones in (-1, 1)."""

N_STATE = 4
"""States of every structure here: two blocks of two."""


class Draw:
    """Seeded numbers of one dtype: the same seed gives the same numbers in every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def complex_normal(self, *shape: int) -> Tensor:
        return torch.complex(self.normal(*shape), self.normal(*shape)) * 0.5**0.5

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * x).to(self.dtype)

    def choice(self, options: tuple[float, ...], *shape: int) -> Tensor:
        index = torch.randint(len(options), shape, generator=self.generator)
        return torch.tensor(options, dtype=torch.float64)[index].to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """Half edges, half uniform in (-1, 1)."""
        edge = self.uniform(*shape) < 0.5
        return torch.where(edge, self.choice(EDGES, *shape), self.uniform(*shape, low=-1))

    def unit(self, *shape: int) -> Tensor:
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)

    def orthogonal(self, *shape: int) -> Tensor:
        """Times a number in (0, 1), so that the norm is known."""
        q, _ = torch.linalg.qr(self.normal(*shape).double())
        return q.to(self.dtype) * self.uniform(*shape[:-2], 1, 1)


def _scalar_complex(d: Draw, *lead: int) -> Scalar:
    return Scalar(-d.uniform(*lead), phase=d.normal(*lead), n_state=N_STATE)


def _diagonal_complex(d: Draw, *lead: int) -> Diagonal:
    return Diagonal(-d.uniform(*lead, N_STATE), phase=d.normal(*lead, N_STATE))


def _householder(d: Draw, *lead: int) -> Householder:
    strength = torch.where(
        d.uniform(*lead) < 0.5, d.choice((0.0, 1.0, 2.0), *lead), d.uniform(*lead, high=2)
    )
    return Householder(strength, d.unit(*lead, N_STATE))


def _low_rank(d: Draw, *lead: int) -> DiagonalLowRank:
    left, right = (0.4 * d.normal(*lead, N_STATE, 2) for _ in range(2))
    return DiagonalLowRank(-d.uniform(*lead, N_STATE), left=left, right=right)


def _low_rank_signed(d: Draw, *lead: int) -> DiagonalLowRank:
    parts = Diagonal.from_decay(d.decay(*lead, N_STATE))
    plain = _low_rank(d, *lead)
    return DiagonalLowRank(parts.log_decay, parts.sign, left=plain.left, right=plain.right)


def _low_rank_complex(d: Draw, *lead: int) -> DiagonalLowRank:
    left, right = (0.3 * d.complex_normal(*lead, N_STATE, 1) for _ in range(2))
    return DiagonalLowRank(
        -d.uniform(*lead, N_STATE), phase=d.normal(*lead, N_STATE), left=left, right=right
    )


def _dense_complex(d: Draw, *lead: int) -> Dense:
    q, _ = torch.linalg.qr(d.complex_normal(*lead, N_STATE, N_STATE))
    return Dense(q * d.uniform(*lead, 1, 1))


STRUCTURES: dict[str, Callable[..., Transition]] = {
    "identity": lambda d, *lead: Identity(N_STATE),
    "scalar": lambda d, *lead: Scalar(-d.uniform(*lead), n_state=N_STATE),
    "scalar_signed": lambda d, *lead: Scalar.from_decay(d.decay(*lead), N_STATE),
    "scalar_complex": _scalar_complex,
    "diagonal": lambda d, *lead: Diagonal(-d.uniform(*lead, N_STATE)),
    "diagonal_signed": lambda d, *lead: Diagonal.from_decay(d.decay(*lead, N_STATE)),
    "diagonal_complex": _diagonal_complex,
    "householder": _householder,
    "diagonal_low_rank": _low_rank,
    "diagonal_low_rank_signed": _low_rank_signed,
    "diagonal_low_rank_complex": _low_rank_complex,
    "block_diagonal": lambda d, *lead: BlockDiagonal(d.orthogonal(*lead, 2, 2, 2), 2),
    "block_diagonal_shared": lambda d, *lead: BlockDiagonal(d.orthogonal(*lead, 1, 2, 2), 2),
    "shift": lambda d, *lead: Shift(N_STATE),
    "dense": lambda d, *lead: Dense(d.orthogonal(*lead, N_STATE, N_STATE)),
    "dense_complex": _dense_complex,
}
"""Every structure, real, signed (with exact zeros), complex: builder(draw, batch, time, head)."""

SMOOTH = [n for n in STRUCTURES if not n.endswith("signed")]
"""Those whose decays have no exact zero, so that every derivative is a limit of differences."""


def complex_structure(name: str) -> bool:
    """Whether A of this structure is complex."""
    return name.endswith("complex")


def transition(
    name: str,
    seed: int,
    lead: tuple[int, int, int] = (2, 7, 3),
    dtype: torch.dtype = torch.float64,
) -> Transition:
    """One transition; complex ones come in the complex dtype of the same precision."""
    return STRUCTURES[name](Draw(seed, dtype), *lead)


def recurrence(
    name: str, seed: int = 0, *, batch: int = 2, length: int = 7, head: int = 3, n_input: int = 1,
    n_output: int = 1, dtype: torch.dtype = torch.float64, direct: bool = True,
    initial: int = 0, shared: bool = False, time_invariant: bool = False,
) -> dsf.Recurrence:  # fmt: skip
    """A system of one structure. `initial`: channels of an initial state, 0 for none.

    `shared`: A and B of size 1 along batch and head; `time_invariant`: all of size 1 along time.
    """
    d = Draw(seed + 1000, dtype)
    b, h = (1, 1) if shared else (batch, head)
    t = 1 if time_invariant else length
    complex_input = complex_structure(name) and not shared
    draw = d.complex_normal if complex_input else d.normal
    return dsf.Recurrence(
        transition(name, seed, (b, t, h), dtype),
        draw(b, t, h, N_STATE, n_input),
        draw(batch, t, head, n_output, N_STATE),
        d.normal(1, 1, head, n_output, n_input) if direct else None,
        d.normal(batch, head, N_STATE, initial) if initial else None,
        system=name,
    )  # fmt: skip


def values_for(r: dsf.Recurrence, seed: int = 0, *, length: int | None = None, channel: int = 5,
               batch: int = 2, head: int = 3) -> Tensor:  # fmt: skip
    """Values that fit, real, in the precision of the system."""
    d = Draw(seed + 2000, torch.zeros(0, dtype=r.dtype).real.dtype)
    length = r.length if length is None else length
    shape = (batch, length, head) + ((r.n_input,) if r.n_input > 1 else ()) + (channel,)
    return d.normal(*shape)
