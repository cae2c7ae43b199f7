"""The decay of real-gated linear recurrent units, and the root that keeps their states' size."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.shapes import Float

DECAY_SCALE = 8.0
"""c of the paper: the largest decay is exp(-c softplus(parameter))."""


def decay_root(log_decay: Float[Tensor, "*any"], epsilon: float = 0.0) -> Float[Tensor, "*any"]:
    """sqrt(1 - a^2 + epsilon), 1 - a^2 taken from log a; where it is 0 it has no gradient."""
    x = epsilon - torch.expm1(2 * log_decay)
    zero = x.detach() <= 0
    return torch.sqrt(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def initial_decay_parameter(*shape: int) -> Float[Tensor, "*shape"]:
    """softplus^-1(-log a) with a^2 uniform in [0.9^2, 0.999^2], the decay at half-open gates."""
    squared = torch.empty(*shape).uniform_(0.9**2, 0.999**2)
    return torch.log(torch.expm1(-0.5 * torch.log(squared)))
