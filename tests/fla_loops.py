"""Ops of flash-linear-attention as loops over the tokens of one sequence, in the input's dtype.

Arguments carry the names and meanings of the released ops; tensors are (time, head, width).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _heads(x: Tensor, n_head: int) -> Tensor:
    return x.repeat_interleave(n_head // x.shape[1], 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _read(state: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("hkv,hk->hv", state, x)


def gdn2(*, q, k, v, g, b, w, use_qk_l2norm_in_kernel):
    q, k = unit(q), unit(k)
    state, out = v.new_zeros(*k.shape[1:], v.shape[-1]), []
    for t in range(len(q)):
        state = g[t].exp()[..., None] * state
        state = state + _outer(k[t], w[t] * v[t] - _read(state, b[t] * k[t]))
        out.append(_read(state, q[t]) / math.sqrt(q.shape[-1]))
    return torch.stack(out)


def preconditioned(*, q, k, v, g, beta, g_atk, beta_atk, log_atk_scale, x, eps,
                   use_qk_l2norm_in_kernel):  # fmt: skip
    """The decay `g` a head or a channel."""
    q, k = unit(q), unit(k)
    g = g if g.ndim == 3 else g[..., None]
    state, sums, out = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]), torch.zeros_like(k[0]), []
    for t in range(len(q)):
        sums = g_atk[t].exp()[:, None] * sums + beta_atk[t][:, None] * k[t] ** 2
        r = torch.log(sums + eps) - log_atk_scale[:, None]
        power = x ** -(r / (1 + r.abs()))
        keys, written = (_heads(y[None], v.shape[1])[0] for y in (k[t], k[t] * power))
        state = g[t].exp()[..., None] * state
        state = state + _outer(written, beta[t][:, None] * (v[t] - _read(state, keys)))
        out.append(_read(state, _heads(q[t][None], v.shape[1])[0]) / math.sqrt(q.shape[-1]))
    return torch.stack(out)


def momentum(*, q, k, v, log_alpha, log_mu, p, beta, eta, use_qk_l2norm_in_kernel,
             use_p_times_alpha):  # fmt: skip
    q, k, p = unit(q), unit(k), unit(p)
    state = moving = v.new_zeros(*k.shape[1:], v.shape[-1])
    out = []
    for t in range(len(q)):
        alpha = log_alpha[t].exp()[:, None]
        error = v[t] - _read(state, p[t] * alpha if use_p_times_alpha else p[t])
        moving = log_mu[t].exp()[:, None, None] * moving - _outer(eta[t][:, None] * k[t], error)
        state = alpha[..., None] * state - beta[t][:, None, None] * moving
        out.append(_read(state, q[t]) / math.sqrt(q.shape[-1]))
    return torch.stack(out)


def mesa(*, q, k, v, g, beta, lamb, max_CG_iteration, use_qk_l2norm_in_kernel):
    """So many steps of conjugate gradients, with 1e-5 added to their divisors."""
    q, k = unit(q), unit(k)
    keys, state = (x.new_zeros(*k.shape[1:], x.shape[-1]) for x in (k, v))
    out = []
    for t in range(len(q)):
        decay, written = g[t].exp()[:, None, None], beta[t][:, None] * k[t]
        keys, state = decay * keys + _outer(written, k[t]), decay * state + _outer(written, v[t])
        matrix = keys + torch.diag_embed(lamb)
        x, r = torch.zeros_like(q[t]), q[t]
        p, old = r, (r * r).sum(-1, keepdim=True)
        for _ in range(max_CG_iteration):
            image = _read(matrix, p)
            step = old / ((p * image).sum(-1, keepdim=True) + 1e-5)
            x, r = x + step * p, r - step * image
            new = (r * r).sum(-1, keepdim=True)
            p, old = r + new / (old + 1e-5) * p, new
        out.append(_read(state, x))
    return torch.stack(out)


def abc(*, q, k, v, s):
    """Slots hold means of keys and values with weights exp(s), by their plain sums."""
    weight = s.exp()
    total = weight.cumsum(0)[..., None]
    keys = (weight[..., None] * k[:, :, None]).cumsum(0) / total
    values = (weight[..., None] * v[:, :, None]).cumsum(0) / total
    p = torch.einsum("thd,thmd->thm", q / math.sqrt(q.shape[-1]), keys).softmax(-1)
    return torch.einsum("thm,thmd->thd", p, values)


def _seen(length: int, window: int | None = None, itself: bool = True) -> Tensor:
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return (lag >= (0 if itself else 1)) & (lag < (window or length + 1))


def _logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * torch.einsum("thd,shd->hts", q, _heads(k, q.shape[1]))


def _mixed(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("hts,shd->thd", weights, _heads(v, len(weights)))


def softmax(*, q, k, v, window_size=None, scale=None):
    seen = _seen(len(q), window_size)
    return _mixed(_logits(q, k, scale).masked_fill(~seen, -torch.inf).softmax(-1), v)


def forgetting(*, q, k, v, g):
    """One gate at a time."""
    z = _logits(q, k).masked_fill(~_seen(len(q)), -torch.inf)
    for t in range(len(q)):
        for s in range(t):
            z[:, t, s] += g[s + 1 : t + 1].sum(0)
    return _mixed(z.softmax(-1), v)


def path(*, q, k, v, w, beta, g=None):
    """Each token reflects all keys before it; the scale multiplies the gates too."""
    g = torch.zeros_like(q[..., 0]) if g is None else g
    k, w, beta = _heads(k, q.shape[1]), _heads(w, q.shape[1]), _heads(beta, q.shape[1])
    keys, fade, rows = k[:0], g[:0], []
    for t in range(len(q)):
        keys = keys - (beta[t][:, None] * (keys * w[t]).sum(-1, keepdim=True)) * w[t]
        keys, fade = torch.cat([keys, k[t : t + 1]]), torch.cat([fade + g[t], 0 * g[t : t + 1]])
        z = ((keys * q[t]).sum(-1) + fade) / math.sqrt(q.shape[-1])
        rows.append(functional.pad(z, (0, 0, 0, len(q) - t - 1), value=-torch.inf).T)
    return _mixed(torch.stack(rows, 1).softmax(-1), v)


def wall(*, q, k, v, g, window_size=None, g_scalar=None, sink_bias=None):
    """Gates a channel of the key, and one a head on the logit."""
    k = _heads(k, q.shape[1])
    scalar = torch.zeros_like(q[..., 0]) if g_scalar is None else g_scalar
    z = torch.full((q.shape[1], len(q), len(q)), -torch.inf, dtype=q.dtype)
    for t in range(len(q)):
        for s in range(max(0, t + 1 - (window_size or t + 1)), t + 1):
            faded = k[s] * g[s + 1 : t + 1].sum(0).exp()
            z[:, t, s] = (q[t] * faded).sum(-1) / math.sqrt(q.shape[-1])
            z[:, t, s] += scalar[s + 1 : t + 1].sum(0)
    sink = -torch.inf * torch.ones(q.shape[1]) if sink_bias is None else sink_bias
    z = torch.cat([z, sink.to(z)[:, None, None].expand(-1, len(q), 1)], -1)
    return _mixed(z.softmax(-1)[..., :-1], v)


def parallax(*, q, r, k, v, window_size=None):
    seen = _seen(len(q), window_size)
    p = _logits(q, k).masked_fill(~seen, -torch.inf).softmax(-1)
    s = _logits(r, k, 1.0)
    out = _mixed(p, v)
    shift = (p * s).sum(-1).T[..., None]
    return out * (1 + shift) - _mixed(p * s, v)


def deltaformer(*, q, k, v, beta, kept=None):
    """Each value less what the values before it, so reduced, say of it; padding hidden at last."""
    z, reduced = _logits(q, k), []
    for t in range(len(q)):
        known = 0.0
        if t:
            weights = z[:, t, :t].softmax(-1)
            known = torch.einsum("hs,shd->hd", weights, torch.stack(reduced))
        reduced.append(v[t] - beta[t][:, None] * known)
    kept = torch.ones(len(q), dtype=torch.bool) if kept is None else kept
    z = z.masked_fill(~(_seen(len(q)) & kept), -torch.inf)
    weights = z.softmax(-1).nan_to_num() * kept[:, None]
    return _mixed(weights, torch.stack(reduced))


def blocks(*, q, k, v, chunk_size, topk):
    """Own block and topk - 1 that ended before, by their mean keys; never the sequence's last."""
    z, length = _logits(q, k), len(q)
    last = (length - 1) // chunk_size
    seen = torch.zeros_like(z, dtype=torch.bool)
    for h, t in ((h, t) for h in range(len(z)) for t in range(length)):
        ended = [n for n in range(last) if (n + 1) * chunk_size <= t]
        gates = {n: (q[t, h] @ k[n * chunk_size : (n + 1) * chunk_size, h].mean(0)).item()
                 for n in ended}  # fmt: skip
        best = sorted(ended, key=gates.__getitem__)[-(topk - 1) :] if topk > 1 else ended
        for n in best:
            seen[h, t, n * chunk_size : (n + 1) * chunk_size] = True
        seen[h, t, t // chunk_size * chunk_size : t + 1] = True
    return _mixed(z.masked_fill(~seen, -torch.inf).softmax(-1), v)


def stick_breaking(*, q, k, v, attend_current=False):
    """Break pieces off, from the nearest key on."""
    beta = _logits(q, k).sigmoid()
    weights = torch.zeros_like(beta)
    for t in range(len(q)):
        left = torch.ones(len(beta), dtype=q.dtype)
        for s in range(t if attend_current else t - 1, -1, -1):
            weights[:, t, s] = left * beta[:, t, s]
            left = left * (1 - beta[:, t, s])
    return _mixed(weights, v)


def log_linear(*, q, k, v, g, level_scales, scale=1.0):
    """A state a level: those below the lowest one of t + 1 merge, as a carry does."""
    n_level = level_scales.shape[-1]
    states = [v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) for _ in range(n_level)]
    q, k = _heads(q, v.shape[1]), _heads(k, v.shape[1])
    out = []
    for t in range(len(q)):
        if t:
            carried = (t & -t).bit_length()  # what is at rest below moves there
            merged = sum(states[:carried])
            states = [torch.zeros_like(states[0])] * carried + [merged, *states[carried + 1 :]]
        decay = g[t].exp()[:, None, None]
        states = [decay * s for s in states]
        states[0] = _outer(k[t], v[t])
        out.append(sum(level_scales[t][:, n, None] * _read(s, q[t]) for n, s in enumerate(states)))
    return torch.stack(out)


