"""C_t z_t with z_t = a_t z_{t-1} + B_t: scalar_decay_scan of values that are all 1.

The outputs are float32 whatever the type of the keys; the products round as those of the
numerator do, so that errors of the two cancel where the values agree.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import on_device, over_groups
from dsf_kernels.operators import operator
from dsf_kernels.scalar_decay_launch import Decays, run, settings_of


def _ones(like: Tensor, n_head: int) -> Tensor:
    return like.new_ones((1, 1, 1, 1)).expand(*like.shape[:2], n_head, 1)


def _start(key: Tensor, n_head: int, initial: Tensor | None) -> Tensor:
    zero = key.new_zeros((key.shape[0], n_head, key.shape[3]), dtype=torch.float32)
    return zero if initial is None else zero + initial


def _run(
    query: Tensor, key: Tensor, log_decay: Tensor | None, initial: Tensor | None, n_head: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, _, n_state = key.shape
    out = key.new_empty((batch, length, n_head), dtype=torch.float32)
    if out.numel() == 0:
        return out, _start(key, n_head, initial)
    final = key.new_empty((batch, n_head, n_state), dtype=torch.float32)
    settings = settings_of(key.dtype, n_state)
    with on_device(key):
        decays = None if log_decay is None else Decays(log_decay, settings.CHUNK)
        start = None if initial is None else initial[..., None]
        run(query, key, _ones(key, n_head), out, settings, scale, decays=decays, initial=start,
            final=final)  # fmt: skip
    return out, final


def _fake(query, key, log_decay, initial, n_head, scale):
    batch, length, _, n_state = key.shape
    out = key.new_empty((batch, length, n_head), dtype=torch.float32)
    return out, out.new_empty((batch, n_head, n_state))


def _run_adjoint(
    query: Tensor, key: Tensor, initial: Tensor | None, log_decay: Tensor | None, grad: Tensor,
    grad_final: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, n_head = grad.shape
    n_state = key.shape[3]
    grad_query, grad_key = (key.new_empty((batch, length, n_head, n_state)) for _ in range(2))
    if grad.numel() == 0:
        zeros = torch.zeros(query.shape).to(query), torch.zeros(key.shape).to(key)
        return *zeros, _start(key, n_head, grad_final)
    grad_initial = key.new_empty((batch, n_head, n_state), dtype=torch.float32)
    settings, ones, grad = settings_of(key.dtype, n_state), _ones(key, n_head), grad[..., None]
    with on_device(key):
        decays = None if log_decay is None else Decays(log_decay, settings.CHUNK)
        start, end = (None if t is None else t[:, :, None] for t in (initial, grad_final))
        run(grad, ones, key, grad_query, settings, scale, decays=decays, initial=start)
        run(ones, grad, query, grad_key, settings, scale, decays=decays, initial=end,
            final=grad_initial, reverse=True)  # fmt: skip
    return over_groups(grad_query, query), over_groups(grad_key, key), grad_initial


def _fake_adjoint(query, key, initial, log_decay, grad, grad_final, scale):
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        grad.new_empty((grad.shape[0], grad.shape[2], key.shape[3])),
    )


_adjoint = operator("key_sum_scan_adjoint", _run_adjoint, _fake_adjoint)


def key_sum_gradients(query, key, log_decay, initial, grad, grad_final, scale, decay_grad):
    """Gradients of query, key, log decay (None if not wanted) and initial key sum (None too)."""
    grad_decay = None
    if decay_grad:
        start, rows, end = (None if t is None else t[..., None]
                            for t in (initial, grad, grad_final))  # fmt: skip
        grad_query, grad_key, _, grad_decay, grad_initial = (
            torch.ops.dsf.scalar_decay_scan_adjoint(
                query, key, _ones(key, grad.shape[2]), log_decay, start, rows, end, scale, True
            )
        )
        grad_decay, grad_initial = grad_decay.to(log_decay.dtype), grad_initial[..., 0]
    else:
        grad_query, grad_key, grad_initial = _adjoint(
            query, key, initial, log_decay, grad, grad_final, scale
        )
    return (
        grad_query,
        grad_key,
        grad_decay,
        None if initial is None else grad_initial.to(initial.dtype),
    )


def _backward(ctx, grad, grad_final):
    query, key, log_decay, initial = ctx.saved_tensors
    n_head, scale = ctx.rest
    if grad is None:
        grad = key.new_zeros((*key.shape[:2], n_head), dtype=torch.float32)
    wanted = log_decay is not None and ctx.needs_input_grad[2]
    grads = key_sum_gradients(query, key, log_decay, initial, grad, grad_final, scale, wanted)
    return *grads, None, None


key_sum_scan = operator("key_sum_scan", _run, _fake, _backward)
"""(query, key, log_decay, initial, n_head, scale) -> scale C z (batch, time, head), last z.

log_decay (batch, time, head), initial (batch, head, state), or None. Results are float32.
"""
