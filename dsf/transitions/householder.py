"""A_t = I - beta_t k_t k_t^T: the delta rule erases along one direction."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, mm, register


@register
@dataclasses.dataclass(frozen=True)
class Householder(Transition):
    """I - beta k k^T; write_strength beta (batch, time, head), direction k (..., state).

    beta = 0 is the identity, beta = 1 with unit k a projection, beta = 2 a reflection.
    """

    structure: ClassVar[str] = "householder"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "write_strength": (), "direction": ("state",),
    }  # fmt: skip
    generality: ClassVar[int] = 2
    write_strength: Tensor
    direction: Tensor

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states."""
        return self.direction.shape[-1]

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """h - beta k (k^T h)."""
        k = self.direction[..., None]
        return state - self.write_strength[..., None, None] * k * mm(k.mT, state)

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """The matrix is symmetric."""
        return self.apply(state)

    def compose(self, earlier: Householder) -> Transition:
        """A product of two reflections: rank two off the identity."""
        return self.widen().compose(earlier.widen())

    def widen(self) -> Transition:
        """Diagonal of ones minus a rank-one part."""
        from dsf.transitions.diagonal_low_rank import DiagonalLowRank

        k = self.direction
        scaled = self.write_strength[..., None] * k
        zero = torch.zeros_like(scaled.real)  # a decay's logarithm is real, also for complex k
        return DiagonalLowRank(zero, left=scaled[..., None], right=k[..., None])

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        eye = torch.eye(self.n_state, dtype=self.direction.dtype, device=self.direction.device)
        outer = torch.einsum("...n,...m->...nm", self.direction, self.direction)
        return eye - self.write_strength[..., None, None] * outer

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Chunks in the WY form, with the unit diagonal left out."""
        from dsf.chunked import scan_diagonal_low_rank

        return scan_diagonal_low_rank(self, B, C, values, state, chunk)

    def triton_gap(self, n_channel: int) -> str:
        """Real ones of at most 128 states and channels have one."""
        from dsf.kernel_scans import low_rank_gap

        return low_rank_gap(self, n_channel)

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As a delta rule where B is its own, else as diagonal plus rank 1."""
        from dsf.kernel_scans import scan_householder

        return scan_householder(self, B, C, values, state)
