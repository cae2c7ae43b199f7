"""The loop of `scalar_decay_scan`."""

import itertools

import torch


def scalar_decay_scan_reference(
    query, key, value, log_decay=None, initial_state=None, *, scale=1.0, cu_seqlens=None
):
    """Outputs of h_t = a_t h_{t-1} + B_t u_t, y_t = scale C_t h_t, step by step in float64.

    query (C), key (B): (batch, time, group, N), head k reads group k // (head / group);
    value (u): (batch, time, head, P); log_decay: (batch, time, head), (head,) or None for a = 1;
    initial_state: (batch, head, N, P) or None for zero. Returns outputs (batch, time, head, P)
    and the final state (batch, head, N, P). Differentiable. Cost: L steps of N P per head.
    cu_seqlens: where the sequences of a row (batch 1) start, and its length; then a loop for each,
    with initial_state and final state (sequence, head, N, P).
    """
    if cu_seqlens is not None:
        parts = []
        for s, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            tensors = [t[:, start:stop] for t in (query, key, value)]
            decay = log_decay
            if decay is not None and decay.dim() == 3:
                decay = decay[:, start:stop]
            tensors.append(decay)
            tensors.append(None if initial_state is None else initial_state[s : s + 1])
            parts.append(scalar_decay_scan_reference(*tensors, scale=scale))
        outputs, states = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(states)
    query, key, value = query.double(), key.double(), value.double()
    batch, length, head, n_channel = value.shape
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // key.shape[2], 2)
    if log_decay is None:
        decay = value.new_ones(batch, length, head)
    else:
        decay = log_decay.double().exp().expand(batch, length, head)
    if initial_state is None:
        state = value.new_zeros(batch, head, key.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        written = key[:, t, :, :, None] * value[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + written
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], state))
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state
