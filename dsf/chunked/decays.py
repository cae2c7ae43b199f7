"""The decays inside one chunk: what they do to scores, to the start state, to the end state.

Notation: a_i the decay of step i of the chunk (i = 1..c), D(j, i) = a_{j+1} ... a_i the product
between steps j and i, D(j, j) = 1, step 0 the state before the chunk. Rules kept by every class:
no division, no exponential of a positive difference (for decays <= 1), exact zeros are values, and
the gradient of a_t is a sum over pairs j < t <= i alone, so nothing cancels that a small a_t would
have to make up for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.chunked.layout import rows, to_chunks, wide
from dsf.transitions._base import is_traced, real_dtype

Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""log_decay, sign, phase."""

EXACT = 8
"""Steps of a block from which its decay comes from the sum of logarithms: a number next to 1 that
is rounded once a step would lose as many units as there are steps."""


class NoDecay:
    """a = 1."""

    whole: Parts | None = None

    def scores(self, Q: Tensor, K: Tensor) -> Tensor:
        """Q_i K_j^T for j <= i, else 0: (..., c * output, c * input).

        Q (..., c, output, state), K (..., c, input, state).
        """
        return lower(rows(Q) @ rows(K).mT, Q.shape[-2], K.shape[-2])

    def from_start(self, Q: Tensor) -> Tensor:
        """Q_i D(0, i): how the outputs read the state before the chunk."""
        return Q

    def to_end(self, K: Tensor) -> Tensor:
        """D(j, c) K_j: what step j leaves in the state after the chunk."""
        return K


class ScalarDecay:
    """One number per head: D(j, i) as a c x (c+1) matrix of exponentials of segment sums."""

    def __init__(self, A: Any, chunk: int, dtype: torch.dtype) -> None:
        parts = decay_parts(A, chunk, dtype)
        self.between = between(parts).squeeze(-3)
        self.whole = block_parts(parts, chunk)

    def scores(self, Q: Tensor, K: Tensor) -> Tensor:
        """D(j, i) Q_i K_j^T for j <= i, else 0."""
        n_row, n_col = Q.shape[-2], K.shape[-2]
        weights = self.between[..., 1:]
        if n_row > 1 or n_col > 1:
            weights = weights.repeat_interleave(n_row, -2).repeat_interleave(n_col, -1)
        return lower(rows(Q) @ rows(K).mT, n_row, n_col) * weights

    def from_start(self, Q: Tensor) -> Tensor:
        """Q_i D(0, i)."""
        return Q * self.between[..., :, 0, None, None]

    def to_end(self, K: Tensor) -> Tensor:
        """D(j, c) K_j."""
        return K * self.between[..., -1, 1:, None, None]


