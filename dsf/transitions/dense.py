"""A_t as a full matrix: the structure every other one widens to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from torch import Tensor

from dsf.transitions._base import Transition, mm, register


@register
@dataclasses.dataclass(frozen=True)
class Dense(Transition):
    """Any matrix, (batch, time, head, state, state). Cost per step: state squared per channel."""

    structure: ClassVar[str] = "dense"
    matrix: Tensor

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states."""
        return self.matrix.shape[-1]

    def apply(self, state: Tensor) -> Tensor:
        """A h."""
        return mm(self.matrix, state)

    def apply_transposed(self, state: Tensor) -> Tensor:
        """A^T h."""
        return mm(self.matrix.mT, state)

    def compose(self, earlier: Self) -> Self:
        """Matrix product."""
        return type(self)(mm(self.matrix, earlier.matrix))

    def widen(self) -> Self:
        """Itself."""
        return self

    def as_dense(self) -> Tensor:
        """(batch, time, head, state, state)."""
        return self.matrix
