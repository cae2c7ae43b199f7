"""The loop of causal InLine attention, and the quadratic form of the one that sees all tokens."""

import torch


def _heads(tensor, n_head, axis):
    return tensor.repeat_interleave(n_head // tensor.shape[axis], axis)


def inline_scan_reference(query, key, value, initial=None, *, scale=1.0, over_count=False):
    """Outputs of y_t = g_t q_t S_t + ((1 - g_t q_t z_t) / t) w_t, step by step in float64.

    S_t, z_t, w_t: sums over j <= t of (k_j - a) u_j, k_j - a, u_j, with a the first key, a
    constant, which drops out of every output; g_t = scale, or scale / t if over_count. initial:
    (S, z, w, a, tokens seen) of the tokens before. Shapes as `inline_scan`. Returns outputs and
    the last (S, z, w, a, tokens seen).
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, length, n_head, channels = value.shape
    group, n_state = key.shape[2:]
    if initial is None:
        memory = value.new_zeros(batch, n_head, n_state, channels)
        key_sum = value.new_zeros(batch, n_head, n_state)
        value_sum = value.new_zeros(batch, n_head, channels)
        anchor = key[:, 0].detach() if length else key.new_zeros(batch, group, n_state)
        count = 0
    else:
        memory, key_sum, value_sum, anchor, count = initial
        memory, key_sum, value_sum = memory.double(), key_sum.double(), value_sum.double()
        anchor = anchor.double().detach()
    queries = _heads(query, n_head, 2)
    keys = _heads(key - anchor[:, None], n_head, 2)
    outputs = []
    for t in range(length):
        count = count + 1
        k, u = keys[:, t], value[:, t]
        memory = memory + k[..., :, None] * u[..., None, :]
        key_sum, value_sum = key_sum + k, value_sum + u
        q = queries[:, t] * (scale / count if over_count else scale)
        own = (1 - (q * key_sum).sum(-1, keepdim=True)) / count
        outputs.append((q[..., None, :] @ memory)[..., 0, :] + own * value_sum)
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, (memory, key_sum, value_sum, anchor, count)


def inline_mix_reference(query, key, value, *, scale=1.0, over_count=False):
    """Outputs of y_i = sum_j (g q_i . (k_j - mean k) + 1/L) u_j over all j, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    n_head, length = value.shape[2], max(value.shape[1], 1)
    queries, keys = _heads(query, n_head, 2), _heads(key, n_head, 2)
    g = scale / length if over_count else scale
    centred = keys - keys.sum(1, keepdim=True) / length
    weights = g * torch.einsum("bihn,bjhn->bhij", queries, centred) + 1 / length
    return torch.einsum("bhij,bjhp->bihp", weights, value)


def inline_scan_bound(query, key, value, initial=None, *, scale=1.0, over_count=False):
    """The sums of the loop on arguments >= 0, where every term adds: what its rounding grows with.

    Arguments and results as `inline_scan_reference`.
    """
    n_head, length = value.shape[2:0:-1]
    memory, key_sum, value_sum, anchor, count = initial or (0, 0, 0, None, 0)
    keys = _heads(key + (key[:, :1] if anchor is None else anchor[:, None]), n_head, 2)
    t = torch.arange(count + 1, count + 1 + length, dtype=torch.float64, device=value.device)
    t = t[:, None, None]
    queries = _heads(query, n_head, 2) * (scale / t if over_count else scale)
    written = keys[..., :, None] * value[..., None, :]
    start = [s[:, None] if initial else 0 for s in (memory, key_sum, value_sum)]
    sums = [x.cumsum(1) + s for x, s in zip((written, keys, value), start, strict=True)]
    own = (1 + (queries * sums[1]).sum(-1, keepdim=True)) / t
    y = (queries[..., None, :] @ sums[0])[..., 0, :] + own * sums[2]
    last = [x.sum(1) + (s[:, 0] if initial else 0)
            for x, s in zip((written, keys, value), start, strict=True)]  # fmt: skip
    return y, (*last, anchor, count)


def inline_mix_bound(query, key, value, *, scale=1.0, over_count=False):
    """The same for the form that sees all tokens: as `inline_mix_reference`, every term added."""
    n_head, length = value.shape[2], max(value.shape[1], 1)
    keys = _heads(key + key.sum(1, keepdim=True) / length, n_head, 2)
    g = scale / length if over_count else scale
    weights = g * torch.einsum("bihn,bjhn->bhij", _heads(query, n_head, 2), keys) + 1 / length
    return torch.einsum("bhij,bjhp->bihp", weights, value)
