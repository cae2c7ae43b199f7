"""Scan of diagonal states with few channels: step by step, but all chunks side by side.

Where a head has one channel (Mamba, RG-LRU, LSTM) scores over a chunk would cost more than the
states themselves. Each chunk runs the definition from a zero state, all chunks at once; then the
state is handed from chunk to chunk and added with the decays from the chunk's start:

    h_i = g_i + D(0, i) h_0,    g_i = a_i g_{i-1} + B_i u_i

Multiplications by decays alone: exact for every decay. Memory O(length * state * channel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsf.chunked.decays import decay_parts, numbers, unit
from dsf.chunked.layout import from_chunks, rows, to_chunks, wide


def scan_elementwise(
    A: Any, B: Tensor, C: Tensor, values: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs and final state; `A` diagonal, all of one dtype, length a multiple of `chunk`."""
    decay, start, total = _running_decays(A, chunk, B.dtype)
    write = to_chunks(B, chunk) @ to_chunks(values, chunk)
    # (batch, head, chunks, chunk, state, channel), taken apart along the chunk
    steps = decay[..., None].expand(*decay.shape, 1).unbind(3)
    g, local = torch.zeros_like(write[:, :, :, 0]), []
    for factor, more in zip(steps, write.unbind(3), strict=True):
        g = torch.addcmul(more, factor, g)
        local.append(g)
    starts, last = _carry(total, g, state)
    h = torch.stack(local, 3) + start[..., None] * starts.unsqueeze(3)
    y = to_chunks(C, chunk) @ h
    return from_chunks(rows(y), C.shape[-2]), last


def _carry(total: Tensor, local: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before every chunk and after the last, summed in twice the precision."""
    factors = total.unbind(2) if total.shape[2] > 1 else [total[:, :, 0]] * local.shape[2]
    starts = []
    for factor, more in zip(factors, local.unbind(2), strict=True):
        starts.append(state.to(local.dtype))
        state = torch.addcmul(more.to(state.dtype), factor, state)
    return torch.stack(starts, 2), state


def _running_decays(A: Any, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a_i and D(0, i) (batch, head, chunks, c, state), D(0, c) (batch, head, chunks, state, 1).

    D comes from sums of logarithms, so that a decay next to 1 does not lose by being rounded once
    a step; D(0, c) is in twice the precision.
    """
    log, sign, phase = parts = decay_parts(A, chunk, dtype)
    real, far = log.dtype, wide(log.dtype, log.device)
    start, total = torch.exp(log.cumsum(-2)), torch.exp(log.sum(-2).to(far))
    if sign is not None:
        start, total = start * sign.cumprod(-2), total * sign.prod(-2)
    if phase is not None:
        start, total = start * unit(phase.cumsum(-2), real), total * unit(phase.sum(-2), far)
    return numbers(parts, real), start, total[..., None]
