"""Chunked scan of decaying states: h_t = a_t h_{t-1} + B_t u_t with a scalar or a diagonal a_t.

    y_i = C_i D(0, i) h_0 + sum_{j <= i} (C_i D(j, i) B_j) u_j
    h_c = D(0, c) h_0 + sum_j D(j, c) B_j u_j

D(j, i) is the product of the decays between steps j and i of a chunk of c steps, h_0 the state
before it. Four matrix products a chunk, all chunks at once; then one state handed from chunk to
chunk. Source: Yang et al. (2024), section 3; Dao and Gu (2024), section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.chunked.decays import Decays, Parts, between, block_parts, numbers
from dsf.chunked.layout import from_chunks, rows, to_chunks
from dsf.shapes import broadcast_shapes
from dsf.transitions._base import is_traced, real_dtype

BLOCK = 16
"""Chunks whose states are summed by one matrix product."""


def scan_linear(
    decays: Decays, B: Tensor, C: Tensor, values: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs, as `from_chunks` gives them, and final state; B, C, values of one dtype."""
    Q = to_chunks(C, chunk).contiguous()
    K = to_chunks(B.mT, chunk).contiguous()
    V = rows(to_chunks(values, chunk)).contiguous()
    starts, last = _carry(decays.whole, rows(decays.to_end(K)).mT @ V, state)
    y = add_product(rows(decays.from_start(Q)) @ starts, decays.scores(Q, K), V)
    return from_chunks(y, C.shape[-2]), last


def add_product(y: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """y + S V in one pass."""
    lead = broadcast_shapes(y.shape[:3], S.shape[:3], V.shape[:3])
    y, S, V = (x.expand(*lead, -1, -1).flatten(0, 2) for x in (y, S, V))
    return torch.baddbmm(y, S, V).unflatten(0, lead)


def _carry(whole: Parts | None, local: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before every chunk and after the last: the same scan, a chunk to a step.

    whole: the decay of each chunk, (batch, head, chunks or 1, 1, state or 1), None for 1; local:
    what each chunk adds, (batch, head, chunks, state, channel); state in twice the precision.
    """
    starts = []
    for start in range(0, local.shape[2], BLOCK):
        added = local[:, :, start : start + BLOCK]
        here = None if whole is None else _cut(whole, start, added.shape[2])
        before, state = _carry_block(here, added, state)
        starts.append(before)
    return (starts[0] if len(starts) == 1 else torch.cat(starts, 2)), state


def _carry_block(whole: Parts | None, local: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """D(0, i) h + sum_{j <= i} D(j, i) local_j for i = 0..n-1, and for i = n.

    Only the last has to be exact over any number of blocks: its h stays in twice the precision.
    """
    n, h = local.shape[2], state.to(local.dtype)
    by_state = whole is not None and whole[0].shape[-1] > 1
    if by_state:  # (batch, head, state, n, channel)
        x, h = local.transpose(2, 3), h.unsqueeze(3)
    else:  # (batch, head, 1, n, state * channel): the same weights for every state
        x, h = local.flatten(3).unsqueeze(2), h.flatten(2)[:, :, None, None]
    if whole is None:
        weights, last, added = local.new_ones(1, 1, 1, n, n + 1).tril(), state, x.sum(3)
    else:
        decay = between(whole).to(local.dtype)  # row i = 1..n, column j = 0..n
        weights = torch.tril(pad(decay[..., :-1, :], (0, 0, 1, 0), value=1.0))
        last = numbers(block_parts(whole, n), real_dtype(state.dtype)).mT * state
        added = (decay[..., -1:, 1:] @ x).squeeze(3)
    before = _starts(weights, h, x)
    before = (
        before.transpose(2, 3) if by_state else before.squeeze(2).unflatten(3, local.shape[3:])
    )
    return before, last + added.reshape(last.shape)


def _starts(weights: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """weights [h, x]: x may be changed.

    Without gradients h enters through x_1, so that no copy of x is made: its weight in row i is
    that of x_1 times that in row 1.
    """
    if is_traced() or torch.is_grad_enabled() or x.shape[3] < 2:
        return weights @ torch.cat([h, x], 3)
    x[..., 0, :] += (weights[..., 1:2, :1] * h).squeeze(-2)
    before = weights[..., 1:] @ x
    before[..., 0, :] = h.squeeze(-2)
    return before


def _cut(whole: Parts, start: int, count: int) -> Parts:
    """Chunks from `start` on as the steps of (batch, head, step, state)."""

    def cut(x: Tensor) -> Tensor:
        varies = x.shape[2] > 1
        x = x[:, :, start : start + count] if varies else x.expand(-1, -1, count, -1, -1)
        return x.squeeze(3)

    log, sign, phase = (None if x is None else cut(x) for x in whole)
    assert log is not None
    return log, sign, phase
