"""The loop of `diagonal_decay_scan`."""

import torch


def diagonal_decay_scan_reference(
    query, key, value, log_decay, initial_state=None, bonus=None, *, scale=1.0
):
    """Outputs of h_t = diag(a_t) h_{t-1} + B_t u_t, y_t = scale C_t h_t, step by step in float64.

    query (C), key (B), log_decay (log a): (batch, time, head, N); value (u): (batch, time, head,
    P); initial_state: (batch, head, N, P) or None for zero; key None: B_t = 1 - a_t; with bonus w
    (head, N) y_t = scale C_t (h_{t-1} + diag(w) B_t u_t). Returns outputs (batch, time, head, P)
    and the final state (batch, head, N, P). Differentiable. Cost: L steps of N P per head.
    """
    query, value, log_decay = query.double(), value.double(), log_decay.double()
    key = -torch.expm1(log_decay) if key is None else key.double()
    decay = log_decay.exp()
    batch, length, head, n_channel = value.shape
    if initial_state is None:
        state = value.new_zeros(batch, head, query.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        written = key[:, t, :, :, None] * value[:, t, :, None, :]
        after = decay[:, t, :, :, None] * state + written
        read = after if bonus is None else state + bonus.double()[:, :, None] * written
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], read))
        state = after
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state
