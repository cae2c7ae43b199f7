"""What the tests of whole blocks share: random numbers and the gap that is allowed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

REACHED = 1e-12


def drawn(shape: torch.Size | tuple, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(found: Tensor | np.ndarray, exact: Tensor) -> bool:
    """Whether the largest gap is within REACHED of the largest number."""
    gap = (torch.as_tensor(found) - exact).abs().max()
    return float(gap.detach()) <= REACHED * max(float(exact.detach().abs().max()), 1e-300)
