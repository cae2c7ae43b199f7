"""The sums of every softmax row from its logits: one exponential a pair, no weight kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsf.factors import SoftmaxRows
from dsf.measures._row_totals import RowSums
from dsf.wrappers import Bidirectional, is_cache

_BYTES = 2**25
"""Rows are read in blocks of about this size."""


def softmax_sums(system: Any, block: int | None = None) -> RowSums | None:
    """The sums of every row of plain softmax attention, None for anything else.

    With e_tj = exp(z_tj - m_t) and S_t its sum over the keys seen,

        sum_j p ln p = (sum_j e_tj (z_tj - m_t))/S_t - ln S_t

    so that entropies come from sums beside the others. No way is known that is much faster than
    O(length^2) and exact (Alman and Song, 2023, rule it out under the strong exponential time
    hypothesis); this takes that time and O(length x block) memory, the keys after a causal row
    left alone. Windows, biases, sinks, caps and key masks go by tiles of the map instead.
    """
    rows = _plain_rows(system)
    if rows is None:
        return None
    batch, length, head = rows.shape[:3]
    shared = rows.query.shape[2] // rows.key.shape[2]
    n_key = rows.n_key
    size = max(1, _BYTES // (8 * max(n_key, 1))) if block is None else block
    spare = torch.empty(2, min(size, length) * n_key, dtype=torch.float64)
    heads = []
    for b in range(batch):
        for h in range(head):
            q = rows.query[b if rows.query.shape[0] > 1 else 0, :, h]
            k = rows.key[b if rows.key.shape[0] > 1 else 0, :, h // shared]
            q, k = (x.detach().to("cpu", torch.float64) for x in (q, k))
            parts = [
                _block(rows.logit_scale * q[start : start + size], k, start, rows.causal, spare)
                for start in range(0, length, size)
            ]
            heads.append(RowSums.cat(parts))
    return RowSums.stack(heads, (batch, head))


def _plain_rows(system: Any) -> SoftmaxRows | None:
    if isinstance(system, Bidirectional):
        later = system.anticausal.recurrence
        if not system.is_one_map or later.D is not None:
            return None
        system = system.causal
        if isinstance(system.C, SoftmaxRows) and system.C.causal:
            return None
    elif getattr(getattr(system, "C", None), "causal", False) is not True:
        return None
    if not is_cache(system) or system.D is not None:
        return None
    rows = system.C
    extras = ("bias", "key_mask", "sink", "window", "softcap")
    if not isinstance(rows, SoftmaxRows) or any(getattr(rows, n) is not None for n in extras):
        return None
    square = rows.n_key == rows.shape[1] and rows.n_key > 0 and not rows.query_start
    return rows if square else None


def _block(q: Tensor, k: Tensor, start: int, causal: bool, spare: Tensor) -> RowSums:
    """The sums of rows start.. over the keys they see, each (row,).

    Blocks of every width in the same two pieces of memory: new ones would scatter the heap.
    """
    stop = start + len(q)
    seen = k[:stop] if causal else k
    own = slice(start, stop)
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    z, p = (x[: len(q) * len(seen)].view(len(q), len(seen)) for x in spare)
    torch.mm(q, seen.mT, out=z)
    if causal:
        z[:, own].masked_fill_(later, -torch.inf)
    z -= z.amax(-1, keepdim=True)
    torch.exp(z, out=p)
    total = p.sum(-1)
    if causal:
        z[:, own].masked_fill_(later, 0.0)
    moment = z.mul_(p).sum(-1) / total - torch.log(total)
    p /= total[:, None]
    at = torch.arange(start, stop, dtype=torch.float64)
    step = torch.arange(len(seen), dtype=torch.float64)
    if causal:
        lag = at - p @ step
        count = at + 1
    else:
        lag = (p * (at[:, None] - step).abs()).sum(-1)
        count = torch.full_like(at, len(seen))
    whole, first = p.sum(-1), p[:, 0].clone()
    p -= (whole / count)[:, None]
    if causal:
        p[:, own].masked_fill_(later, 0.0)
    none = torch.zeros_like(at)
    return RowSums(
        count=count, mean=whole / count, squares=p.square_().sum(-1), absolute=whole,
        negative=none, n_negative=none, log_moment=moment, first=first,
        distance=lag.clamp(min=0),
    )  # fmt: skip
