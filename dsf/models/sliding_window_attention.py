"""Sliding window attention: a shift register of the last values, read by a softmax over lags."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.models._heads import check_query_key, share_groups
from dsf.models._projections import HeadedMixer
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate
from dsf.shapes import Float
from dsf.transitions import Shift

SYSTEM = "sliding_window_attention"


def sliding_window_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    window: int,
    *,
    log_decay: Float[Tensor, "batch time head"] | None = None,
    scale: float | None = None,
    sink: Float[Tensor, " head"] | None = None,
) -> Recurrence:
    """Softmax over the last `window` tokens, as a system of `window` states.

        A = shift,   B = e_1,   C_t[i] = softmax_i(scale q_t.k_(t-i)), i < window,   D = 0

    The state holds the last values, the newest first: softmax attention with a window has a finite
    system of constant memory, and this is it. log_decay adds sum_{t-i < s <= t} log f_s to lag i
    (forgetting attention in a window); sink (head,) adds a column without a value. scale is
    width^(-1/2) unless given. Cost and memory O(length x window) a head; for wide windows use
    `softmax_attention_recurrence` with its window. Raises DsfShapeError, DsfValueError on a
    window below 1. Source: Beltagy et al. (2020), section 3.1.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    if window < 1:
        raise DsfValueError(f"dsf.{SYSTEM}_recurrence: window: expected at least 1, got {window}.")
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    held = _last(share_groups(key, query.shape[2]), window)
    z = torch.einsum("bthd,bthdi->bthi", query, held)
    if log_decay is not None:
        faded = _last(log_decay[..., None], window).squeeze(-2).cumsum(-1)
        z = z + torch.cat([torch.zeros_like(faded[..., :1]), faded[..., :-1]], dim=-1)
    position = torch.arange(query.shape[1], device=z.device)[:, None]
    empty = torch.arange(window, device=z.device) > position
    z = z.masked_fill(empty[None, :, None], -torch.inf)
    if sink is not None:
        z = torch.cat([z, sink[:, None].expand(*z.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(z, dim=-1)[..., :window]
    B = weights.new_zeros(1, 1, 1, window, 1)
    B[..., 0, 0] = 1
    return Recurrence(
        Shift(window), B, weights[..., None, :], system=SYSTEM, gauge="register"
    )  # fmt: skip


def _last(x: Tensor, window: int) -> Tensor:
    """(batch, time, head, width) -> (..., window): x_t, x_(t-1), ..., zeros before the first."""
    if x.shape[1] == 0:
        return x[..., None].expand(*x.shape, window)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, window - 1, 0))
    return padded.unfold(1, window, 1).flip(-1)


class SlidingWindowAttention(HeadedMixer):
    """Multi-head softmax attention in a window, with grouped keys and rotary positions.

    rope_base None leaves positions out. Cost O(length x window x width), state window x width.
    Source: Beltagy et al. (2020); Jiang et al. (2023).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "shift (one state per token of the window)", "B": "e₁",
        "C": "softmaxᵢ(qₜ·kₜ₋ᵢ/√d), i < w", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Beltagy et al. (2020), arXiv 2004.05150; Jiang et al. (2023)"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None, window: int = 64,
        rope_base: float | None = 10000.0,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, n_group=n_group, norm=None)
        self.window, self.rope_base, self.n_past = window, rope_base, window - 1

    @classmethod
    def small(cls, width: int) -> SlidingWindowAttention:
        """Four heads, a window of four tokens, rotary positions where a head's width is even."""
        return cls(width, 4, window=4, rope_base=10000.0 if width // 4 % 2 == 0 else None)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The register's system for tokens at positions start, start + 1, ... and the values."""
        q, k, v = self.project(x)
        if self.rope_base is not None:
            tables = rotary_tables(
                x.shape[1], q.shape[-1], base=self.rope_base, start=start, dtype=x.dtype,
                device=x.device,
            )  # fmt: skip
            q, k = rotate(q, *tables), rotate(k, *tables)
        return sliding_window_attention_recurrence(q, k, self.window), v


LAYER = SlidingWindowAttention
