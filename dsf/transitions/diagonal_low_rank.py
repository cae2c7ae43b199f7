"""A_t = diag(a_t) - U_t V_t^T: gated delta rules, KDA, RWKV-7, S4."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact, broadcast_shapes
from dsf.transitions._base import Transition, mm, register
from dsf.transitions._decay import Decay


@register
@dataclasses.dataclass(frozen=True)
class DiagonalLowRank(Decay):
    """diag(a_t) - left_t right_t^T with left, right (batch, time, head, state, rank).

    The minus sign is the delta rule's: A = diag(a) - beta k (a*k)^T erases along k.
    """

    structure: ClassVar[str] = "diagonal_low_rank"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "log_decay": ("state",), "sign": ("state",), "phase": ("state",),
        "left": ("state", "rank"), "right": ("state", "rank"),
    }  # fmt: skip
    left: Tensor = dataclasses.field(kw_only=True)
    right: Tensor = dataclasses.field(kw_only=True)

    @property
    def n_state(self) -> int:  # type: ignore[override]
        """Number of states."""
        return self.log_decay.shape[-1]

    @property
    def is_complex(self) -> bool:
        """Whether the diagonal or the low-rank part is complex."""
        return self.phase is not None or self.left.is_complex() or self.right.is_complex()

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a * h - U (V^T h)."""
        return self.decay()[..., None] * state - mm(self.left, mm(self.right.mT, state))

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a * h - V (U^T h)."""
        return self.decay()[..., None] * state - mm(self.right, mm(self.left.mT, state))

    def compose(self, earlier: DiagonalLowRank) -> DiagonalLowRank:
        """(D2 - U2 V2^T)(D1 - U1 V1^T): ranks add, so long products are better dense."""
        d2, d1 = self.decay()[..., None], earlier.decay()[..., None]
        inner = mm(self.right.mT, earlier.left)
        left = _cat(d2 * earlier.left - mm(self.left, inner), self.left)
        right = _cat(earlier.right, d1 * self.right)
        return DiagonalLowRank(*self._product(earlier), left=left, right=right)

    def widen(self) -> Transition:
        """Dense."""
        from dsf.transitions.dense import Dense

        return Dense(self.as_dense())

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        outer = torch.einsum("...nr,...mr->...nm", self.left, self.right)
        return torch.diag_embed(self.decay()) - outer

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Chunks in the WY form."""
        from dsf.chunked import scan_diagonal_low_rank

        return scan_diagonal_low_rank(self, B, C, values, state, chunk)

    def triton_gap(self, n_channel: int) -> str:
        """Real, positive decays with rank 1, of at most 128 states and channels, have one."""
        from dsf.kernel_scans import low_rank_gap

        return low_rank_gap(self, n_channel)

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Diagonal plus rank 1."""
        from dsf.kernel_scans import scan_low_rank

        return scan_low_rank(self, B, C, values, state)


def _cat(a: Tensor, b: Tensor) -> Tensor:
    lead = broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*lead, a.shape[-1]), b.expand(*lead, b.shape[-1])], dim=-1)
