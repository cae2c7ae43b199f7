"""ZeroS's full rows r_tj cos(q_t, k_j): sums tile by tile, from logits, gates, unit vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsf.measures._zero_sum import RadialRows

_ROWS, _KEYS = 256, 1024
"""A tile of weights stays in a core's cache, 2 MiB."""


class FullSums(NamedTuple):
    """Of every row, (row of the logits, length): sum of w, of |w|, and how many w < 0."""

    total: Tensor
    absolute: Tensor
    n_negative: Tensor


def full_sums(rows: RadialRows, query: Tensor, key: Tensor, *, causal: bool) -> FullSums:
    """Sums of r_tj cos(q_t, k_j) over the keys that row t sees.

    query, key (row of the logits, length, width), of unit length. Apart from the diagonal the
    radial tile is a product of rank 3,

        r_tj = a_t e^{s_j - c} + b_t s_j + d_t,    a_t = gh_t e^{c - log E_t},  c = max_j s_j

    with e^{s_j - c} <= 1 and e^{c - log E_t} <= 1 since every key of the tile is in E_t: no
    exponential for each pair. Which keys are negative is a question of half-spaces in `width`
    dimensions, for which nothing exact is known that is much faster than every pair: O(length^2 x
    width) time, O(tile) memory.
    """
    n_row, length = rows.s.shape
    found = FullSums(*(torch.zeros(n_row, length, dtype=torch.float64) for _ in range(3)))
    middle = rows.s.mean(1, keepdim=True)
    for row in range(n_row):
        for start in range(0, length, _ROWS):
            t = slice(start, min(start + _ROWS, length))
            before = start if causal else length
            for first in range(0, before, _KEYS):
                j = slice(first, min(first + _KEYS, before))
                w = _product(rows, row, t, j, middle[row]) * (query[row, t] @ key[row, j].mT)
                _add(found, row, t, w)
            if causal:
                w = _exact(rows, row, t) * (query[row, t] @ key[row, t].mT)
                _add(found, row, t, w.tril())
    return found


def _product(rows: RadialRows, row: int, t: slice, j: slice, middle: Tensor) -> Tensor:
    s = rows.s[row, j]
    top = s.max()
    slope = rows.first[row, t] - rows.higher[row, t]
    constant = rows.zero[row, t] - rows.higher[row, t] - slope * (rows.mean[row, t] - middle)
    left = torch.stack([
        rows.higher[row, t] * torch.exp(top - rows.log_total[row, t]), slope / rows.t[row, t],
        constant / rows.t[row, t],
    ], 1)  # fmt: skip
    return left @ torch.stack([torch.exp(s - top), s - middle, torch.ones_like(s)])


def _exact(rows: RadialRows, row: int, t: slice) -> Tensor:
    """Rows against their own keys: an early row's E_t may be far below a later key's e^s."""
    s = rows.s[row, t]
    lower = torch.where(torch.ones(len(s), len(s)).tril() > 0, s, -torch.inf)
    higher, n = rows.higher[row, t, None], rows.t[row, t, None]
    bent = higher * (torch.exp(lower - rows.log_total[row, t, None]) - 1 / n)
    slope = rows.first[row, t, None] - higher
    return bent + (slope * (s - rows.mean[row, t, None]) + rows.zero[row, t, None]) / n


def _add(found: FullSums, row: int, t: slice, w: Tensor) -> None:
    one = torch.ones(w.shape[1], dtype=w.dtype)
    found.total[row, t] += w @ one
    found.n_negative[row, t] += (w < 0).to(w.dtype) @ one
    found.absolute[row, t] += w.abs_() @ one
