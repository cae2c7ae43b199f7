"""A_t = I: nothing is forgotten (attention in its raw gauge)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, register, static


@register
@dataclasses.dataclass(frozen=True)
class Identity(Transition):
    """The n_state x n_state identity. It holds no tensor and costs nothing to apply."""

    structure: ClassVar[str] = "identity"
    generality: ClassVar[int] = 0
    n_state: int = static()

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """h."""
        return state

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """h."""
        return state

    def compose(self, earlier: Identity) -> Identity:
        """I I = I."""
        return self

    def widen(self) -> Transition:
        """A scalar decay of log 0."""
        from dsf.transitions.scalar import Scalar

        return Scalar(torch.zeros(1, 1, 1), n_state=self.n_state)

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(1, 1, 1, state, state)."""
        return torch.eye(self.n_state, dtype=torch.float64)[None, None, None]

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masked linear attention by chunks."""
        from dsf.chunked import scan_scalar

        return scan_scalar(None, B, C, values, state, chunk)

    def triton_gap(self, n_channel: int) -> str:
        """Real decays of at most 256 states and channels have one."""
        from dsf.kernel_scans import decay_gap

        return decay_gap(self, n_channel)

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One fused pass over chunks."""
        from dsf.kernel_scans import scan_scalar

        return scan_scalar(None, B, C, values, state)