class DiagonalDecay:
    """One number per state: scores block by block, each about its own middle.

    A block of 2s steps is two halves. A pair j in the left, i in the right half has
    D(j, i) = D(j, m) D(m, i) with m the last step of the left half: both factors are products of
    decays, at most 1 in modulus, and reach zero only where the whole does. So the off-diagonal
    quarter is one matrix product of (Q_i D(m, i)) and (D(j, m) K_j), whatever the decays are,
    and the two halves are blocks of s steps. log2(c) levels, c a power of two.
    """

    def __init__(self, A: Any, chunk: int, dtype: torch.dtype) -> None:
        parts = decay_parts(A, chunk, dtype)
        real = parts[0].dtype
        right = numbers(parts, real).unsqueeze(-2)  # D(m, i), (..., blocks, s, state)
        left = None  # D(j, m); None for ones
        self.levels: list[tuple[Tensor, Tensor | None]] = []
        size, summed = 1, 1  # parts: sums over blocks of `summed` steps
        while size < chunk:
            self.levels.append((odd(right), None if left is None else even(left)))
            whole = right[..., -1:, :]
            if size >= EXACT:  # not a product of `size` rounded numbers
                parts, summed = block_parts(parts, size // summed), size
                whole = numbers(parts, real).unsqueeze(-2)
            right, left = _grow(right, left, whole)
            size *= 2
        self.start, self.end = right.squeeze(-3), None if left is None else left.squeeze(-3)
        self.whole = block_parts(parts, chunk // summed)

    def scores(self, Q: Tensor, K: Tensor) -> Tensor:
        """sum_n Q_in D_n(j, i) K_jn for j <= i, else 0."""
        single = Q.shape[-2] == 1 and K.shape[-2] == 1
        S = (Q * K).sum(-1, keepdim=True) if single else Q @ K.mT  # (..., blocks, s, s)
        for level, (right, left) in enumerate(self.levels):
            size = 1 << level
            q = odd(Q.unflatten(-3, (-1, size)), 4) * right.unsqueeze(-2)
            k = even(K.unflatten(-3, (-1, size)), 4)
            k = k if left is None else k * left.unsqueeze(-2)
            if size == 1 and single:
                cross = (q * k).sum(-1)
            else:
                cross = rows(q) @ rows(k).mT
            S = assemble(S, cross)
        return S.squeeze(-3)

    def from_start(self, Q: Tensor) -> Tensor:
        """Q_i D(0, i)."""
        return Q * self.start.unsqueeze(-2)

    def to_end(self, K: Tensor) -> Tensor:
        """D(j, c) K_j."""
        return K if self.end is None else K * self.end.unsqueeze(-2)


Decays = NoDecay | ScalarDecay | DiagonalDecay


def decay_parts(A: Any, chunk: int, dtype: torch.dtype) -> Parts:
    """log_decay, sign (without gradient) and phase (in twice the precision), cut into chunks.

    (batch, head, chunks, c, state), state of size 1 for a scalar decay.
    """
    real = real_dtype(dtype)
    far = wide(real, A.log_decay.device)

    def cut(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if x is None:
            return None
        return to_chunks(x if x.ndim > 3 else x[..., None], chunk).to(dtype).contiguous()

    log, sign, phase = cut(A.log_decay, real), cut(A.sign, real), cut(A.phase, far)
    assert log is not None
    return log, None if sign is None else sign.detach(), phase


def between(parts: Parts) -> Tensor:
    """D(j, i) at row i = 1..c, column j = 0..c, (..., state, c, c + 1); modulus 1 where j >= i."""
    log, sign, phase = (None if x is None else x.mT for x in parts)
    assert log is not None
    decay = torch.exp(_normal(_segment_sums(log)))
    if sign is not None:
        decay = decay.masked_fill(_segment_sums((sign == 0).to(sign.dtype)) > 0, 0.0)
        running = pad(torch.where(sign == 0, 1.0, sign).cumprod(-1), (1, 0), value=1.0)
        decay = decay * (running[..., 1:, None] * running[..., None, :])
    return decay if phase is None else decay * unit(_segment_sums(phase), log.dtype)


def _normal(log: Tensor) -> Tensor:
    """Logarithms below the smallest normal number as -inf: exp takes five times as long there."""
    return torch.nn.functional.threshold(log, math.log(torch.finfo(log.dtype).tiny), -torch.inf)


def numbers(parts: Parts, real: torch.dtype) -> Tensor:
    """sign exp(log + i phase) in the precision of `real`."""
    log, sign, phase = parts
    decay = torch.exp(log.to(real))
    decay = decay if sign is None else decay * sign.to(real)
    return decay if phase is None else decay * unit(phase, real)


def block_parts(parts: Parts, size: int) -> Parts:
    """The same for the product over every `size` steps: (..., chunk / size, state)."""
    log, sign, phase = (None if x is None else x.unflatten(-2, (-1, size)) for x in parts)
    assert log is not None
    return (
        log.sum(-2), None if sign is None else sign.prod(-2),
        None if phase is None else phase.sum(-2),
    )  # fmt: skip


def lower(S: Tensor, n_row: int, n_col: int) -> Tensor:
    """Zero above the diagonal of blocks n_row x n_col, whatever stood there, in place: S is a
    product that nobody else holds.
    """
    if n_row == 1 and n_col == 1:
        return torch.tril(S) if is_traced() else S.tril_()  # vmap has no rule for the latter
    step = torch.arange(S.shape[-2], device=S.device)[:, None] // n_row
    other = torch.arange(S.shape[-1], device=S.device) // n_col
    return S.masked_fill_(other > step, 0.0)


def _segment_sums(x: Tensor) -> Tensor:
    """x_{j+1} + ... + x_i at row i = 1..c, column j = 0..c (0 where j >= i), without differences.

    Differences of running sums would lose a small term beside a large one, and -inf - (-inf).
    """
    c = x.shape[-1]
    step = torch.arange(c, device=x.device)[:, None]
    later = step >= torch.arange(c + 1, device=x.device)
    return torch.where(later, x[..., None], 0.0).cumsum(-2)


def unit(angle: Tensor, real: torch.dtype) -> Tensor:
    """exp(i angle); a long angle is brought near zero before it is rounded to `real`."""
    if angle.dtype != real:
        turns = torch.round(angle.detach() / (2 * torch.pi))
        angle = (angle - 2 * torch.pi * turns).to(real)
    return torch.complex(angle.cos(), angle.sin())


def even(x: Tensor, own: int = 3) -> Tensor:
    """The blocks 0, 2, ...: the left halves. The block axis is `own` axes from the end."""
    return x.unflatten(-own, (-1, 2)).select(-own, 0)


def odd(x: Tensor, own: int = 3) -> Tensor:
    """The blocks 1, 3, ...: the right halves."""
    return x.unflatten(-own, (-1, 2)).select(-own, 1)


def _grow(right: Tensor, left: Tensor | None, whole: Tensor) -> tuple[Tensor, Tensor]:
    """D(start, i) and D(j, end) of blocks twice as long, from those of their halves."""
    first, second = even(whole), odd(whole)
    one = torch.ones_like(first)
    on_right = torch.stack([one, first], -3)
    on_left = torch.stack([second, one], -3)
    longer = (right.unflatten(-3, (-1, 2)) * on_right).flatten(-3, -2)
    if left is None:
        return longer, on_left.flatten(-3, -2)
    return longer, (left.unflatten(-3, (-1, 2)) * on_left).flatten(-3, -2)


def assemble(S: Tensor, cross: Tensor) -> Tensor:
    """[[S_left, 0], [cross, S_right]]."""
    size = cross.shape[-1]
    whole = cross.new_zeros(*cross.shape[:-2], 2 * cross.shape[-2], 2 * size)
    n_row = cross.shape[-2]
    whole[..., :n_row, :size] = even(S)
    whole[..., n_row:, :size] = cross
    whole[..., n_row:, size:] = odd(S)
    return whole
