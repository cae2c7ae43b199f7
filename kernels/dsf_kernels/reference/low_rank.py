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


def low_rank_chunk_reference(
    query, key, value, left, right, log_decay=None, initial_state=None, *, scale=1.0, chunk=16
):
    """The same by chunks, as `low_rank_chunk_launch.py` states it: the algebra of its kernels.

    In float64, for the tests; one group a head. Cost: (chunk, chunk, state) numbers at once.
    """
    query, key, value, left, right = (t.double() for t in (query, key, value, left, right))
    batch, length, head, channel = value.shape
    state = value.new_zeros(batch, head, key.shape[3], channel)
    state = state if initial_state is None else initial_state.double()
    log = torch.zeros_like(key) if log_decay is None else log_decay.double()
    outputs = []
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        q, k, v, x, w, log_part = (
            t[:, part].transpose(1, 2) for t in (query, key, value, left, right, log)
        )
        i = torch.arange(q.shape[2])
        # D[i, j] = product of a over j < t <= i, summed as logarithms step by step
        step = (i[None, None, :] > i[None, :, None]) & (i[None, None, :] <= i[:, None, None])
        upto = i[None, :] <= i[:, None]
        a = log_part.clamp_min(-1000.0)
        between = torch.einsum("ijt,bhtn->bhijn", step.double(), a).exp()
        start = torch.einsum("it,bhtn->bhin", upto.double(), a).exp()
        before = torch.einsum("it,bhtn->bhin", (i[None, :] < i[:, None]).double(), a).exp()
        end = torch.einsum("it,bhtn->bhin", (i[None, :] > i[:, None]).double(), a).exp()
        late = torch.cat([torch.zeros_like(between[:, :, :1]), between[:, :, :-1]], 2)
        qk = torch.einsum("bhin,bhijn,bhjn->bhij", q, between, k).tril()
        qx = torch.einsum("bhin,bhijn,bhjn->bhij", q, between, x).tril()
        wk = torch.einsum("bhin,bhijn,bhjn->bhij", w, late, k).tril(-1)
        wx = torch.einsum("bhin,bhijn,bhjn->bhij", w, late, x).tril(-1)
        solve = torch.linalg.inv(torch.eye(len(i), dtype=wx.dtype) - wx)
        mixed, find = solve @ wk, solve @ (w * before)
        read = q * start + qx @ find
        put, write = x * end, k * end + mixed.mT @ (x * end)
        outputs.append((read @ state + (qk + qx @ mixed) @ v).transpose(1, 2))
        whole = a.sum(2).exp()[..., None]
        state = whole * state + put.mT @ (find @ state) + write.mT @ v
    return scale * torch.cat(outputs, 1) if outputs else value * scale, state
