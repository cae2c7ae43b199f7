"""InLine attention: linear attention whose weights are shifted, not scaled, to sum to one.

Shapes whose rows are walked in time have one kernel (inline_walk). In the others, and backward,
the three sums are scans without a decay: S is `scalar_decay_scan`, q z its one-column form
(normalised_sums), the mean of the values one with one state (inline_means); a pass over the
outputs joins them (inline_kernels). Keys are taken relative to an anchor, which drops out of every
weight and keeps the digits of keys that share a large offset.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsf_kernels.inline_kernels import subtract_mean, subtract_mean_adjoint
from dsf_kernels.inline_means import running_mean, running_mean_adjoint
from dsf_kernels.inline_walk import walk
from dsf_kernels.launch import (
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    refuse_miscompiled,
)
from dsf_kernels.normalised_sums import key_sum_gradients, key_sum_scan
from dsf_kernels.normalised_walk import walked
from dsf_kernels.scalar_decay_scan import MAX_WIDTH, scalar_decay_scan


class InlineState(NamedTuple):
    """Sums over the tokens so far, of (k - anchor) u, of k - anchor, of u; anchor; their count.

    memory (batch, head, state, channel), key_sum (batch, head, state), value_sum (batch, head,
    channel), float32; anchor (batch, group, state), the first key.
    """

    memory: Tensor
    key_sum: Tensor
    value_sum: Tensor
    anchor: Tensor
    count: int


@torch.library.custom_op("dsf::inline_walk", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor | None, key_sum: Tensor | None,
    value_sum: Tensor | None, count: int, scale: float, over_count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sums = None if memory is None else (memory, key_sum, value_sum)
    with on_device(value):
        return walk(query, key, value, sums, count, scale, over_count)


@_forward.register_fake
def _(query, key, value, memory, key_sum, value_sum, count, scale, over_count):
    batch, length, n_head, channels = value.shape
    memory = value.new_empty((batch, n_head, key.shape[3], channels), dtype=torch.float32)
    divisor = memory.new_empty((batch, length, n_head))
    key_sum, value_sum = (memory.new_empty((batch, n_head, n)) for n in memory.shape[2:])
    return value.new_empty(value.shape), divisor, memory, key_sum, value_sum


def _save(ctx, inputs, output):
    *tensors, ctx.count, ctx.scale, ctx.over_count = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _, grad_memory, grad_sum, grad_values):
    query, key, value, memory, key_sum, value_sum, divisor = ctx.saved_tensors
    grad = torch.zeros_like(value) if grad is None else grad
    mean, _ = running_mean(value, value_sum, ctx.count)
    grad, grad_divisor, grad_mean = subtract_mean_adjoint(
        divisor, mean, grad, ctx.count, ctx.scale, ctx.over_count
    )
    *grads, _, grad_memory = torch.ops.dsf.scalar_decay_scan_adjoint(
        query, key, value, None, memory, grad, grad_memory, 1.0, False
    )
    more_query, more_key, _, grad_sum = key_sum_gradients(
        query, key, None, key_sum, grad_divisor, grad_sum, 1.0, False
    )
    more_value, grad_values = running_mean_adjoint(grad_mean, grad_values, ctx.count)
    found = [a + b for a, b in zip(grads, (more_query, more_key, more_value), strict=True)]
    if memory is None:
        return *found, *(None,) * 6
    grad_memory, grad_values = grad_memory.to(memory.dtype), grad_values.to(value_sum.dtype)
    return *found, grad_memory, grad_sum, grad_values, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


def _check(name, query, key, value, initial, scale):
    check_scale(name, scale)
    tensors = {"value": value, "query": query, "key": key}
    memory = None if initial is None else initial.memory
    if initial is not None:
        tensors |= {f"initial.{k}": v for k, v in initial._asdict().items() if k != "count"}
    check_kind(name, tensors)
    scanned = name == "inline_scan" and value.dtype != torch.float32
    refuse_miscompiled(name, value, scanned)
    check_matrix_state(name, query, key, value, memory, MAX_WIDTH)
    if initial is not None:
        batch, _, n_head, channels = value.shape
        sizes = {"batch": batch, "head": n_head, "state": key.shape[3]}
        check_tensor(name, "initial.key_sum", initial.key_sum, sizes, "fixed by key and value")
        sizes = {"batch": batch, "head": n_head, "channel": channels}
        check_tensor(name, "initial.value_sum", initial.value_sum, sizes, "fixed by value")
        sizes = {"batch": batch, "group": key.shape[2], "state": key.shape[3]}
        check_tensor(name, "initial.anchor", initial.anchor, sizes, "fixed by key")
        if initial.count < 0:
            raise ValueError(
                f"dsf_kernels.{name}: initial.count: expected 0 or more, got {initial.count}."
            )


def inline_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial: InlineState | None = None,
    *,
    scale: float = 1.0,
    over_count: bool = False,
) -> tuple[Tensor, InlineState]:
    """Outputs, and the last sums, of causal InLine attention on features.

        y_t = g_t q_t S_t + ((1 - g_t q_t z_t) / t) w_t

    S = sum of k u, z of k, w of u over the tokens so far, t their number, q = `query` and k =
    `key` (features already), u = `value`; g = `scale`, or scale / t if `over_count`. The weights
    of a row sum to one. initial: the sums of earlier tokens, to go on from.

    Shapes: query, key (batch, time, group, state) with group dividing head, value (batch, time,
    head, channel), initial as `InlineState`; state and channel 1 to 256, time from 0, any
    strides; bf16, fp16 or fp32, one type for query, key, value. Differentiable in all tensors
    but the anchor, which is a constant: no output depends on it.
    Keys minus the anchor are rounded to their type. Where rows are not walked, and in backward,
    q S and the mean of the values are rounded to the type of value too, and must fit it.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor; 16-bit
    types under ptxas before 12.9).
    Cost: a pass over the keys and, where rows are walked, forward that of `scalar_decay_scan`
    without a decay; else and backward that, two scans one column and one state wide, and a pass
    over the outputs.
    Source: Han et al. (2024), eq. 5; the causal form is derived.
    """
    _check("inline_scan", query, key, value, initial, scale)
    memory = key_sum = value_sum = None
    count = 0
    if initial is None:
        anchor = key[:, 0] if key.shape[1] else key.sum(1)
    else:
        memory, key_sum, value_sum, anchor, count = initial
    anchor = anchor.detach()
    keys = key - anchor.to(key.dtype)[:, None]
    scale, after = float(scale), count + value.shape[1]
    if value.numel() and walked(value, key.shape[3]):
        y, _, *sums = _forward(
            query, keys, value, memory, key_sum, value_sum, count, scale, over_count
        )
        return y, InlineState(*sums, anchor, after)
    numerator, memory = scalar_decay_scan(query, keys, value, None, memory)
    divisor, key_sum = key_sum_scan(query, keys, None, key_sum, value.shape[2], 1.0)
    mean, value_sum = running_mean(value, value_sum, count)
    y = subtract_mean(numerator, divisor, mean, count, scale, over_count)
    return y, InlineState(memory, key_sum, value_sum, anchor, after)


def inline_mix(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0, over_count: bool = False
) -> Tensor:
    """Outputs of InLine attention in which every token sees all: two batched products.

        y_i = g q_i Cov + mean(u),   Cov = sum_j (k_j - mean(k)) u_j

    Arguments, symbols and errors as `inline_scan`, with t the length. Torch's matrix products:
    Cov is rounded to the type of the tensors. Cost: 4 N P operations a token and head.
    Source: Han et al. (2024), eq. 5.
    """
    _check("inline_mix", query, key, value, None, scale)
    length, n_head = max(value.shape[1], 1), value.shape[2]
    centre = key.mean(1, keepdim=True, dtype=torch.float32) if key.shape[1] else key
    root = length**0.5  # divided out between the products: neither of them leaves fp16 so soon
    centred = ((key - centre) / root).to(key.dtype)
    queries, keys = (
        t.transpose(1, 2).repeat_interleave(n_head // t.shape[2], 1) for t in (query, centred)
    )
    values = value.transpose(1, 2)
    factor = scale / root if over_count else scale * root
    covariance = ((keys.mT @ values).float() * factor).to(value.dtype)
    mean = values.sum(2, keepdim=True, dtype=torch.float32) / length
    return (queries @ covariance + mean).to(value.dtype).transpose(1, 2)
