"""The gradients of `zeros_scan`: three walks with their roles moved, and a suffix sum.

With X_ij = (q_i . k_j)(dy_i . v_j): dq is the walk of (dy, v, k); dk and dv are walks back of
(v, dy, q) and (k, q, dy). The first also gives the gradients of the gates, per row; with A_i =
sum_j P_ij X_ij and B_i = sum_j X_ij / t_i, delta = first - higher,

    ds_j = sum_{i>=j} (higher_i P_ij + delta_i/t_i) X_ij - P_ij higher_i A_i - (delta_i/t_i) B_i.

A gradient of the last state is one more row of these sums.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import on_device
from dsf_kernels.zeros_adjoint import close_kernel
from dsf_kernels.zeros_kernels import ALL_ROWS
from dsf_kernels.zeros_launch import serial, settings, sum_logits, walk


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y).sum((-2, -1))


def _after(last, held, grad, grad_totals):
    """What the gradient of the last state adds to the suffix sums: (batch, head, 2) float64."""
    ends = last.new_zeros(*last.shape[:2], 2)
    if grad is not None:
        gap, _, plain = held.mT.unbind(2)
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

    chosen = settings(value.dtype, channels, n_state)
    n_slab = -(-n_state // chosen["SLAB"])
    parts, own = empty(n_slab, batch, head, length, 3), empty(n_slab, batch, head, length)
    d_query, d_key, d_value, d_logit, d_first, d_higher, d_zero = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in ctx.saved_tensors[:7]
    )
    held = None if grad_moments is None else empty(batch, head, 3, channels, n_state)
    start = None if moments is None else empty(batch, head, 3, n_state, channels)
    with on_device(value):
        sums, last = sum_logits(gates, totals, chosen, ALL_ROWS)
        flipped = None if moments is None else moments.mT
        walk(grad, value, key, sums, flipped, d_query, held, query, parts)
        pulled = None if grad_moments is None else grad_moments.mT
        walk(value, grad, query, sums, pulled, d_key, None, key, own, reverse=True)
        walk(key, query, grad, sums, grad_moments, d_value, start, reverse=True)
        ends = _after(last, held, grad_moments, grad_totals)
        firsts = torch.empty_like(ends)
        close_kernel[(batch * head,)](
            logit, first, higher, sums.log_total, sums.log_total if totals is None else totals,
            parts, own, ends, d_logit, d_first, d_higher, d_first if zero is None else d_zero,
            firsts, length, head, n_slab, n_slab, *logit.stride(), *first.stride(),
            *higher.stride(), HAS_INITIAL=totals is not None, HAS_ZERO=zero is not None,
            **serial(length),
        )  # fmt: skip
    return (d_query, d_key, d_value, d_logit, d_first, d_higher, d_zero,
            None if moments is None else start.to(moments.dtype),
            None if totals is None else _before(totals, moments, start, firsts))  # fmt: skip
