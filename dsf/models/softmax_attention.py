"""Softmax attention: a cache that is never forgotten, read by rows of a softmax."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.factors import OneHot, SoftmaxRows
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate
from dsf.scanning import scan
from dsf.shapes import Bool, Float
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional, System, core

SYSTEM = "softmax_attention"


def softmax_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    causal: bool = True,
    bias: Float[Tensor, "#batch #head #time #time"] | None = None,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " head"] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> System:
    """Exact softmax attention over values (batch, time, head, channel), one state per token.

        A = I,   B_t = e_t,   C_t = softmax_j(scale q_t.k_j + bias_tj),   D = 0

    Head h reads group h // (head/group) of the keys; its values are to be repeated likewise.
    key_mask is True for real keys; window w keeps t - j < w (|t - j| < w if not causal); softcap
    and sink as in `SoftmaxRows`; rotation is (cos, sin) of `dsf.rotary.rotary_tables`, applied to
    query and key. scale is width^(-1/2) by default. Bidirectional: both halves of one map. Memory
    O(length x width); the map itself is computed only when asked for. Raises DsfShapeError when
    groups do not divide heads. Source: Vaswani et al. (2017), eq. 1; Sieber et al. (2024), eq. 18.
    """
    check_query_key("dsf.softmax_attention_recurrence", query, key)
    if rotation is not None:
        query, key = rotate(query, *rotation), rotate(key, *rotation)
    length = query.shape[1]
    rows = SoftmaxRows(
        query, key, bias, key_mask, sink, scale=scale, causal=causal, window=window,
        softcap=softcap,
    )  # fmt: skip
    r = Recurrence(
        Identity(length), OneHot(length, length), rows, system=SYSTEM, gauge="one state per token"
    )
    return r if causal else Bidirectional.from_rows(r)


def forgetting_bias(
    log_forget: Float[Tensor, "batch time head"],
) -> Float[Tensor, "batch head time time"]:
    """sum_{j<i<=t} log f_i as an additive bias (forgetting attention); 0 above the diagonal.

    Memory O(length^2), as for every additive bias. Source: Lin et al. (2025), eq. 7.
    """
    total = log_forget.cumsum(1).transpose(1, 2)
    return (total[..., :, None] - total[..., None, :]).tril()


def softmax_log_normaliser(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    **options: Any,
) -> Float[Tensor, "batch time head"]:
    """log eta_t = log sum_{j seen} exp(z_tj), the divisor of each row, sink included.

    Options as in `softmax_attention_recurrence`. In the DSF gauge A_t = eta_(t-1)/eta_t is the
    exponential of its difference, safe at any size. -inf where nothing is seen. Memory O(block x
    length). Source: Sieber et al. (2024), eq. 18.
    """
    system = softmax_attention_recurrence(query, key, **options)
    rows = core(system).C
    assert isinstance(rows, SoftmaxRows)
    length = query.shape[1]
    block = max(1, 2**22 // max(length, 1))
    parts = [
        torch.logsumexp(rows.logits(slice(t, min(t + block, length)), slice(0, length)), -1)
        for t in range(0, length, block)
    ]
    log_eta = torch.cat(parts, dim=-1).transpose(1, 2)
    return log_eta if rows.sink is None else torch.logaddexp(log_eta, rows.sink)


class KvCache(NamedTuple):
    """What `step` keeps: rotated keys and values (batch, key, group, width), tokens seen."""

    key: Tensor
    value: Tensor
    position: int


class SoftmaxAttention(SequenceMixer):
    """Multi-head softmax attention with grouped keys, rotary positions, a window, a sink.

    width is split over n_head heads (or head_width is given); n_group key-value heads are shared
    (n_head by default). rope_base None leaves positions out. qk_norm: an RMS norm of each head's
    query and key before the rotation (Qwen3). Cost O(length^2 width); `step` costs
    O(cache), and the cache is the window or all tokens: the one system here whose memory grows.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ", "C": "softmaxⱼ(qₜ·kⱼ/√d), j ≤ t", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Vaswani et al. (2017), eq. 1; Sieber et al. (2024), eq. 18"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        n_group: int | None = None,
        head_width: int | None = None,
        causal: bool = True,
        rope_base: float | None = 10000.0,
        window: int | None = None,
        softcap: float | None = None,
        sink: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if head_width is None:
            check_divides("SoftmaxAttention", "n_head", n_head, "width", width)
        n_group = n_head if n_group is None else n_group
        check_divides("SoftmaxAttention", "n_group", n_group, "n_head", n_head)
        self.n_head, self.n_group = n_head, n_group
        self.head_width = width // n_head if head_width is None else head_width
        self.is_causal, self.rope_base = causal, rope_base
        self.window, self.softcap = window, softcap
        inner, shared = n_head * self.head_width, n_group * self.head_width
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(width, shared, bias=bias)
        self.value = nn.Linear(width, shared, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.head_width, eps=norm_eps) if qk_norm else None for _ in range(2)
        )
        self.sink = nn.Parameter(torch.zeros(n_head)) if sink else None

    @classmethod
    def small(cls, width: int) -> SoftmaxAttention:
        """Four heads, rotary positions where the width of a head is even."""
        return cls(width, 4, rope_base=10000.0 if width // 4 % 2 == 0 else None)

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query (batch, time, head, width), key and value (batch, time, group, width), rotated."""
        q = split_heads(self.query(x), self.n_head)
        k = split_heads(self.key(x), self.n_group)
        v = split_heads(self.value(x), self.n_group)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope_base is not None:
            tables = rotary_tables(
                x.shape[1], self.head_width, base=self.rope_base, start=start, dtype=x.dtype,
                device=x.device,
            )  # fmt: skip
            q, k = rotate(q, *tables), rotate(k, *tables)
        return q, k, v

    def recurrence(
        self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[System, Tensor]:
        """The cache system and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = softmax_attention_recurrence(
            q, k, causal=self.is_causal, bias=bias, key_mask=key_mask, window=self.window,
            softcap=self.softcap, sink=self.sink,
        )  # fmt: skip
        return system, share_groups(v, self.n_head)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """(batch, time, width), through scaled_dot_product_attention.

        A soft cap or a sink, which it cannot say, go by tiles of the map instead. key_mask (batch,
        time) is True for real keys; bias broadcasts to (batch, head, query, key). A query without
        any key gives the output of a zero.
        """
        if self.softcap is not None or self.sink is not None:
            return self.readout(scan(*self.recurrence(x, key_mask=key_mask, bias=bias)), x)
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        mask, empty = _mask(x, self.is_causal, self.window, key_mask, bias)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and self.is_causal,
            enable_gqa=self.n_group != self.n_head,
        )  # fmt: skip
        y = y if empty is None else y.masked_fill(empty, 0.0)
        return self.readout(y.transpose(1, 2), x)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, KvCache]:
        """One token against the cache (of the window, if there is one)."""
        position = 0 if state is None else state.position
        x = x_t[:, None]
        q, k, v = self.project(x, position)
        if state is not None:
            k = torch.cat([state.key, k], dim=1)
            v = torch.cat([state.value, v], dim=1)
        if self.window is not None:
            k, v = k[:, -self.window :], v[:, -self.window :]
        rows = SoftmaxRows(
            q, k, sink=self.sink, softcap=self.softcap, query_start=k.shape[1] - 1
        )  # fmt: skip
        y = rows.mix(share_groups(v, self.n_head).transpose(1, 2)).transpose(1, 2)
        return self.readout(y, x)[:, 0], KvCache(k, v, position + 1)


def _mask(
    x: Tensor, causal: bool, window: int | None, key_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask of scaled_dot_product_attention, and the queries that see no key."""
    if window is None and key_mask is None and bias is None:
        return None, None
    position = torch.arange(x.shape[1], device=x.device)
    lag = position[:, None] - position
    seen = (lag >= 0) if causal else torch.ones_like(lag, dtype=torch.bool)
    seen = seen if window is None else seen & (lag.abs() < window)
    seen = seen[None, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :].bool()
    mask = torch.zeros((), dtype=x.dtype, device=x.device) if bias is None else bias
    mask = torch.where(seen, mask, -torch.inf)
    empty = (mask == -torch.inf).all(-1, keepdim=True)
    return mask.masked_fill(empty, 0.0), empty


LAYER = SoftmaxAttention
