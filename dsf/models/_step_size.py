"""Step sizes of the selective state space models: softplus of a projection, and its start."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_INITIAL_STEP = 1e-4


def step_sizes(
    raw: Tensor,
    bias: Tensor | None = None,
    softplus: bool = False,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """softplus(raw + bias), or raw + bias, clamped to `limits` if given.

    torch's softplus, which is x itself above 20: the released layers use it, and so do their
    numbers.
    """
    s = raw if bias is None else raw + bias
    s = functional.softplus(s) if softplus else s
    return s if limits is None else s.clamp(*limits)


def initial_step_bias(n: int, smallest: float, largest: float) -> Tensor:
    """Biases whose softplus is log-uniform in [smallest, largest] (Gu and Dao, 2023)."""
    low, high = math.log(smallest), math.log(largest)
    s = torch.exp(torch.rand(n) * (high - low) + low).clamp(min=_SMALLEST_INITIAL_STEP)
    return s + torch.log(-torch.expm1(-s))
