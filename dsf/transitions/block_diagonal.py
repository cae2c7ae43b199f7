"""A_t = blkdiag(A_t^1, ..., A_t^m): rotations, interconnections, ZeroS's three means."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, mm, register, static


@register
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Transition):
    """n_block equal-sized blocks, (batch, time, head, block or 1, size, size).

    A block axis of size 1 is one block shared by all: A = I_m (x) block.
    """

    structure: ClassVar[str] = "block_diagonal"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {"blocks": ("block", "size", "size")}
    blocks: Tensor
    n_block: int = static()

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states: n_block times the block size."""
        return self.n_block * self.blocks.shape[-1]

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """Each block on its own states."""
        return self._apply(self.blocks, state)

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """Each transposed block on its own states."""
        return self._apply(self.blocks.mT, state)

    def _apply(self, blocks: Tensor, state: Tensor) -> Tensor:
        split = state.unflatten(-2, (self.n_block, self.blocks.shape[-1]))
        return mm(blocks, split).flatten(-3, -2)

    def compose(self, earlier: BlockDiagonal) -> Transition:
        """Block by block; unequal block sizes meet at dense."""
        if self.blocks.shape[-1] != earlier.blocks.shape[-1]:
            return self.widen().compose(earlier.widen())
        return BlockDiagonal(mm(self.blocks, earlier.blocks), self.n_block)

    def shape_faults(self) -> list[str]:
        """Besides the axes: one block shared by all, or n_block of them."""
        faults = super().shape_faults()
        if not faults and self.blocks.shape[-3] not in (1, self.n_block):
            faults = [
                f"A.blocks: expected block={self.n_block} or 1, got {tuple(self.blocks.shape)}; "
                f"block is fixed by n_block."
            ]
        return faults

    def widen(self) -> Transition:
        """Dense."""
        from dsf.transitions.dense import Dense

        return Dense(self.as_dense())

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        size, lead = self.blocks.shape[-1], self.blocks.shape[:-3]
        full = self.blocks.new_zeros(*lead, self.n_block, size, self.n_block, size)
        picked = torch.arange(self.n_block, device=self.blocks.device)
        blocks = self.blocks.expand(*lead, self.n_block, size, size)
        full[..., picked, :, picked, :] = blocks.movedim(-3, 0)
        return full.flatten(-4, -3).flatten(-2, -1)
