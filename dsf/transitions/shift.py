"""A shift register: the last K inputs of a short convolution."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, register, static


@register
@dataclasses.dataclass(frozen=True)
class Shift(Transition):
    """h_new[i] = h[i - amount], zeros moved in at the front. No tensor, no arithmetic."""

    structure: ClassVar[str] = "shift"
    n_state: int = static()
    amount: int = static(default=1)

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """States moved down by `amount`."""
        moved = min(self.amount, self.n_state)
        kept = state[..., : self.n_state - moved, :]
        return torch.cat([torch.zeros_like(state[..., :moved, :]), kept], dim=-2)

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """States moved up by `amount`."""
        moved = min(self.amount, self.n_state)
        return torch.cat([state[..., moved:, :], torch.zeros_like(state[..., :moved, :])], dim=-2)

    def compose(self, earlier: Shift) -> Shift:
        """Amounts add."""
        return Shift(self.n_state, self.amount + earlier.amount)

    def widen(self) -> Transition:
        """Dense."""
        from dsf.transitions.dense import Dense

        return Dense(self.as_dense())

    def shape_faults(self) -> list[str]:
        """A shift goes forwards: amount at least 0."""
        if self.amount >= 0:
            return []
        return [f"A.amount: expected at least 0, got {self.amount}."]

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(1, 1, 1, state, state)."""
        row = torch.arange(self.n_state)
        ones = row[:, None] - row == self.amount
        return ones.to(torch.float64)[None, None, None]

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A short convolution, one product per lag; the loop for as many lags as steps."""
        from dsf.chunked.shift import scan_shift

        if self.amount == 0 or self.n_state // max(self.amount, 1) > 64:
            return super().scan_chunked(B, C, values, state, chunk)
        return scan_shift(self, B, C, values, state)
