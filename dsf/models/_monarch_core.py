"""Monarch factors of softmax attention by alternating maximisation, their product, their loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.mixing_rows import MixingRows
from dsf.shapes import Bool, Float, Inexact
from dsf.transitions._base import register, static

PADDINGS = ("after", "before")


class Grid(NamedTuple):
    """Tokens as (block, position): `front` padded places stand before token 0."""

    block: int
    n_block: int
    front: int

    @classmethod
    def of(cls, length: int, block: int | None, padding: str) -> Grid:
        """block None: the power of two near the root of the length, 2^floor(log2(length)/2)."""
        if padding not in PADDINGS:
            raise DsfValueError(
                f"dsf.monarch_attention: padding: expected one of {PADDINGS}, got {padding!r}."
            )
        if block is None:
            block = 1 << (max(length, 1).bit_length() - 1) // 2
        if block < 1:
            raise DsfValueError(f"dsf.monarch_attention: block: expected at least 1, got {block}.")
        n_block = max(1, -(-length // block))
        return cls(block, n_block, n_block * block - length if padding == "before" else 0)

    def split(self, x: Tensor) -> Tensor:
        """(batch, time, ...) -> (batch, block, position, ...), zeros in padded places."""
        missing = self.block * self.n_block - x.shape[1]
        pad = (0, 0) * (x.ndim - 2) + (self.front, missing - self.front)
        return torch.nn.functional.pad(x, pad).unflatten(1, (self.n_block, self.block))


class Factors(NamedTuple):
    """M[(l, j), (k, i)] = left[j, k, l] right[k, j, i], both with (batch, head) in front."""

    left: Tensor
    right: Tensor


class Tokens(NamedTuple):
    """Query and key (batch, head, block, position, width), real (batch, block, position)."""

    query: Tensor
    key: Tensor
    real: Tensor
    scale: float

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, mask: Tensor | None, grid: Grid, scale: float | None
    ) -> Tokens:
        """Padded and split, in float32 at least; padded and masked tokens are not real."""
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        if mask is None:
            mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
        q, k = (grid.split(x.to(dtype)).movedim(3, 1) for x in (query, key))
        return cls(q, k, grid.split(mask), query.shape[-1] ** -0.5 if scale is None else scale)


def half_steps(tokens: Tokens, steps: int) -> Iterator[Factors]:
    """The factors after every half-step, 2 x steps of them: right, left, right, left, ...

        right_kj. = softmax_i(s a_kj.k_ki / c_kj),  a, c = sums of left_jkl q_lj, left_jkl over l
        left_j.l  = softmax_k(q_lj.(s sum_i right_kji k_ki) - sum_i right log right)

    from left = identity. Every half-step maximises <M, S> + entropy(M) over one factor. Tokens
    that are not real weigh nothing as keys and are left out of a and c; a place without any real
    query spreads evenly; a block without any real key gets no mass. Source: Yaras et al. (2025).
    """
    m = tokens.query.shape[2]
    eye = torch.eye(m, dtype=tokens.query.dtype, device=tokens.query.device)
    left = eye.expand(*tokens.query.shape[:2], tokens.query.shape[3], m, m)
    for step in range(steps):
        right, log_right = right_update(tokens, None if step == 0 else left)
        yield Factors(left, right)
        left = softmax_parts(left_logits(tokens, right, log_right))[0].transpose(-1, -2)
        yield Factors(left, right)


def right_update(tokens: Tokens, left: Tensor | None) -> tuple[Tensor, Tensor]:
    """right and its logarithm for a given left factor (None: the identity)."""
    weight = tokens.real.to(tokens.query.dtype)
    if left is None:
        c = weight[:, None]
        a = tokens.query * c[..., None]
    else:
        c = torch.einsum("bhjkl,blj->bhkj", left, weight)
        a = torch.einsum("bhjkl,bhljd->bhkjd", left, tokens.query * weight[:, None, ..., None])
    a = a / (c + torch.finfo(c.dtype).tiny)[..., None]
    logits = tokens.scale * a @ tokens.key.mT
    return softmax_parts(logits.masked_fill(~tokens.real[:, None, :, None, :], -torch.inf))


def left_logits(tokens: Tokens, right: Tensor, log_right: Tensor) -> Tensor:
    """(batch, head, position, block l, block k); -inf at blocks without a real key."""
    means, minus_entropy = block_summaries(tokens, right, log_right)
    logits = tokens.query.transpose(2, 3) @ means.transpose(2, 3).mT
    logits = logits - minus_entropy.mT[..., None, :]
    return logits.masked_fill(~tokens.real.any(-1)[:, None, None, None, :], -torch.inf)


def block_summaries(tokens: Tokens, right: Tensor, log_right: Tensor) -> tuple[Tensor, Tensor]:
    """s sum_i right k (batch, head, block, position, width) and sum_i right log right."""
    return tokens.scale * right @ tokens.key, plogp(right, log_right).sum(-1)


def softmax_parts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its logarithm; a row of -inf gives zeros."""
    closed = logits == -torch.inf
    empty = closed.all(-1, keepdim=True)
    log_p = torch.log_softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(closed, -torch.inf)
    return log_p.exp(), log_p


