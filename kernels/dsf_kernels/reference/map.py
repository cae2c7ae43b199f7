"""The definitions of `map_tiles` and `map_statistics`: maps entry by entry, in float64."""

import itertools
import math

import torch


def linear_map_reference(query, key, log_decay=None, *, scale=1.0):
    """The map W_ij = scale C_i a_i .. a_{j+1} B_j for j <= i, else 0, one step after another.

    query (C), key (B): (batch, time, group, N), head k reads group k // (head / group);
    log_decay (log a): (batch, time, head), (batch, time, head, N), or None for a = 1, when every
    group is a head. Returns (batch, head, query, key). Each step decays the keys written before
    it, so that decays of exactly 0 and of exp(-1000) are exact. Cost: L^2 N a head, L N memory
    beside the map.
    """
    query, key = query.double(), key.double()
    batch, length, group, n_state = key.shape
    head = group if log_decay is None else log_decay.shape[2]
    head = max(head, query.shape[2])
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // group, 2)
    decay = key.new_ones(1, length, 1, 1) if log_decay is None else log_decay.double().exp()
    decay = decay[..., None] if decay.ndim == 3 else decay
    decay = decay.expand(batch, length, head, n_state)
    written = key.new_zeros(batch, head, length, n_state)
    rows = []
    for t in range(length):
        written = decay[:, t, :, None] * written
        written[:, :, t] = key[:, t]
        rows.append(scale * (written @ query[:, t, :, :, None])[..., 0])
    return torch.stack(rows, 2) if rows else key.new_zeros(batch, head, 0, 0)


def softmax_map_reference(query, key, bias=None, *, scale=1.0, causal=True):
    """The map W_ij = exp(z_ij) / sum_k exp(z_ik), z = scale C_i B_j + bias_ij, row by row.

    query (batch, time, head, N), key (batch, key, group, N); bias broadcasts to (batch, head,
    query, key) and may be -inf; causal: over j <= i. A row without any key is zero. Returns
    (batch, head, query, key).
    """
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    logits = scale * torch.einsum("bihn,bjhn->bhij", query, key)
    if bias is not None:
        logits = logits + bias.double()
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    weights = torch.zeros_like(logits)
    for t in range(logits.shape[2]):
        row = logits[:, :, t]
        alive = (row > -math.inf).any(-1, keepdim=True)
        weights[:, :, t] = torch.where(alive, row, 0.0).softmax(-1) * alive
    return weights


def map_statistics_reference(weights, edges=None):
    """What `weights` (..., query, key) say of each row: {name: (..., query)}, in float64.

    sum, squares (of w), negative (sum of max(-w, 0)), absolute, log_moment (sum |w| ln |w|),
    entropy (ln absolute - log_moment / absolute, 0 at the least; NaN for a row of zeros), maximum.
    With `edges`, ascending lags e_0 .. e_m: lag_mass (..., query, bin), the |w| of bin b at lags
    e_b <= i - j < e_{b+1}.
    """
    w = weights.double()
    size = w.abs()
    absolute, log_moment = size.sum(-1), torch.xlogy(size, size).sum(-1)
    total = absolute.masked_fill(absolute == 0, math.nan)
    found = {
        "sum": w.sum(-1), "squares": w.square().sum(-1), "negative": (-w).clamp(min=0).sum(-1),
        "absolute": absolute, "log_moment": log_moment,
        "maximum": w.amax(-1) if w.shape[-1] else absolute,
        "entropy": (total.log() - log_moment / total).clamp(min=0),
    }  # fmt: skip
    if edges is not None:
        place = torch.arange(w.shape[-2], device=w.device)[:, None]
        lag = place - torch.arange(w.shape[-1], device=w.device)
        bins = [(lag >= low) & (lag < high) for low, high in itertools.pairwise(edges)]
        found["lag_mass"] = torch.stack([(size * inside).sum(-1) for inside in bins], -1)
    return found
