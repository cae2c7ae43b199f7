"""The gradients of `zeros_scan`: three walks with their roles moved, and a suffix sum.

With X_ij = (q_i . k_j)(dy_i . v_j): dq is the walk of (dy, v, k); dk and dv are walks back of
(v, dy, q) and (k, q, dy). The first also gives the gradients of the gates, per row; with A_i =
sum_j P_ij X_ij and B_i = sum_j X_ij / t_i, delta = first - higher,

    ds_j = sum_{i>=j} (higher_i P_ij + delta_i/t_i) X_ij - P_ij higher_i A_i - (delta_i/t_i) B_i.

A gradient of the last state is one more row of these sums.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import narrow, on_device
from dsf_kernels.zeros_adjoint import adjoint_kernel, close_kernel
from dsf_kernels.zeros_launch import BLOCK, settings, sum_logits, walk


def _walk_back(other, pull, read, gates, sums, last, totals, out, start, asked, parts):
    """`adjoint_kernel`; last: gradient of the last moments (..., left, right) or None."""
    _, length, head, n_right = read.shape
    batch = read.shape[0]
    logit, first, higher, zero = gates
    other, pull, read, asked = (narrow(t, 1) for t in (other, pull, read, asked))
    n_left, chosen = other.shape[3], settings(read.dtype, other.shape[3], n_right)
    n_slab = -(-n_right // chosen["SLAB"])
    none = logit if zero is None else zero
    held = (0,) * 5 if last is None else last.stride()
    adjoint_kernel[(batch * head * n_slab,)](
        other, pull, read, logit, first, higher, none, *sums, out if last is None else last,
        sums[0] if totals is None else totals, out, start, asked,
        out if parts is None else parts, length, head, n_left, n_right, n_slab,
        *other.stride(), *pull.stride(), *read.stride(), *logit.stride(), *first.stride(),
        *higher.stride(), *none.stride(), *held, *asked.stride(),
        HAS_INITIAL=totals is not None, HAS_FINAL=last is not None, HAS_ZERO=zero is not None,
        PARTS=parts is not None, **chosen,
    )  # fmt: skip


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y).sum((-2, -1))


def _after(last, held, grad, grad_totals):
    """What the gradient of the last state adds to the suffix sums: (batch, head, 2) float64."""
    ends = last.new_zeros(*last.shape[:2], 2)
    if grad is not None:
        gap, _, plain = held.unbind(2)
        ends[..., 0] += _inner(grad[:, :, 0], gap + plain / last[..., 2, None, None])
        ends[..., 1] += _inner(grad[:, :, 1], plain)
    if grad_totals is not None:
        ends -= grad_totals[..., :2]
    ends[..., 1] /= last[..., 2]
    return ends


def _before(totals, moments, start, firsts):
    """The gradient of the totals before the first token; that of the count is 0."""
    count = totals[..., 2]
    gap, _, plain = moments.double().unbind(2)
    mean = gap + plain / count.clamp_min(1)[..., None, None]
    grads = [_inner(start[:, :, 0], mean) - firsts[..., 0],
             _inner(start[:, :, 1], plain) - count * firsts[..., 1]]  # fmt: skip
    grads = [torch.where(count > 0, g, torch.zeros_like(g)) for g in grads]
    return torch.stack([*grads, torch.zeros_like(count)], 2)


def backward(ctx, grad, grad_moments, grad_totals):
    """Gradients of the nine arguments of the operator."""
    saved = iter(ctx.saved_tensors)
    query, key, value, *gates, moments, totals = saved
    logit, first, higher, zero = gates
    batch, length, head, channels = value.shape
    n_state = key.shape[3]
    if value.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors[:7]]
        held = [
            None if t is None else torch.zeros_like(t) if g is None else g.to(t.dtype)
            for t, g in ((moments, grad_moments), (totals, grad_totals))
        ]
        return (*zeros, *held)
    grad = torch.zeros_like(value) if grad is None else grad
    totals = None if totals is None else totals.contiguous()

    def empty(*shape):
        return value.new_empty(shape, dtype=torch.float32)

    def slabs(n_left, n_right):
        return -(-n_right // settings(value.dtype, n_left, n_right)["SLAB"])

    parts = empty(slabs(channels, n_state), batch, head, length, 3)
    own = empty(slabs(channels, n_state), batch, head, length)
    d_query, d_key, d_value = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
    )
    held = empty(batch, head, 3, channels, n_state)
    turned, start = torch.empty_like(held), empty(batch, head, 3, n_state, channels)
    with on_device(value):
        log_total, mean, last = sum_logits(logit, totals)
        sums = log_total, mean
        flipped = None if moments is None else moments.mT
        walk(grad, value, key, gates, sums, flipped, totals, d_query, held, query, parts)
        pulled = None if grad_moments is None else grad_moments.mT
        _walk_back(value, grad, query, gates, sums, pulled, totals, d_key, turned, key, own)
        _walk_back(key, query, grad, gates, sums, grad_moments, totals, d_value, start, grad, None)
        by_high, by_first, by_zero = parts.sum(0).unbind(-1)  # (batch, head, time)
        wide = higher.mT.float()
        slope = first.mT.float() - wide
        count = torch.arange(1, length + 1, device=value.device, dtype=torch.float64)
        if totals is not None:
            count = count + totals[..., 2:]
        ends = _after(last, held.mT, grad_moments, grad_totals)
        firsts, d_logit = torch.empty_like(ends), logit.new_empty(logit.shape)
        close_kernel[(batch * head,)](
            logit, log_total, log_total if totals is None else totals,
            (wide * (by_high + by_zero)).contiguous(), (slope * by_zero / count).contiguous(),
            ends, own.sum(0), d_logit, firsts, length, head, *logit.stride(),
            HAS_INITIAL=totals is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    d_first, d_higher = by_first.mT.to(first.dtype), (by_high - by_first).mT.to(higher.dtype)
    return (d_query, d_key, d_value, d_logit, d_first, d_higher,
            None if zero is None else by_zero.mT.to(zero.dtype),
            None if moments is None else start.to(moments.dtype),
            None if totals is None else _before(totals, moments, start, firsts))  # fmt: skip
