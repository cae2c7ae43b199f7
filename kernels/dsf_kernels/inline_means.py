"""The mean of the values so far: a scan with one state, whose key is 1 and whose query is 1/t."""

import torch
from torch import Tensor

from dsf_kernels.launch import on_device
from dsf_kernels.operators import operator
from dsf_kernels.scalar_decay_launch import run, settings_of


def _weights(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """1/t and 1 as (batch, time, 1, 1)."""
    shape = (*value.shape[:2], 1, 1)
    t = torch.arange(1 + count, 1 + count + shape[1], device=value.device, dtype=torch.float32)
    return (1 / t)[:, None, None].expand(shape), t.new_ones(()).expand(shape)


def _start(value: Tensor, initial: Tensor | None) -> Tensor:
    zero = value.new_zeros((value.shape[0], *value.shape[2:]), dtype=torch.float32)
    return zero if initial is None else zero + initial


def _mean(value: Tensor, initial: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    out = value.new_empty(value.shape)
    if out.numel() == 0:
        return out, _start(value, initial)
    final = value.new_empty((value.shape[0], *value.shape[2:]), dtype=torch.float32)
    inverse, ones = _weights(value, count)
    start = None if initial is None else initial[:, :, None]
    with on_device(value):
        run(inverse, ones, value, out, settings_of(value.dtype, 1), 1.0, initial=start,
            final=final)  # fmt: skip
    return out, final


def _mean_fake(value, initial, count):
    final = value.new_empty((value.shape[0], *value.shape[2:]), dtype=torch.float32)
    return value.new_empty(value.shape), final


def _mean_adjoint(grad: Tensor, grad_final: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    out = grad.new_empty(grad.shape)
    if out.numel() == 0:
        return out, _start(grad, grad_final)
    start = grad.new_empty((grad.shape[0], *grad.shape[2:]), dtype=torch.float32)
    inverse, ones = _weights(grad, count)
    end = None if grad_final is None else grad_final[:, :, None]
    with on_device(grad):
        run(ones, inverse, grad, out, settings_of(grad.dtype, 1), 1.0, initial=end, final=start,
            reverse=True)  # fmt: skip
    return out, start


def _mean_adjoint_fake(grad, grad_final, count):
    return _mean_fake(grad, grad_final, count)


running_mean_adjoint = operator("running_mean_adjoint", _mean_adjoint, _mean_adjoint_fake)


def _backward(ctx, grad, grad_final):
    value, initial = ctx.saved_tensors
    grad = torch.zeros_like(value) if grad is None else grad
    grad_value, grad_initial = running_mean_adjoint(grad, grad_final, ctx.rest[0])
    return grad_value, None if initial is None else grad_initial.to(initial.dtype), None


running_mean = operator("running_mean", _mean, _mean_fake, _backward)
"""(value, sum of earlier ones or None, their count) -> mean so far at every token, last sum."""
