"""Reference vectors made by the original authors' code: `golden(name)` and how close to be."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN_TOLERANCE = 1e-9
"""Largest difference over the largest expected entry (at least 1), float64."""


class Golden(dict[str, Tensor]):
    """The arrays of one file by key; `group("param")` takes those of one prefix without it."""

    def group(self, prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in self.items() if k.startswith(start)}


def golden(name: str) -> Golden:
    """All numeric arrays of tests/golden/<name>.npz as tensors."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        return Golden(
            {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind in "fciub"}
        )


def assert_golden(got: Tensor, expected: Tensor, tolerance: float = GOLDEN_TOLERANCE) -> None:
    """Same shape, and within `tolerance` of the largest expected entry (at least 1)."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} != {tuple(expected.shape)}"
    got, expected = got.detach(), expected.detach()
    error = float((got - expected).abs().max() / max(1.0, float(expected.abs().max())))
    assert error <= tolerance, f"relative difference {error:.2e} > {tolerance:.0e}"
