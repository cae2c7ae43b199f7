"""Seeded torch.nn layers and inputs, and a weight that changes behind a trace's back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
BATCH, WIDTH, HEADS = 2, 12, 3


def random_input(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def attention(dtype: torch.dtype, **options: Any) -> nn.MultiheadAttention:
    """Attention whose weights matter, with dropout that evaluation mode must leave out."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def spoil_after_the_pass(model: nn.Module, weight: str, factor: float = 1.01) -> None:
    """Change a weight when the model has run, so that a readout no longer gives its output."""
    parameter = model.get_parameter(weight)

    def spoil(*_: Any) -> None:
        with torch.no_grad():
            parameter.mul_(factor)

    model.register_forward_hook(spoil)
