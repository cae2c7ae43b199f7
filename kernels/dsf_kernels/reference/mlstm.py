"""The loop of the mLSTM with its running maximum."""

import torch
from torch.nn.functional import logsigmoid

LEAST = -1e30  # stands for -inf, whose differences are not numbers


def mlstm_scan_reference(
    query, key, value, input_gate, forget_gate, initial=None, *,
    scale=1.0, eps=0.0, forget="sigmoid",
):  # fmt: skip
    """Outputs of the stabilised mLSTM, step by step in float64.

    m_t = max(m_{t-1} + l_t, i_t),  a_t = exp(l_t + m_{t-1} - m_t),
    (S_t, n_t) = a_t (S_{t-1}, n_{t-1}) + exp(i_t - m_t) B_t (u_t, 1),
    y_t = scale C_t S_t / (max(|scale C_t n_t|, exp(-m_t)) + eps),

    l = logsigmoid(f), or f where forget = "exponential". Gates: (batch, time, head), before
    activation, exactly 0 after it where -inf; initial: (S, n, m) in units of exp(m), or None for
    (0, 0, 0). m_t, t > 0, is held constant in gradients: nothing depends on it but the units of
    the states. exp(-m_t) counts as 1e-300 at least: what no query reads is 0. Returns outputs and
    the last (S, n, m), m at least -1e30.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, length, head, n_channel = value.shape
    query = query.repeat_interleave(head // query.shape[2], 2)
    key = key.repeat_interleave(head // key.shape[2], 2)
    log_decay, log_write = forget_gate.double(), input_gate.double()
    if forget == "sigmoid":
        log_decay = logsigmoid(log_decay)
    kept, written = log_decay > LEAST, log_write > LEAST
    log_decay, log_write = log_decay.clamp_min(LEAST), log_write.clamp_min(LEAST)
    if initial is None:
        key_sum = value.new_zeros(batch, head, key.shape[3])
        state, m = key_sum.new_zeros(*key_sum.shape, n_channel), value.new_zeros(batch, head)
    else:
        state, key_sum, m = (part.double() for part in initial)
        m = m.clamp_min(LEAST)
    outputs = []
    for t in range(length):
        top = torch.maximum(m + log_decay[:, t], log_write[:, t]).detach()
        decay = torch.where(kept[:, t], torch.exp(log_decay[:, t] + m - top), 0.0)[..., None]
        weight = torch.where(written[:, t], torch.exp(log_write[:, t] - top), 0.0)
        write = weight[..., None] * key[:, t]
        state = decay[..., None] * state + write[..., None] * value[:, t, :, None, :]
        key_sum, m = decay * key_sum + write, top
        read = scale * query[:, t]
        least = torch.exp(-m).clamp_min(1e-300)
        divisor = torch.maximum((read * key_sum).sum(-1).abs(), least) + eps
        outputs.append(torch.einsum("bhn,bhnp->bhp", read, state) / divisor[..., None])
    stacked = torch.stack(outputs, 1) if outputs else value
    return stacked, (state, key_sum, m)
