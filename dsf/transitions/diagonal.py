"""A_t = diag(a_t): one decay per state (S6, S4D, GLA, MetaLA, LRU, gated RNNs)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, register
from dsf.transitions._decay import Decay, split_decay


@register
@dataclasses.dataclass(frozen=True)
class Diagonal(Decay):
    """diag(a_t) with a = sign * exp(log_decay + i phase), each (batch, time, head, state)."""

    structure: ClassVar[str] = "diagonal"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "log_decay": ("state",), "sign": ("state",), "phase": ("state",),
    }  # fmt: skip
    generality: ClassVar[int] = 2

    @classmethod
    def from_decay(cls, decay: Inexact[Tensor, "batch time head state"]) -> Diagonal:
        """From the decay numbers, (batch, time, head, state), real or complex."""
        return cls(*split_decay(decay))

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states."""
        return self.log_decay.shape[-1]

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a * h."""
        return self.decay()[..., None] * state

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a * h."""
        return self.apply(state)

    def compose(self, earlier: Diagonal) -> Diagonal:
        """Logs add."""
        return Diagonal(*self._product(earlier))

    def widen(self) -> Transition:
        """Diagonal plus a low-rank part of rank zero."""
        from dsf.transitions.diagonal_low_rank import DiagonalLowRank

        a = self.decay()
        empty = a.new_zeros(*a.shape, 0)
        return DiagonalLowRank(self.log_decay, self.sign, self.phase, left=empty, right=empty)

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        return torch.diag_embed(self.decay())

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masked products by chunks, the decays multiplied in block by block."""
        from dsf.chunked import scan_diagonal

        return scan_diagonal(self, B, C, values, state, chunk)

    def triton_gap(self, n_channel: int) -> str:
        """One channel: elementwise, complex decays too; several: a matrix state of real ones."""
        from dsf.kernel_scans import decay_gap

        return decay_gap(self, n_channel)

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One fused pass over time."""
        from dsf.kernel_scans import scan_diagonal

        return scan_diagonal(self, B, C, values, state)
