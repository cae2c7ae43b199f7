"""HiPPO-LegS in diagonal-plus-low-rank form, and conjugate pairs: what S4 and S5 start from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsf.shapes import Float, Inexact


class Legs(NamedTuple):
    """A = V (diag(eigenvalues) - low_rank low_rank^*) V^*, half of each conjugate pair."""

    eigenvalues: Tensor
    low_rank: Tensor
    input: Tensor
    basis: Tensor


def legs_matrix(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """HiPPO-LegS: A_ij = -sqrt((2i+1)(2j+1)) below, -(i+1) on the diagonal; B_i = sqrt(2i+1).

    Source: Gu et al. (2020), HiPPO, theorem 2.
    """
    root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    A = -torch.tril(root[:, None] * root, -1)
    return A - torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64)), root


def legs_pairs(n: int) -> Legs:
    """The n/2 eigenvalues of positive imaginary part of A + p p^T, p = sqrt(i + 1/2), and bases.

    A + p p^T = -1/2 I + skew, so it is normal and its eigenvectors are unitary. Source: Gu et al.
    (2022), S4, theorem 1.
    """
    A, B = legs_matrix(n)
    p = B / 2**0.5
    skew = A + p[:, None] * p + 0.5 * torch.eye(n, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)
    keep = frequency > 0
    frequency, V = frequency[keep], V[:, keep]
    back = V.conj().mT
    return Legs(torch.complex(torch.full_like(frequency, -0.5), frequency),
                back @ p.to(V.dtype), back @ B.to(V.dtype), V)  # fmt: skip


def with_conjugates(x: Inexact[Tensor, "*lead pair"]) -> Inexact[Tensor, "*lead state"]:
    """(x, conj x) along the last axis: both members of every pair."""
    return torch.cat([x, x.conj()], -1)


def as_parameter(x: Tensor) -> torch.nn.Parameter:
    """A complex tensor as a real parameter with a last axis (real, imaginary), float32."""
    return torch.nn.Parameter(torch.view_as_real(x.to(torch.complex64).contiguous()).clone())
