"""Chunked scan of delta rules: h_t = a_t h_{t-1} - L_t (R_t^T h_{t-1}) + B_t u_t.

With w_t = R_t^T h_{t-1} the state is that of a decaying scan with inputs (u_t, -w_t) written by
(B_t, L_t). Inside a chunk w solves one unit lower triangular system (the UT or WY form):

    w_i + sum_{j < i} R_i^T D(j, i-1) L_j w_j
        = R_i^T D(0, i-1) h_0 + sum_{j < i} R_i^T D(j, i-1) B_j u_j

D(j, i) is the product of the decays a between steps j and i, h_0 the state before the chunk. The
products come from `decays`, so every decay is safe here that is safe there. Source: Yang et al.
(2024), "Parallelizing linear transformers with the delta rule", section 3.2; Yang et al. (2025),
"Gated delta networks", section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.chunked.decays import Decays, Parts, assemble, even, numbers, odd
from dsf.chunked.layout import from_chunks, rows, to_chunks
from dsf.chunked.linear import add_product
from dsf.shapes import broadcast_shapes
from dsf.transitions._base import real_dtype


def scan_low_rank(
    decays: Decays, left: Tensor, right: Tensor, B: Tensor, C: Tensor, values: Tensor,
    state: Tensor, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and final state; left, right (batch, time, head, state, rank), all of one dtype.

    Cost per token and head: O(chunk (state + channel)) for the scores and the solve, O(state^2)
    for the chunk's own transition.
    """
    n_output, n_input = C.shape[-2], B.shape[-1]
    read, erase, keys, write = _one_lead(*(to_chunks(x, chunk) for x in (
        C, right.mT, B.mT, left.mT)))  # fmt: skip
    V = rows(to_chunks(values, chunk)).contiguous()
    # R_i reads the state of step i - 1, so it is scored one row earlier, beside C_{i-1}.
    ahead = pad(erase[..., 1:, :, :], (0, 0, 0, 0, 0, 1))
    Q, K = torch.cat([read, ahead], -2), torch.cat([keys, write], -2)
    scores = decays.scores(Q, K).unflatten(-1, (chunk, -1)).unflatten(-3, (chunk, -1))
    seen, late = scores[..., :n_output, :, :], _one_later(scores[..., n_output:, :, :])
    start, end = decays.from_start(Q), decays.to_end(K)
    reach = torch.cat(_one_lead(erase[..., :1, :, :], start[..., :-1, n_output:, :]), -3)

    solve = inverse(_square(late[..., n_input:]), erase.shape[-2])
    by_state = solve @ rows(reach)  # w = by_state h_0 + own
    own = solve @ (_square(late[..., :n_input]) @ V)
    kept, removed = rows(end[..., :n_input, :]).mT, rows(end[..., n_input:, :]).mT
    starts, w, last = _carry(decays.whole, by_state, own, removed, kept @ V, state)
    y = add_product(rows(start[..., :n_output, :]) @ starts, _square(seen[..., :n_input]), V)
    return from_chunks(y - _square(seen[..., n_input:]) @ w, n_output), last


def _one_lead(*tensors: Tensor) -> list[Tensor]:
    """The same batch, head and chunk axes on all, for joining."""
    lead = broadcast_shapes(*[x.shape[:3] for x in tensors])
    return [x.expand(*lead, *x.shape[3:]) for x in tensors]


def _square(scores: Tensor) -> Tensor:
    """(..., c, output, c, input) -> (..., c * output, c * input)."""
    return scores.flatten(-2, -1).flatten(-3, -2)


def _one_later(scores: Tensor) -> Tensor:
    """Row i of what was scored as row i - 1; the first step reads the state before the chunk."""
    return pad(scores[..., :-1, :, :, :], (0, 0, 0, 0, 0, 0, 1, 0))


def inverse(triangle: Tensor, rank: int) -> Tensor:
    """(1 + triangle)^{-1} for blocks strictly below the diagonal, (..., c * rank, c * rank).

    Block by block, [[1 + P, 0], [X, 1 + S]]^{-1} = [[p, 0], [-s X p, s]] with p, s the inverses
    of the corners: log2(c) rounds of products over all blocks at once.
    """
    size = rank
    lead, n = triangle.shape[:-2], triangle.shape[-1]
    eye = torch.eye(rank, dtype=triangle.dtype, device=triangle.device)
    done = eye.expand(*lead, n // rank, rank, rank)
    while size < n:
        blocks = triangle.unflatten(-1, (-1, 2 * size)).unflatten(-3, (-1, 2 * size))
        cross = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]
        done = assemble(done, -(odd(done) @ cross @ even(done)))
        size *= 2
    return done.squeeze(-3)


def _carry(
    whole: Parts | None, by_state: Tensor, own: Tensor, removed: Tensor, local: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h <- D(0, c) h + local - removed w with w = by_state h + own, chunk after chunk.

    The state is summed in twice the precision. Returns the state before every chunk, w, the last.
    """

    def steps(x: Tensor) -> Sequence[Tensor]:
        return x.unbind(2) if x.shape[2] > 1 else [x[:, :, 0]] * local.shape[2]

    factors: Sequence[Tensor | None] = [None] * local.shape[2]
    if whole is not None:
        factors = steps(numbers(whole, real_dtype(state.dtype)).mT)
    starts, erased = [], []
    for factor, M, more, R, new in zip(
        factors, steps(by_state), steps(own), steps(removed), steps(local), strict=True
    ):
        start = state.to(local.dtype)
        w = M @ start + more
        new = (new - R @ w).to(state.dtype)
        state = state + new if factor is None else torch.addcmul(new, factor, state)
        starts.append(start)
        erased.append(w)
    return torch.stack(starts, 2), torch.stack(erased, 2), state
