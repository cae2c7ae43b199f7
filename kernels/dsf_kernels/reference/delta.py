"""The loop of `delta_scan`, and how much its solve multiplies rounding."""

import torch


def delta_scan_reference(
    query, key, value, write_strength, log_decay=None, initial_state=None, *, scale=1.0
):
    """Outputs of h_t = a_t (I - b_t B_t B_t^T) h_{t-1} + b_t B_t u_t, y_t = scale C_t h_t.

    Arguments as `scalar_decay_scan_reference`, with b = write_strength (batch, time, head) and
    a = 1 where log_decay is None. Step by step in float64, differentiable. Cost: L steps of N P
    per head.
    """
    query, key, value, write = (t.double() for t in (query, key, value, write_strength))
    batch, length, head, n_channel = value.shape
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // key.shape[2], 2)
    decay = torch.ones_like(write) if log_decay is None else log_decay.double().exp()
    if initial_state is None:
        state = value.new_zeros(batch, head, key.shape[3], n_channel)
    else:
        state = initial_state.double()
    outputs = []
    for t in range(length):
        state = decay[:, t, :, None, None] * state
        held = torch.einsum("bhn,bhnp->bhp", key[:, t], state)
        error = write[:, t, :, None] * (value[:, t] - held)
        state = state + key[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], state))
    stacked = torch.stack(outputs, 1) if outputs else value * scale
    return stacked, state


def solve_condition(key, write_strength, log_decay, chunk):
    """Largest row sum of |(I + G)^-1| (I + |G|) over chunks: how rounding grows in the solve.

    G_ij = b_i exp(g_i - g_j) k_i . k_j for i > j in one chunk, g the cumulative log decay.
    """
    length, head = write_strength.shape[1:]
    key = key.double().repeat_interleave(head // key.shape[2], 2)
    worst = 1.0
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        k, write = key[:, part].transpose(1, 2), write_strength[:, part].double().mT
        coupling = write[..., None] * (k @ k.mT)
        if log_decay is not None:
            g = log_decay[:, part].double().clamp_min(-1e3).cumsum(1).mT
            coupling = coupling * (g[..., :, None] - g[..., None, :]).clamp_max(0).exp()
        coupling = coupling.tril(-1)
        one = torch.eye(coupling.shape[-1], dtype=coupling.dtype, device=coupling.device)
        growth = torch.linalg.inv(one + coupling).abs() @ (one + coupling.abs())
        worst = max(worst, float(growth.sum(-1).max())) if growth.numel() else worst
    return worst
