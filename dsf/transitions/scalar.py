"""A_t = a_t I: one decay per head (RetNet, Mamba-2, normalised attention, mLSTM)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.shapes import Inexact
from dsf.transitions._base import Transition, register, static
from dsf.transitions._decay import Decay, split_decay


@register
@dataclasses.dataclass(frozen=True)
class Scalar(Decay):
    """a_t I with a = sign * exp(log_decay + i phase), each (batch, time, head)."""

    structure: ClassVar[str] = "scalar"
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {"log_decay": (), "sign": (), "phase": ()}
    generality: ClassVar[int] = 1
    n_state: int = static(kw_only=True)

    @classmethod
    def from_decay(cls, decay: Inexact[Tensor, "batch time head"], n_state: int) -> Scalar:
        """From the decay numbers, (batch, time, head), real or complex."""
        return cls(*split_decay(decay), n_state=n_state)

    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a h."""
        return self.decay()[..., None, None] * state

    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """a h."""
        return self.apply(state)

    def compose(self, earlier: Scalar) -> Scalar:
        """Logs add."""
        return Scalar(*self._product(earlier), n_state=self.n_state)

    def widen(self) -> Transition:
        """The same number on every state."""
        from dsf.transitions.diagonal import Diagonal

        def spread(x: Tensor) -> Tensor:
            return x[..., None].expand(*x.shape, self.n_state)

        sign = None if self.sign is None else spread(self.sign)
        phase = None if self.phase is None else spread(self.phase)
        return Diagonal(spread(self.log_decay), sign, phase)

    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """(batch, time, head, state, state)."""
        a = self.decay()
        eye = torch.eye(self.n_state, dtype=a.dtype, device=a.device)
        return a[..., None, None] * eye

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decay-masked linear attention by chunks."""
        from dsf.chunked import scan_scalar

        return scan_scalar(self, B, C, values, state, chunk)

    def triton_gap(self, n_channel: int) -> str:
        """Real decays of at most 256 states and channels have one."""
        from dsf.kernel_scans import decay_gap

        return decay_gap(self, n_channel)

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One fused pass over chunks."""
        from dsf.kernel_scans import scan_scalar

        return scan_scalar(self, B, C, values, state)
