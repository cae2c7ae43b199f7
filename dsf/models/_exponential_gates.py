"""Write gates of size exp(i): the running maximum that keeps them in range."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def running_maximum(
    log_decay: Tensor, log_write: Tensor, start: float | Tensor = -math.inf
) -> Tensor:
    """m_t = max(m_{t-1} + log_decay_t, log_write_t) along time, with m_0 = start in front.

    (batch, 1 + time, ...): the largest log weight in the state at each step, so that states in
    units of exp(m_t) stay near one whatever the gates are.
    """
    log_decay, log_write = torch.broadcast_tensors(log_decay, log_write)
    m = [log_write.new_zeros(log_write.shape[0], *log_write.shape[2:]) + start]
    for f, i in zip(log_decay.unbind(1), log_write.unbind(1), strict=True):
        m.append(torch.maximum(m[-1] + f, i))
    return torch.stack(m, dim=1)


def in_units_of(m: Tensor, log_decay: Tensor, log_write: Tensor) -> tuple[Tensor, Tensor]:
    """log decays and log writes of the state divided by exp(m_t); m as `running_maximum` gives."""
    return m[:, :-1] + log_decay - m[:, 1:], log_write - m[:, 1:]
