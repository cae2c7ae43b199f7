"""Systems of known order for the tests of realisation, reduction and Hankel singular values."""

from __future__ import annotations

import torch

import dsf
from dsf.transitions import Dense, Diagonal, Householder, Identity, Shift

STRUCTURES = ["diagonal", "resets", "complex", "householder", "dense", "shift", "identity"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_structure(structure: str, length: int = 20, n: int = 3) -> dsf.Recurrence:
    lead = (2, length, 2)
    k = torch.nn.functional.normalize(random(*lead, n, seed=5), dim=-1)
    A = {
        "diagonal": lambda: Diagonal(-random(*lead, n).abs()),
        "resets": lambda: Diagonal.from_decay((random(*lead, n) > -1).double()),
        "complex": lambda: Diagonal(-random(*lead, n).abs(), phase=random(*lead, n, seed=1)),
        "householder": lambda: Householder(torch.sigmoid(random(*lead)), k),
        "dense": lambda: Dense(random(*lead, n, n) / 2),
        "shift": lambda: Shift(n),
        "identity": lambda: Identity(n),
    }[structure]()
    dtype = torch.complex128 if structure == "complex" else torch.float64
    B = random(*lead, n, 1, seed=2, dtype=dtype)
    C = random(*lead, 1, n, seed=3, dtype=dtype)
    return dsf.Recurrence(A, B, C, real_output=structure == "complex")


def selective(length: int, n: int, *, batch: int = 1, head: int = 1, seed: int = 0) -> (
    dsf.Recurrence
):  # fmt: skip
    """A random selective state space model, decays in (0.3, 1)."""
    decay = 0.3 + 0.7 * uniform(batch, length, head, n, seed=seed)
    return dsf.Recurrence(
        Diagonal(decay.log()), random(batch, length, head, n, 1, seed=seed + 1),
        random(batch, length, head, 1, n, seed=seed + 2),
    )  # fmt: skip


def softmax(length: int, width: int = 4, scale: float | None = None) -> dsf.Recurrence:
    q, k = random(1, length, 1, width), random(1, length, 1, width, seed=1)
    rows = dsf.SoftmaxRows(q, k, scale=scale)
    return dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows, system="softmax")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
