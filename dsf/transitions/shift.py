"""A shift register: the last K inputs of a short convolution."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import torch
from torch import Tensor

from dsf.transitions._base import Transition, register, static


@register
@dataclasses.dataclass(frozen=True)
class Shift(Transition):
    """h_new[i] = h[i - amount], zeros moved in at the front. No tensor, no arithmetic."""

    structure: ClassVar[str] = "shift"
    n_state: int = static()
    amount: int = static(default=1)

    def apply(self, state: Tensor) -> Tensor:
        """States moved down by `amount`."""
        kept = state[..., : max(self.n_state - self.amount, 0), :]
        return torch.cat([torch.zeros_like(state)[..., : self.n_state - kept.shape[-2], :], kept],
                         dim=-2)  # fmt: skip

    def apply_transposed(self, state: Tensor) -> Tensor:
        """States moved up by `amount`."""
        kept = state[..., min(self.amount, self.n_state) :, :]
        return torch.cat([kept, torch.zeros_like(state)[..., : self.n_state - kept.shape[-2], :]],
                         dim=-2)  # fmt: skip

    def compose(self, earlier: Self) -> Self:
        """Amounts add."""
        return type(self)(self.n_state, self.amount + earlier.amount)

    def widen(self) -> Transition:
        """Dense."""
        from dsf.transitions.dense import Dense

        return Dense(self.as_dense())

    def as_dense(self) -> Tensor:
        """(1, 1, 1, state, state)."""
        ones = torch.ones(max(self.n_state - self.amount, 0), dtype=torch.float64)
        if self.amount >= self.n_state:
            return torch.zeros(1, 1, 1, self.n_state, self.n_state, dtype=torch.float64)
        return torch.diag_embed(ones, offset=-self.amount)[None, None, None]
