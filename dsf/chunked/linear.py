"""Chunked scan of decaying states: h_t = a_t h_{t-1} + B_t u_t with a scalar or a diagonal a_t.

    y_i = C_i D(0, i) h_0 + sum_{j <= i} (C_i D(j, i) B_j) u_j
    h_c = D(0, c) h_0 + sum_j D(j, c) B_j u_j

D(j, i) is the product of the decays between steps j and i of a chunk of c steps, h_0 the state
before it. Four matrix products a chunk, all chunks at once; then one state handed from chunk to
chunk. Source: Yang et al. (2024), section 3; Dao and Gu (2024), section 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsf.chunked.decays import Decays
from dsf.chunked.layout import from_chunks, rows, to_chunks, wide


def scan_linear(
    decays: Decays, B: Tensor, C: Tensor, values: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs and final state; all of one dtype, the length a multiple of `chunk`."""
    Q = to_chunks(C, chunk).contiguous()
    K = to_chunks(B.mT, chunk).contiguous()
    V = rows(to_chunks(values, chunk)).contiguous()
    starts, last = carry(decays.total, rows(decays.to_end(K)).mT @ V, state)
    y = add_product(rows(decays.from_start(Q)) @ starts, decays.scores(Q, K), V)
    return from_chunks(y, C.shape[-2]), last


def add_product(y: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """y + S V in one pass where no axis has to be broadcast."""
    if S.shape[:3] != V.shape[:3] or y.shape[:3] != V.shape[:3]:
        return y + S @ V
    lead = V.shape[:3]
    return torch.baddbmm(y.flatten(0, 2), S.flatten(0, 2), V.flatten(0, 2)).unflatten(0, lead)


def carry(total: Tensor | None, local: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before every chunk and after the last, summed in twice the precision.

    total: D(0, c), (batch, chunks or 1, head, state or 1, 1), None for ones; local: what each
    chunk adds, (batch, chunks, head, state, channel).
    """
    far = wide(local.dtype, local.device)
    count = local.shape[1]
    factors: Sequence[Tensor | None] = [None] * count
    if total is not None:
        factors = total.to(far).unbind(1) if total.shape[1] > 1 else [total[:, 0].to(far)] * count
    h = state.to(far)
    starts = []
    for factor, more in zip(factors, local.to(far).unbind(1), strict=True):
        starts.append(h.to(local.dtype))
        h = h + more if factor is None else torch.addcmul(more, factor, h)
    return torch.stack(starts, 1), h.to(local.dtype)
