"""The loop of ZeroS in its normalised form."""

import torch


def zeros_scan_reference(query, key, value, logit, first, higher, zero=None, moments=None,
                         totals=None):  # fmt: skip
    """Outputs of ZeroS, step by step in float64.

    t counts tokens; l_t = log sum_{j<=t} exp(s_j), p = exp(s_t - l_t), c_t = the mean of s_1..t,
    d = s_t - c_{t-1}, Z_t = k_t u_t^T:

    F_t = (1 - p) F_{t-1} + p Z_t                      softmax mean of Z
    G_t = G_{t-1} + (1 - 1/t) d (Z_t - H_{t-1}/(t - 1))    sum of (s_j - c_t) Z_j
    H_t = H_{t-1} + Z_t                                sum of Z
    y_t = q_t (higher (F_t - H_t/t) + (first - higher) G_t/t + zero H_t/t)

    logit and gates: (batch, time, head); moments (batch, head, 3, state, channel): F - H/t, G, H;
    totals (batch, head, 3): l, c, t; None: before the first token. Returns outputs and both.
    """
    q, k, v, s = (x.double() for x in (query, key, value, logit))
    first, higher = first.double(), higher.double()
    zero = torch.zeros_like(first) if zero is None else zero.double()
    batch, length, head, channels = v.shape
    if moments is None:
        moments = v.new_zeros(batch, head, 3, k.shape[3], channels)
    if totals is None:
        totals = v.new_tensor([-torch.inf, 0.0, 0.0]).expand(batch, head, 3)
    gap, g, h = moments.double().unbind(2)
    log_total, mean, count = totals.double().unbind(2)

    def wide(x):
        return x[..., None, None]

    outputs = []
    for t in range(length):
        z = k[:, t, :, :, None] * v[:, t, :, None]
        new = torch.logaddexp(log_total, s[:, t]) if t or totals.isfinite().all() else s[:, t]
        stay, p = torch.exp(log_total - new), torch.exp(s[:, t] - new)
        f = gap + h / wide(count.clamp_min(1))
        f = wide(stay) * f + wide(p) * z
        d = torch.where(count == 0, torch.zeros_like(mean), s[:, t] - mean)
        g = g + wide(d) * (wide(count) * z - h) / wide(count + 1)
        mean = torch.where(count == 0, s[:, t], mean + d / (count + 1))
        h, count, log_total = h + z, count + 1, new
        gap = f - h / wide(count)
        gates = higher[:, t], (first - higher)[:, t] / count, zero[:, t] / count
        read = sum(wide(c) * x for c, x in zip(gates, (gap, g, h), strict=True))
        outputs.append(torch.einsum("bhn,bhnp->bhp", q[:, t], read))
    stacked = torch.stack(outputs, 1) if outputs else v
    return stacked, torch.stack([gap, g, h], 2), torch.stack([log_total, mean, count], 2)