def plogp(p: Tensor, log_p: Tensor) -> Tensor:
    """p log p with 0 log 0 = 0, gradient included."""
    return p * log_p.masked_fill(log_p == -torch.inf, 0.0)


def objective(tokens: Tokens, factors: Factors) -> Float[Tensor, "batch head"]:
    """f(M) = <M, S> + entropy(M) over the rows of real queries, without the matrix.

    sum over rows of LSE - f(M) = the rows' total KL(M || softmax(S)). O(N sqrt(N) d).
    """
    left, right = factors
    zero = torch.zeros((), dtype=right.dtype, device=right.device)
    log_right = torch.where(right > 0, right, 1.0).log()
    means, minus_entropy = block_summaries(tokens, right, log_right)
    score = torch.einsum("bhljd,bhkjd->bhjkl", tokens.query, means)
    gain = left * (score - minus_entropy.mT[..., None]) - torch.special.xlogy(left, left)
    real = tokens.real.mT[:, None, :, None, :]
    return torch.where(real, gain, zero).sum((-1, -2, -3))


@register
@dataclasses.dataclass(frozen=True)
class MonarchRows(MixingRows):
    """Rows M[(l, j), (k, i)] = left[j, k, l] right[k, j, i], plus own[l, j, i] where k = l.

    left (batch, head, position, block k, block l), right (batch, head, block, position,
    position); own as right, or None. Row 0 stands at place `first` of the padded grid, key 0 at
    `front`. `mix` costs O(N sqrt(N) channel), nothing N x N.
    """

    left: Tensor
    right: Tensor
    own: Tensor | None = None
    n_row: int = static(default=0)
    n_column: int = static(default=0)
    first: int = static(default=0)
    front: int = static(default=0)
    causal: bool = static(default=False)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch, head = self.left.shape[:2]
        return torch.Size((batch, self.n_row, head, 1, self.n_column))

    @property
    def query_start(self) -> int:  # type: ignore[override]
        """The key that row 0 stands at."""
        return self.first - self.front

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Products of two entries each, O(rows x keys)."""
        block = self.left.shape[2]
        row = torch.arange(self.n_row, device=self.left.device)[queries, None] + self.first
        key = torch.arange(self.n_column, device=self.left.device)[keys] + self.front
        (el, j), (k, i) = ((x // block, x % block) for x in (row, key))
        weights = self.left[:, :, j, k, el] * self.right[:, :, k, j, i]
        if self.own is None:
            return weights
        same = (k == el).expand(weights.shape[-2:])
        return torch.where(same, self.own[:, :, el, j, i], weights)

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """y_kj = sum_i right v_ki, then sum_k left y_kj: two batched products of small factors."""
        dtype = torch.promote_types(self.right.dtype, values.dtype)
        m, block = self.right.shape[2:4]
        pad = (0, 0, self.front, m * block - self.n_column - self.front)
        v = torch.nn.functional.pad(values.to(dtype), pad).unflatten(2, (m, block))
        y = self.right.to(dtype) @ v
        out = (self.left.to(dtype).mT @ y.transpose(2, 3)).transpose(2, 3)
        if self.own is not None:
            out = out + self.own.to(dtype) @ v
        return out.flatten(2, 3)[:, :, self.first : self.first + self.n_row]

    def time_slice(self, start: int, stop: int) -> MonarchRows:
        """Some rows; the factors stay."""
        return dataclasses.replace(self, n_row=stop - start, first=self.first + start)

    def shape_faults(self) -> list[str]:
        """Factors that belong together."""
        j, k, el = self.left.shape[2:]
        if k == el and self.right.shape[2:] == (k, j, j):
            return []
        left, right = tuple(self.left.shape[2:]), tuple(self.right.shape[2:])
        return [
            f"C.left, C.right: expected (position, block, block) and (block, position, position), "
            f"got {left} and {right}."
        ]


def check_mask(mask: Bool[Tensor, "batch time"] | None, query: Tensor) -> None:
    """Raise DsfShapeError unless the mask is boolean and (batch, time)."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != query.shape[:2]:
        raise DsfShapeError(
            f"dsf.monarch_attention: key_mask: expected boolean {tuple(query.shape[:2])}, got "
            f"{mask.dtype} {tuple(mask.shape)}; a mask per query does not fit the structure."
        )
