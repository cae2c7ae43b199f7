"""The definition of `monarch_attention`: both factors in full, step by step."""

import torch
from torch.nn.functional import pad


def monarch_attention_reference(
    query, key, value, *, block, steps=1, key_mask=None, padding="after", scale=None,
    dtype=torch.float64,
):  # fmt: skip
    """Outputs O = M V, M[(l, j), (k, i)] = L_jkl R_kji after `steps` steps from L = identity.

        c_kj = sum_l w_lj L_jkl,   abar_kj = sum_l w_lj L_jkl q_lj / c_kj   (0 where c = 0)
        R_kj. = softmax_i(s abar_kj.k_ki)
        L_j.l = softmax_k(q_lj.(s sum_i R_kji k_ki) - sum_i R_kji log R_kji)

    w is 1 for tokens that are there and kept by key_mask; the others are no keys. A block without
    any key takes nothing, a sequence without any gives zeros. Arguments as `monarch_attention`.
    Computed in `dtype`, differentiable. Cost: 2 steps of time x (block + n_block) x width.
    """
    query, key, value = (t.to(dtype) for t in (query, key, value))
    batch, length, head, width = query.shape
    scale = width**-0.5 if scale is None else scale
    key = key.repeat_interleave(head // max(key.shape[2], 1), 2)
    m = max(1, -(-length // block))
    missing = m * block - length
    front = missing if padding == "before" else 0

    def split(x):  # (batch, time, head, width) -> (batch, head, block, place, width)
        x = pad(x, (0, 0, 0, 0, front, missing - front))
        return x.unflatten(1, (m, block)).permute(0, 3, 1, 2, 4)

    kept = torch.ones(batch, length, device=query.device) if key_mask is None else key_mask
    kept = split(kept.to(dtype)[:, :, None, None])[..., 0]  # batch 1 block place
    q, k, v = split(query), split(key), split(value)
    left = torch.eye(m, dtype=q.dtype, device=q.device).expand(batch, head, block, m, m)
    for _ in range(steps):
        weight = left * kept.mT[:, :, :, None]  # batch head place k l
        c = weight.sum(-1, keepdim=True)
        abar = weight @ q.transpose(2, 3) / torch.where(c == 0, 1.0, c)
        logits = scale * abar.transpose(2, 3) @ k.mT  # batch head k place i
        right, log = _softmax(logits.masked_fill(kept[:, :, :, None] == 0, -torch.inf))
        inner = (right * log).sum(-1).masked_fill(kept.amax(-1)[..., None] == 0, torch.inf)
        means = scale * (right @ k).transpose(2, 3)  # batch head place k width
        left = _softmax(q.transpose(2, 3) @ means.mT - inner.mT[:, :, :, None])[0].mT
    out = (left.mT @ (right @ v).transpose(2, 3)).transpose(2, 3)
    return out.flatten(2, 3)[:, :, front : front + length].transpose(1, 2)


def _softmax(logits):
    """Softmax of the last axis, and its logarithm with 0 for that of 0; all -inf gives 0."""
    closed = logits == -torch.inf
    logits = logits.masked_fill(closed.all(-1, keepdim=True), 0.0)
    log = torch.log_softmax(logits, -1).masked_fill(closed, 0.0)
    return log.exp().masked_fill(closed, 0.0), log
