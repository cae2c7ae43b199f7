"""A_t as a full matrix: the structure every other one widens to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, mm, register


@register
@dataclasses.dataclass(frozen=True)
class Dense(Transition):
    """Any matrix, (batch, time, head, state, state). Cost per step: state squared per channel."""

    structure: ClassVar[str] = "dense"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {"matrix": ("state", "state")}
    generality: ClassVar[int] = 4
    matrix: Tensor

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states."""
        return self.matrix.shape[-1]

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """A h."""
        return mm(self.matrix, state)

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """A^T h."""
        return mm(self.matrix.mT, state)

    def compose(self, earlier: Dense) -> Dense:
        """Matrix product."""
        return Dense(mm(self.matrix, earlier.matrix))

    def widen(self) -> Dense:
        """Itself."""
        return self

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        return self.matrix
