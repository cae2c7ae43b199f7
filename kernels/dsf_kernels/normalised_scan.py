"""Linear attention divided by its own kernel sum, under one decay per head.

Shapes whose rows are walked in time have one kernel (normalised_walk). In the others the numerator
is `scalar_decay_scan`, and the divisor the same scan of values that are all 1, one column wide and
in float32 (normalised_sums): a ones column beside the values would double the slabs where they
fill theirs. A pass over the outputs divides (normalised_kernels). Backward is two such scans.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import (
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    refuse_miscompiled,
)
from dsf_kernels.normalised_kernels import divide_rows, divide_rows_adjoint
from dsf_kernels.normalised_sums import key_sum_gradients, key_sum_scan
from dsf_kernels.normalised_walk import walk, walked
from dsf_kernels.scalar_decay_launch import Decays, every_token, settings_of
from dsf_kernels.scalar_decay_scan import MAX_WIDTH, scalar_decay_scan


@torch.library.custom_op("dsf::normalised_walk", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    initial_sum: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with on_device(value):
        chunk = settings_of(value.dtype, key.shape[3]).CHUNK
        decays = None if log_decay is None else Decays(log_decay, chunk)
        return walk(query, key, value, decays, initial, initial_sum, scale, eps)


@_forward.register_fake
def _(query, key, value, log_decay, initial, initial_sum, scale, eps):
    batch, length, n_head, channels = value.shape
    shapes = (batch, length, n_head), (batch, n_head, key.shape[3], channels)
    divisor, state = (value.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return value.new_empty(value.shape), divisor, state, state.new_empty(state.shape[:3])


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _, grad_state, grad_sum):
    query, key, value, log_decay, initial, initial_sum, y, divisor = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[3]
    grad = torch.zeros_like(y) if grad is None else grad
    grad, grad_divisor = divide_rows_adjoint(y, divisor, grad, ctx.eps, True)
    *grads, grad_decay, grad_initial = torch.ops.dsf.scalar_decay_scan_adjoint(
        query, key, value, log_decay, initial, grad, grad_state, ctx.scale, wanted
    )
    grad_query, grad_key, more, grad_sum = key_sum_gradients(
        query, key, log_decay, initial_sum, grad_divisor, grad_sum, ctx.scale, wanted
    )
    return (
        grads[0] + grad_query,
        grads[1] + grad_key,
        grads[2],
        grad_decay.to(log_decay.dtype) + more if wanted else None,
        None if initial is None else grad_initial.to(initial.dtype),
        grad_sum,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_save)


def normalised_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_key_sum: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and last key sum of attention divided by its kernel sum.

    S_t = a_t S_{t-1} + B_t u_t, z_t = a_t z_{t-1} + B_t, y_t = C_t S_t / (C_t z_t + eps), with
    C = scale `query`, B = `key`, u = `value`, a = exp(`log_decay`) (None: 1), S_0 =
    `initial_state`, z_0 = `initial_key_sum` (zero when None). A divisor of exactly 0 counts as 1.

    Shapes: as `scalar_decay_scan`; initial_key_sum (batch, head, state). Returns outputs like
    value, S_L (batch, head, state, channel) and z_L (batch, head, state), both float32.
    Differentiable in all six tensors. The divisor is float32. Where rows are not walked the
    numerator is rounded to the type of value before it is divided, and must fit it.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor; bf16
    wider than 16 under ptxas before 12.9).
    Cost: forward that of `scalar_decay_scan` where rows are walked, else one more read of query
    and key, and two passes over the outputs; backward its backward, one more read and write of
    query and key, and three passes over the outputs.
    Source: Katharopoulos et al. (2020), eqs. 9-10.
    """
    name = "normalised_scan"
    check_scale(name, scale)
    check_kind(name, {"value": value, "query": query, "key": key, "log_decay": log_decay,
                      "initial_state": initial_state,
                      "initial_key_sum": initial_key_sum})  # fmt: skip
    check_matrix_state(name, query, key, value, initial_state, MAX_WIDTH)
    wide = max(key.shape[3], value.shape[3]) > 16
    refuse_miscompiled(name, value, value.dtype == torch.bfloat16 and wide)
    batch, length, n_head, _ = value.shape
    if log_decay is not None:
        sizes = {"batch": batch, "time": length, "head": n_head}
        sizes = {"head": n_head} if log_decay.dim() == 1 else sizes
        check_tensor(name, "log_decay", log_decay, sizes, "sizes are fixed by value")
    if initial_key_sum is not None:
        sizes = {"batch": batch, "head": n_head, "state": key.shape[3]}
        check_tensor(name, "initial_key_sum", initial_key_sum, sizes, "fixed by key and value")
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = every_token(log_decay, value.shape)
    scale, eps = float(scale), float(eps)
    if value.numel() and walked(value, key.shape[3]):
        y, _, state, key_sum = _forward(
            query, key, value, log_decay, initial_state, initial_key_sum, scale, eps
        )
        return y, state, key_sum
    numerator, state = scalar_decay_scan(query, key, value, log_decay, initial_state, scale=scale)
    divisor, key_sum = key_sum_scan(query, key, log_decay, initial_key_sum, n_head, scale)
    return divide_rows(numerator, divisor, eps), state, key_sum
