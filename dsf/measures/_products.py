"""The product of all transitions with its size as a logarithm, and what rounding did to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsf.measures._one_side import dense_step
from dsf.transitions import Transition


def whole_product(A: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """A_L ... A_2 at norm 1 (batch, head, state, state), ln of its norm, and its relative error.

    Step t rounds by n u |A_t| |A_(t-1) ... A_2|; what follows makes |A_L ... A_(t+1)| of that. The
    error, relative to the product's norm, is the sum of these; 0 where the product is exactly 0.
    """
    steps = range(1, A.lead_shape()[1])
    P, before = _running(dense_step(A, t) for t in steps)
    after = _running(dense_step(A, t).mT for t in reversed(steps))[1].flip(0)
    own = torch.stack([torch.log(torch.linalg.matrix_norm(dense_step(A, t), ord=2))
                       for t in steps])  # fmt: skip
    grown = torch.exp(before[:-1] + own + after[1:] - before[-1])
    error = A.n_state * 2.0**-53 * grown.masked_fill(grown.isnan(), 0.0).sum(0)
    return P, before[-1], error


def eigenvalue_conditions(vectors: Tensor) -> Tensor:
    """How much each eigenvalue answers to a change of its matrix, |x| |y|/|y^H x|.

    vectors (..., state, state): right eigenvectors x as columns; y are the rows of the inverse.
    inf where there is none, for a defective matrix.
    """
    left, singular = torch.linalg.inv_ex(vectors)
    sizes = torch.linalg.vector_norm(vectors, dim=-2) * torch.linalg.vector_norm(left, dim=-1)
    return sizes.masked_fill((singular != 0)[..., None], torch.inf).nan_to_num(
        torch.inf, torch.inf
    )


def _running(matrices: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The product at norm 1, the first matrix first applied, and ln of its norm after 0, 1, ..."""
    P, logs = None, []
    for M in matrices:
        P = M if P is None else M @ P
        norm = torch.linalg.matrix_norm(P, ord=2)
        logs.append(torch.log(norm))
        P = P / torch.where(norm > 0, norm, 1.0)[..., None, None]
    assert P is not None
    return P, torch.cumsum(torch.stack([torch.zeros_like(logs[0]), *logs]), 0)