def cyclic_flow(*, q, k, v, g, delta, beta, readout, q_norm_weight, k_norm_weight, q_norm_eps,
                k_norm_eps, scale):  # fmt: skip
    """In place of turning the reader: a circulant shift by delta of the slots, in the plane."""
    q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight for x, eps, weight in
            ((q, q_norm_eps, q_norm_weight), (k, k_norm_eps, k_norm_weight)))  # fmt: skip
    period = readout.shape[-1]
    at = torch.arange(period, dtype=q.dtype)
    number = torch.arange(1, (period + 1) // 2, dtype=q.dtype)
    lag = at[:, None] - at

    def moved(by: Tensor) -> Tensor:
        """(head, slot, slot): band-limited shift by so many slots."""
        angle = 2 * math.pi / period * (lag - by[:, None, None])[..., None] * number
        return (1 + 2 * angle.cos().sum(-1)) / period

    keys, values = (x.new_zeros(x.shape[1], period, x.shape[2]) for x in (k, v))
    first = functional.one_hot(torch.tensor(0), period).to(q.dtype)
    out = []
    for t in range(len(q)):
        shift, decay = moved(delta[t]), g[t].exp()[:, None, None]
        written = beta[t][:, None] * first
        keys = decay * (shift @ keys) + _outer(written, k[t])
        values = decay * (shift @ values) + _outer(written, v[t])
        logits = readout @ torch.einsum("hmk,hk->hm", keys, q[t] * scale)[..., None]
        p = readout.mT @ logits.softmax(-2)
        out.append((p.mT @ values).squeeze(-2))
    return torch.stack(out)
