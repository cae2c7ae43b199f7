"""Sums of log forget gates between two tokens, exact through zeros of a gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.errors import DsfValueError
from dsf.shapes import Float


def fading(
    log_decay: Float[Tensor, "batch key head"], rows: slice
) -> Float[Tensor, "batch head query key"]:
    """sum_{j < i <= t} log f_i in float64 for the positions t of `rows` (anything where j > t).

    Differences of one cumulative sum; a gate of zero (log f = -inf) is counted apart, so that no
    infinity is subtracted from another. Memory rows x key.
    """
    gate = log_decay.transpose(1, 2)
    lost = torch.isinf(gate)
    total = gate.masked_fill(lost, 0.0).to(torch.float64).cumsum(-1)
    count = lost.cumsum(-1)
    hidden = count[..., rows, None] > count[..., None, :]
    return (total[..., rows, None] - total[..., None, :]).masked_fill(hidden, -torch.inf)


class Faded(NamedTuple):
    """Query and key with two coordinates for the gates, and the rank-one part of A_t.

    (batch, time, head, state + 2), left and right (batch, time, head, state + 2, 1): I - left
    right^T has log f_t in its entry (state + 1, state + 2).
    """

    query: Tensor
    key: Tensor
    left: Tensor
    right: Tensor


def faded(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "#batch time head state"],
    scale: Tensor,
    log_decay: Float[Tensor, "batch time head"],
) -> Faded:
    """Fading of softmax logits as two more coordinates: q^ = [q; 1; 0], k^ = [scale k; 0; 1].

    Raises DsfValueError on a gate of zero.
    """
    if bool(torch.isinf(log_decay).any()):
        raise DsfValueError(
            "dsf.coefficient_dynamics: log_decay: expected gates above zero, whose logarithm a "
            "matrix can hold, got an exact zero."
        )
    n = query.shape[-1]
    one, two = torch.eye(n + 2, dtype=query.dtype, device=query.device)[n:]
    q = pad(query, (0, 2)) + one
    k = pad(scale * key, (0, 2)) + two
    return Faded(q, k, (-log_decay[..., None] * one)[..., None], two.expand_as(q)[..., None])
