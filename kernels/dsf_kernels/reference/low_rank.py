"""The loops of `low_rank_scan` and `kda_scan`."""

import torch


def low_rank_scan_reference(
    query, key, value, left, right, log_decay=None, initial_state=None, *, scale=1.0
):
    """Outputs of h_t = (diag(a_t) + x_t w_t^T) h_{t-1} + B_t u_t, y_t = scale C_t h_t.

    C = query, B = key, x = left, w = right (batch, time, group, state), u = value, a =
    exp(log_decay) (batch, time, head, state), 1 where None. Step by step in float64,
    differentiable. Cost: L steps of N P per head.
    """
    value, head = value.double(), value.shape[2]
    query, key, left, right = (
        t.double().repeat_interleave(head // t.shape[2], 2) for t in (query, key, left, right)
    )
    decay = torch.ones_like(key) if log_decay is None else log_decay.double().exp()
    if initial_state is None:
        state = value.new_zeros(value.shape[0], head, key.shape[3], value.shape[3])
    else:
        state = initial_state.double()
    outputs = []
    for t in range(value.shape[1]):
        read = torch.einsum("bhn,bhnp->bhp", right[:, t], state)
        state = decay[:, t, :, :, None] * state + left[:, t, :, :, None] * read[:, :, None]
        state = state + key[:, t, :, :, None] * value[:, t, :, None]
        outputs.append(scale * torch.einsum("bhn,bhnp->bhp", query[:, t], state))
    return torch.stack(outputs, 1) if outputs else value * scale, state


def kda_scan_reference(
    query, key, value, write_strength, log_decay=None, initial_state=None, *, scale=1.0
):
    """Outputs of h_t = (I - b k k^T) diag(a) h_{t-1} + b k u, y_t = scale q_t h_t, in float64.

    k = key, u = value, b = write_strength (batch, time, head), a = exp(log_decay).
    """
    key = key.double().repeat_interleave(value.shape[2] // key.shape[2], 2)
    written = write_strength.double()[..., None] * key
    right = key if log_decay is None else key * log_decay.double().exp()
    return low_rank_scan_reference(
        query, written, value, -written, right, log_decay, initial_state, scale=scale
    )
