"""Structured B and C, where a dense tensor would be length x length: the cache and map rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dsf.transitions._base import register, static


@register
@dataclasses.dataclass(frozen=True)
class OneHot:
    """B_t = e_{offset + t}: step t writes its value into slot offset + t of a cache.

    Axes as B: (1, length, 1, n_slot, 1); nothing is stored.
    """

    length: int = static()
    n_slot: int = static()
    offset: int = static(default=0)

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense tensor it stands for."""
        return torch.Size((1, self.length, 1, self.n_slot, 1))

    @property
    def ndim(self) -> int:
        """5, as B."""
        return 5

    def as_dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense B: for tests and small lengths."""
        slots = torch.arange(self.length)[:, None] + self.offset == torch.arange(self.n_slot)
        return slots.to(dtype)[None, :, None, :, None]

    def time_slice(self, start: int, stop: int) -> OneHot:
        """Steps start..stop-1; the slots keep their meaning."""
        return OneHot(stop - start, self.n_slot, self.offset + start)


class MixingRows:
    """C whose row t is row t of an attention map, computed when asked for, tile by tile.

    With A = I and B = OneHot the system's map is the causal part of these rows. A subclass gives
    `tile`, `shape` and `time_slice`; `n_key` is the number of slots.
    """

    shape: torch.Size
    causal: bool

    @property
    def n_key(self) -> int:
        """Number of keys, the columns of the map."""
        return self.shape[-1]

    @property
    def ndim(self) -> int:
        """5, as C."""
        return 5

    def tile(self, queries: slice, keys: slice) -> Tensor:
        """Weights (batch, head, query, key) of some rows and columns, nothing else computed."""
        raise NotImplementedError

    def time_slice(self, start: int, stop: int) -> MixingRows:
        """The rows of steps start..stop-1."""
        raise NotImplementedError

    def mix(self, values: Tensor) -> Tensor:
        """All rows times `values` (batch, head, key, channel): memory O(block x n_key)."""
        block = max(1, 2**22 // max(self.n_key, 1))
        length, every = self.shape[1], slice(0, self.n_key)
        rows = [
            self.tile(slice(t, min(t + block, length)), every).to(values.dtype) @ values
            for t in range(0, length, block)
        ]
        if not rows:
            batch, head = torch.broadcast_shapes(
                values.shape[:2], (self.shape[0], self.shape[2]))  # fmt: skip
            return values.new_zeros(batch, head, 0, values.shape[-1])
        return torch.cat(rows, dim=2)


@register
@dataclasses.dataclass(frozen=True)
class ExplicitRows(MixingRows):
    """Rows that are already there: a map (batch, head, query, key), for instance a returned one.

    `causal` says that entries above the diagonal are zero; it is not enforced.
    """

    weights: Tensor
    causal: bool = static(default=True)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch, head, query, key = self.weights.shape
        return torch.Size((batch, query, head, 1, key))

    def tile(self, queries: slice, keys: slice) -> Tensor:
        """A view of the stored map."""
        return self.weights[..., queries, keys]

    def time_slice(self, start: int, stop: int) -> ExplicitRows:
        """Some rows of the stored map."""
        return ExplicitRows(self.weights[:, :, start:stop], self.causal)


@register
@dataclasses.dataclass(frozen=True)
class SoftmaxRows(MixingRows):
    """Rows of softmax attention, exact, without the map being stored.

        w_tj = exp(z_tj) / (sum_i exp(z_ti) + exp(sink)),  z_tj = scale q_t.k_j (soft-capped) + bias_tj

    over the keys that `causal`, `window` and `key_mask` leave. query (batch, time, head, width),
    key (batch, key, group, width): head h uses group h // (head/group). bias broadcasts to
    (batch, head, query, key) and may be -inf; key_mask (batch, key) is True for real keys; softcap
    c gives c tanh(z/c) before the bias; sink (head,) adds a column without value, so rows sum to
    less than one. window w keeps t - j < w (and, if not causal, |t - j| < w). A row without
    any key is zero. Query row r stands at position query_start + r.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    sink: Tensor | None = None
    scale: float | None = static(default=None)
    causal: bool = static(default=True)
    window: int | None = static(default=None)
    softcap: float | None = static(default=None)
    query_start: int = static(default=0)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch, time, head, _ = self.query.shape
        return torch.Size((batch, time, head, 1, self.key.shape[1]))

    @property
    def logit_scale(self) -> float:
        """`scale`, by default width^(-1/2)."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def logits(self, queries: slice, keys: slice) -> Tensor:
        """z (batch, head, query, key), -inf where nothing may be seen."""
        rows = range(*queries.indices(self.query.shape[1]))
        cols = range(*keys.indices(self.n_key))
        q = self.query[:, rows.start : rows.stop].transpose(1, 2)
        k = self.key[:, cols.start : cols.stop].transpose(1, 2)
        grouped = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
        z = (grouped @ k.mT[:, :, None]).flatten(1, 2) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.bias is not None:
            z = z + _tile_of(self.bias, rows, cols)
        return z.masked_fill(~self._visible(rows, cols, z.device), -math.inf)

    def _visible(self, rows: range, cols: range, device: torch.device) -> Tensor:
        position = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.query_start
        lag = position - torch.arange(cols.start, cols.stop, device=device)
        seen = torch.ones_like(lag, dtype=torch.bool)
        if self.causal:
            seen = lag >= 0
        if self.window is not None:
            seen = seen & (lag.abs() < self.window)
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, None, cols.start : cols.stop].bool()
        return seen

    def tile(self, queries: slice, keys: slice) -> Tensor:
        """Softmax over all keys of the asked rows, then the asked columns. O(rows x n_key x d)."""
        z = self.logits(queries, slice(0, self.n_key))
        top = z.amax(-1, keepdim=True) if self.n_key else z.new_zeros(*z.shape[:-1], 1)
        if self.sink is not None:
            top = torch.maximum(top, self.sink[None, :, None, None])
        top = top.detach().masked_fill(top == -math.inf, 0.0)
        e = torch.exp(z - top)
        total = e.sum(-1, keepdim=True)
        if self.sink is not None:
            total = total + torch.exp(self.sink[None, :, None, None] - top)
        return e[..., keys] / total.masked_fill(total == 0, 1.0)

    def time_slice(self, start: int, stop: int) -> SoftmaxRows:
        """The rows of steps start..stop-1 over the same keys."""
        bias = self.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., start:stop, :]
        return dataclasses.replace(
            self, query=self.query[:, start:stop], bias=bias,
            query_start=self.query_start + start,
        )  # fmt: skip

    def mix(self, values: Tensor) -> Tensor:
        """Through scaled_dot_product_attention where it can say the same, else by tiles."""
        plain = self.softcap is None and self.sink is None and self.window is None
        if not plain or self.key_mask is not None or self.query_start or not self.n_key:
            return super().mix(values)
        return _sdpa(self, values)


def _tile_of(x: Tensor, rows: range, cols: range) -> Tensor:
    x = x[..., rows.start : rows.stop, :] if x.shape[-2] > 1 else x
    return x[..., cols.start : cols.stop] if x.shape[-1] > 1 else x


def _sdpa(rows: SoftmaxRows, values: Tensor) -> Tensor:
    heads = rows.query.shape[2]
    q, k = rows.query.transpose(1, 2), rows.key.transpose(1, 2)
    k = k.repeat_interleave(heads // k.shape[1], 1)
    v = values.expand(-1, heads, -1, -1).to(q.dtype)
    mask: Any = rows.bias
    if mask is not None:
        mask = mask.expand(q.shape[0], heads, q.shape[2], k.shape[2]).to(q.dtype)
        if rows.causal:
            seen = rows._visible(range(q.shape[2]), range(k.shape[2]), q.device)
            mask = mask.masked_fill(~seen, -math.inf)
        empty = (mask == -math.inf).all(-1, keepdim=True)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask.masked_fill(empty, 0.0), scale=rows.logit_scale)  # fmt: skip
        return out.masked_fill(empty, 0.0)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=rows.causal, scale=rows.logit_scale)  # fmt: skip
