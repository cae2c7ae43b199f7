"""Sums over the keys of every prefix whose value lies in an interval, without looking at each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PrefixSums(NamedTuple):
    """Over j <= t with a value in the interval of row t: how many, sum s_j, sum exp(s_j + c_t)."""

    count: Tensor
    total: Tensor
    exponential: Tensor


def ranks_below(ordered: Tensor, value: Tensor) -> Tensor:
    """How many of the ascending values (row, length) lie below each given one."""
    return torch.searchsorted(ordered.contiguous(), value.contiguous())


def prefix_sums(values: Tensor, low: Tensor, high: Tensor, log_scale: Tensor) -> PrefixSums:
    """Sums over the prefix 1..t of those keys whose rank in the whole row is in [low_t, high_t).

    values s, log_scale c and integer ranks, all (row, length). A prefix is a union of dyadic
    blocks, one for each bit of t; each block is kept in order of value with running sums, so that
    nothing outside the prefix enters and a sum is a difference inside one block. exp is taken
    relative to the largest value of a block: no overflow where exp(s_j + c_t) has none. Cost
    O(row x length log^2 length), memory O(row x length).
    """
    n_row, length = values.shape
    bits = max(length - 1, 0).bit_length()
    padded = 1 << bits
    rank = torch.argsort(torch.argsort(values, dim=1, stable=True), dim=1, stable=True)
    spare = torch.arange(length, padded).expand(n_row, -1)
    rank = torch.cat([rank, spare], 1)
    s = torch.nn.functional.pad(values, (0, padded - length))
    found = [torch.zeros_like(values) for _ in PrefixSums._fields]
    t = torch.arange(1, length + 1)
    for bit in range(bits + 1):
        at = ((t >> bit) & 1).nonzero()[:, 0]
        if not len(at):
            continue
        size = 1 << bit
        order = rank.unflatten(1, (-1, size)).sort(-1)
        ordered = torch.gather(s.unflatten(1, (-1, size)), 2, order.indices)
        top = ordered[..., -1:]
        running = [_running(x) for x in (ordered, torch.exp(ordered - top))]
        block = (t[at] >> bit) - 1
        keys = (order.values + padded * torch.arange(padded // size)[:, None]).flatten(1)
        inside = [
            torch.searchsorted(keys, (r[:, at] + padded * block).contiguous()) - size * block
            for r in (low, high)
        ]
        flat = [i + (size + 1) * block for i in inside]
        parts = [torch.gather(x.flatten(1), 1, flat[1]) - torch.gather(x.flatten(1), 1, flat[0])
                 for x in running]  # fmt: skip
        found[0][:, at] += (inside[1] - inside[0]).to(s.dtype)
        found[1][:, at] += parts[0]
        found[2][:, at] += parts[1] * torch.exp(top[:, block, 0] + log_scale[:, at])
    return PrefixSums(*found)


def total_sums(values: Tensor, low: Tensor, high: Tensor, log_scale: Tensor) -> PrefixSums:
    """The same over all keys, whatever t: O(row x length log length)."""
    ordered = values.sort(1).values
    top = ordered[:, -1:]
    ends = (low, high)
    sums = [_running(x) for x in (ordered, torch.exp(ordered - top))]
    parts = [torch.gather(x, 1, ends[1]) - torch.gather(x, 1, ends[0]) for x in sums]
    return PrefixSums((high - low).to(values.dtype), parts[0],
                      parts[1] * torch.exp(top + log_scale))  # fmt: skip


def _running(x: Tensor) -> Tensor:
    """0, x_1, x_1 + x_2, ... along the last axis."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
