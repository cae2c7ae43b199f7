"""Structured B and C, where a dense tensor would be length x length: the cache and map rows."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsf.mixing_rows import MixingRows, block_rows
from dsf.shapes import Inexact
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

    def as_dense(self, dtype: torch.dtype = torch.float64) -> Inexact[Tensor, "1 time 1 state 1"]:
        """The dense B: for tests and small lengths."""
        slots = torch.arange(self.length)[:, None] + self.offset == torch.arange(self.n_slot)
        return slots.to(dtype)[None, :, None, :, None]

    def time_slice(self, start: int, stop: int) -> OneHot:
        """Steps start..stop-1; the slots keep their meaning."""
        return OneHot(stop - start, self.n_slot, self.offset + start)

    def shape_faults(self) -> list[str]:
        """Every step needs its slot."""
        if self.offset >= 0 and self.offset + self.length <= self.n_slot and self.length >= 0:
            return []
        return [
            f"B: expected offset + length <= n_slot={self.n_slot}, got offset={self.offset}, "
            f"length={self.length}."
        ]


@register
@dataclasses.dataclass(frozen=True)
class ExplicitRows(MixingRows):
    """Rows that are already there: a map (batch, head, query, key), for instance a returned one.

    `causal` says that entries above the diagonal are zero; it is not enforced. Row r stands at
    position query_start + r.
    """

    weights: Tensor
    causal: bool = static(default=True)
    query_start: int = static(default=0)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch, head, query, key = self.weights.shape
        return torch.Size((batch, query, head, 1, key))

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """A view of the stored map."""
        return self.weights[..., queries, keys]

    def time_slice(self, start: int, stop: int) -> ExplicitRows:
        """Some rows of the stored map."""
        rows = self.weights[:, :, start:stop]
        return ExplicitRows(rows, self.causal, self.query_start + start)

    def shape_faults(self) -> list[str]:
        """Four axes."""
        if self.weights.ndim == 4:
            return []
        return [
            f"C.weights: expected axes ('batch', 'head', 'query', 'key'), got shape "
            f"{tuple(self.weights.shape)}."
        ]


@register
@dataclasses.dataclass(frozen=True)
class SoftmaxRows(MixingRows):
    """Rows of softmax attention, exact, without the map being stored.

        w_tj = exp(z_tj) / (sum_i exp(z_ti) + exp(sink))
        z_tj = scale q_t.k_j (soft-capped) + bias_tj

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
        batch = max(self.query.shape[0], self.key.shape[0])
        return torch.Size((batch, *self.query.shape[1:3], 1, self.key.shape[1]))

    @property
    def logit_scale(self) -> float:
        """`scale`, by default width^(-1/2)."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def logits(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """z (batch, head, query, key), -inf where nothing may be seen; in float32 at least."""
        rows = range(*queries.indices(self.query.shape[1]))
        cols = range(*keys.indices(self.n_key))
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        dtype = torch.promote_types(self.key.dtype, dtype)
        q = self.query[:, rows.start : rows.stop].transpose(1, 2).to(dtype)
        k = self.key[:, cols.start : cols.stop].transpose(1, 2).to(dtype)
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

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Softmax over all keys of the asked rows, then the asked columns. O(rows x n_key x d).

        A tile of few columns is made block by block of rows: the rest is not kept.
        """
        rows = range(*queries.indices(self.query.shape[1]))
        columns = len(range(*keys.indices(self.n_key)))
        block = block_rows(self)
        if len(rows) <= block or 2 * columns > self.n_key:
            return self._weights(queries, keys)
        return torch.cat(
            [self._weights(slice(start, min(start + block, rows.stop)), keys)
             for start in range(rows.start, rows.stop, block)], dim=2)  # fmt: skip

    def _weights(self, queries: slice, keys: slice) -> Tensor:
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

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """Through scaled_dot_product_attention where it can say the same, else by tiles.

        PyTorch's fused kernels can be differentiated once; `mix_part` any number of times.
        """
        plain = self.softcap is None and self.sink is None and self.window is None
        unmasked = self.key_mask is None and not self.query_start
        if not (plain and unmasked and self.n_key and self.shape[1]) or values.is_complex():
            return super().mix(values)
        return _sdpa(self, values)

    def shape_faults(self) -> list[str]:
        """Axes, grouped heads, and what must broadcast to (batch, head, query, key)."""
        q, k = tuple(self.query.shape), tuple(self.key.shape)
        if len(q) != 4 or len(k) != 4:
            return [
                f"C: expected query (batch, time, head, width) and key (batch, key, group, "
                f"width), got {q} and {k}."
            ]
        faults = []
        batch, length, head, width = q
        if k[0] not in (1, batch) and batch != 1:
            faults.append(f"C.key: expected batch={batch} or 1, got {k}; batch is fixed by query.")
        if k[3] != width or not k[2] or head % k[2]:
            faults.append(
                f"C.key: expected width={width} and a group that divides head={head}, got {k}; "
                f"they are fixed by query."
            )
        full = (max(batch, k[0]), head, length, k[1])
        optional = [
            ("bias", self.bias, full, "(batch, head, query, key)"),
            ("key_mask", self.key_mask, (full[0], k[1]), "(batch, key)"),
            ("sink", self.sink, (head,), "(head,)"),
        ]
        for name, x, wanted, axes in optional:
            if x is not None and not _broadcasts(tuple(x.shape), wanted):
                faults.append(f"C.{name}: expected axes {axes} = {wanted} or sizes 1, got "
                              f"{tuple(x.shape)}; query and key fix them.")  # fmt: skip
        for name, number in [("window", self.window), ("softcap", self.softcap)]:
            if number is not None and number <= 0:
                faults.append(f"C.{name}: expected a positive number or None, got {number}.")
        return faults


def _broadcasts(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(
        f in (1, w) for f, w in zip(found, wanted, strict=True)
    )


def _tile_of(x: Tensor, rows: range, cols: range) -> Tensor:
    x = x[..., rows.start : rows.stop, :] if x.shape[-2] > 1 else x
    return x[..., cols.start : cols.stop] if x.shape[-1] > 1 else x


def _sdpa(rows: SoftmaxRows, values: Tensor) -> Tensor:
    batch, length, heads, _, n_key = rows.shape
    batch = max(batch, values.shape[0])
    dtype = torch.promote_types(rows.query.dtype, rows.key.dtype)
    dtype = torch.promote_types(dtype, values.dtype)
    q, k = rows.query.transpose(1, 2).to(dtype), rows.key.transpose(1, 2).to(dtype)
    q = q.expand(batch, -1, -1, -1)
    k = k.expand(batch, -1, -1, -1).repeat_interleave(heads // k.shape[1], 1)
    v = values.expand(batch, heads, -1, -1).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    if rows.bias is None:
        return attend(q, k, v, is_causal=rows.causal, scale=rows.logit_scale)
    mask = rows.bias.to(dtype)
    if rows.causal:
        seen = rows._visible(range(length), range(n_key), q.device)
        mask = mask.masked_fill(~seen, -math.inf)
    mask = mask.expand(*mask.shape[:2], length, n_key)
    empty = (mask == -math.inf).all(-1, keepdim=True)
    full = mask.masked_fill(empty, 0.0).expand(batch, heads, -1, -1)
    return attend(q, k, v, full, scale=rows.logit_scale).masked_fill(empty, 0.0)
