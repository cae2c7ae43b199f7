"""Linear recurrence with a matrix state and one decay per head, in fused passes over time.

Inside a chunk of 64 tokens it is a masked matrix product, between chunks a rescale and an
addition to the state (N, channels). With x, y, w (query, key, value) and g the cumulative log
decay in the chunk, c its last step, one kernel gives

    out_i = sum_{j <= i} exp(g_i - g_j) (x_i . y_j) w_j + exp(g_i) x_i h_start        forward
    out_j = sum_{i >= j} exp(g_i - g_j) (x_j . y_i) w_i + exp(g_c - g_j) x_j h_end    reverse

in one of three forms (scalar_decay_launch.form_of): a walk with the state in registers
(chunk_kernel), chunks side by side without a state for short rows of few heads
(scalar_decay_short), segments of a long row of few heads, with a carry between them. The
gradients are the same kernel with the roles moved, dq = forward(dy, v, k), dk = reverse(v, dy, q),
dv = reverse(k, q, dy), and no state goes to memory; where the log decay wants a gradient, or heads
share query and key, they come from the states at the edges of the chunks (scalar_decay_adjoint).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dsf_kernels.launch import (
    check_decay,
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    over_groups,
    start_state,
)
from dsf_kernels.operators import operator
from dsf_kernels.scalar_decay_adjoint import adjoint
from dsf_kernels.scalar_decay_launch import Decays, every_token, run, settings_of, walk
from dsf_kernels.scalar_decay_spanning import spanning_gradients
from dsf_kernels.sequences import Sequences, check_sequences, count_rows, placed, results

MAX_WIDTH = 256
PARALLEL, MAX_PARALLEL = (torch.bfloat16,), 128  # where chunks in parallel were checked on a GPU


def _run(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    scale: float, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    length, n_head, channels = value.shape[1:]
    rows = count_rows(value, cu_seqlens)
    out = results(value, cu_seqlens, value.shape)
    if min(rows, length, n_head, channels) == 0:
        return out, start_state(value[:1].expand(rows, -1, -1, -1), key.shape[3], initial)
    final = value.new_empty((rows, n_head, key.shape[3], channels), dtype=torch.float32)
    settings = settings_of(value.dtype, key.shape[3])
    with on_device(value):
        sequences = _sequences(cu_seqlens, length, settings)
        decays = None if log_decay is None else Decays(log_decay, settings.CHUNK, sequences)
        run(query, key, value, out, settings, scale, decays=decays, initial=initial, final=final,
            sequences=sequences)  # fmt: skip
    return out, final


def _sequences(cu_seqlens, length, settings):
    return None if cu_seqlens is None else Sequences(cu_seqlens, length, settings.CHUNK)


def _fake(query, key, value, log_decay, initial, scale, cu_seqlens=None):
    shape = (count_rows(value, cu_seqlens), value.shape[2], key.shape[3], value.shape[3])
    out = value.new_empty(value.shape)
    return out, value.new_empty(shape, dtype=torch.float32)


def _run_adjoint(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    grad: Tensor, grad_final: Tensor | None, scale: float, decay_grad: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, n_head, channels = value.shape
    n_state, n_rows = key.shape[3], count_rows(value, cu_seqlens)
    if min(n_rows, length, n_head, channels) == 0:
        zeros = torch.zeros(query.shape).to(query), torch.zeros(key.shape).to(key)
        rows = length if decay_grad else 0
        grad_decay = value.new_zeros((batch, rows, n_head), dtype=torch.float32)
        return (
            *zeros,
            value.new_zeros(value.shape),
            grad_decay,
            start_state(value[:1].expand(n_rows, -1, -1, -1), n_state, grad_final),
        )
    settings = settings_of(value.dtype, max(n_state, channels))
    shared = min(query.shape[2], key.shape[2]) < n_head
    parallel = value.dtype in PARALLEL and max(n_state, channels) <= MAX_PARALLEL
    with on_device(value):
        sequences = _sequences(cu_seqlens, length, settings)
        decays = None if log_decay is None else Decays(log_decay, settings.CHUNK, sequences)
        arguments = (query, key, value, decays, initial, grad, grad_final, scale)
        if decays is not None and parallel and (decay_grad or shared):
            grads = adjoint(*arguments, settings, sequences)
        else:
            grads = _serial_adjoint(*arguments, decay_grad, settings, sequences)
    grad_query, grad_key, grad_value, grad_decay, grad_initial = grads
    grad_query, grad_key = over_groups(grad_query, query), over_groups(grad_key, key)
    if grad_decay is None or not decay_grad:
        grad_decay = value.new_empty((batch, 0, n_head), dtype=torch.float32)
    return grad_query, grad_key, grad_value, grad_decay, grad_initial


def _serial_adjoint(
    query, key, value, decays, initial, grad, grad_final, scale, decay_grad, settings, sequences
):
    """Gradients by the forward kernel, three times: nothing in memory but the results."""
    options = {"decays": decays, "sequences": sequences}
    batch, length, n_head, channels = value.shape
    wide = (batch, length, n_head, key.shape[3])
    grad_decay = None
    if decay_grad:
        grad_query, grad_key, grad_decay = spanning_gradients(
            query, key, value, decays, initial, grad, grad_final, scale, settings, sequences
        )
    else:
        grad_query, grad_key = (results(value, sequences, wide) for _ in range(2))
        flipped, flipped_final = (None if t is None else t.mT for t in (initial, grad_final))
        run(grad, value, key, grad_query, settings, scale, initial=flipped, **options)
        run(value, grad, query, grad_key, settings, scale, initial=flipped_final, reverse=True,
            **options)  # fmt: skip
    grad_value = results(value, sequences, value.shape)
    rows = batch if sequences is None else sequences.count
    grad_initial = value.new_empty((rows, n_head, wide[3], channels), dtype=torch.float32)
    run(key, query, grad, grad_value, settings, scale, initial=grad_final, final=grad_initial,
        reverse=True, **options)  # fmt: skip
    return grad_query, grad_key, grad_value, grad_decay, grad_initial


def _fake_adjoint(
    query, key, value, log_decay, initial, grad, grad_final, scale, decay_grad, cu_seqlens=None
):
    batch, length, n_head, channels = value.shape
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        value.new_empty(value.shape),
        value.new_empty((batch, length if decay_grad else 0, n_head), dtype=torch.float32),
        value.new_empty(
            (count_rows(value, cu_seqlens), n_head, key.shape[3], channels), dtype=torch.float32
        ),
    )


_adjoint = operator("scalar_decay_scan_adjoint", _run_adjoint, _fake_adjoint)


def _backward(ctx, grad, grad_final):
    query, key, value, log_decay, initial, *packed = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[3]
    grad = torch.zeros_like(value) if grad is None else grad
    *grads, grad_decay, grad_initial = _adjoint(
        query, key, value, log_decay, initial, grad, grad_final, ctx.rest[0], wanted, *packed
    )
    grad_decay = grad_decay.to(log_decay.dtype) if wanted else None
    grad_initial = None if initial is None else grad_initial.to(initial.dtype)
    return *grads, grad_decay, grad_initial, None, None


unchecked_scan = operator("scalar_decay_scan", _run, _fake, _backward)
"""(query, key, value, log_decay (batch, time, head) or None, initial_state, scale): the scan
without its checks, for callers whose own log decays may be above 0 by a rounding."""


class _Seen(NamedTuple):
    """What the checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _checked(function, query, key, value, log_decay, initial_state, cu_seqlens=None):
    """Raise on wrong kinds and shapes; the log decay as (batch, time, head)."""
    tensors = (query, key, value, log_decay, initial_state, cu_seqlens)
    seen = (None if t is None else _Seen(t.shape, t.dtype, t.device) for t in tensors)
    check = _check.__wrapped__ if torch.compiler.is_compiling() else _check
    check(function, *seen)
    check_decay(function, log_decay)
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = every_token(log_decay, value.shape)
    return log_decay


@functools.lru_cache(maxsize=1024)
def _check(function, query, key, value, log_decay, initial_state, cu_seqlens):
    names = {"value": value, "query": query, "key": key, "log_decay": log_decay,
             "initial_state": initial_state}  # fmt: skip
    check_kind(function, names)
    whole = initial_state if cu_seqlens is None else None
    check_matrix_state(function, query, key, value, whole, MAX_WIDTH)
    if cu_seqlens is not None:
        sizes = {"head": value.shape[2], "state": key.shape[3], "channel": value.shape[3]}
        check_sequences(function, cu_seqlens, value, initial_state, sizes)
    if log_decay is not None:
        sizes = dict(zip(("batch", "time", "head"), value.shape, strict=False))
        sizes = {"head": sizes["head"]} if len(log_decay.shape) == 1 else sizes
        check_tensor(function, "log_decay", log_decay, sizes, "sizes are fixed by value")


def scalar_decay_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of a matrix state under one decay per head.

    h_t = exp(l_t) h_{t-1} + B_t u_t, y_t = scale C_t h_t, with C = `query`, B = `key`,
    u = `value`, l = `log_decay` <= 0 (-inf resets exactly; None: no decay; one number per head:
    fixed), h_0 = `initial_state` (zero when None). Covers linear attention, RetNet, simple GLA,
    Mamba-2.

    cu_seqlens (n + 1,), int32 or int64: n sequences packed along time in one row (batch 1), tokens
    cu_seqlens[s] .. cu_seqlens[s + 1] - 1 those of s; each starts from its own initial_state (n,
    head, state, channel), and the final states are (n, head, state, channel). It starts at 0, ends
    at time and does not decrease (an empty sequence is legal): ValueError where it lies on the
    CPU. On a GPU its values are not looked at, so that the host does not wait: they are clamped to
    0 .. time and made not to decrease, and a token of no sequence gives 0. Packed rows are walked,
    each sequence by programs of its own.

    Shapes: query, key (batch, time, group, state) with group dividing head (head k reads group
    k // (head / group)), value (batch, time, head, channel), log_decay (batch, time, head) or
    (head,), initial_state (batch, head, state, channel); state and channel 1 to 256, time from
    0, any strides; bf16, fp16 or fp32, one type for query, key, value. Returns outputs like
    value and the final state in float32. Differentiable in all five tensors.
    Matrix products round their operands to bf16 for bf16 and to tf32 for fp16, and are exact
    float32 for fp32; sums and the state are float32.
    Raises ValueError (shape, device; a log decay above 0 with DSF_KERNELS_CHECK=1, which makes
    each call wait for the GPU), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: time x (4 N P + 128 (N + P)) operations a head forward, three times that backward; no
    state in memory, unless log_decay needs a gradient or heads share query and key (2 N P numbers
    per 64 steps and head in backward). A row of few heads is computed in another order than one
    of many: a sequence cut in two gives the same result within rounding, and bit for bit only
    where both parts are walked (scalar_decay_launch).
    Source: Dao and Gu 2024 (state space duality, section 6), Yang et al. 2024 (chunk form);
    measured figures in kernels/README.md.
    """
    check_scale("scalar_decay_scan", scale)
    tensors = (query, key, value, log_decay, initial_state)
    log_decay = _checked("scalar_decay_scan", *tensors, cu_seqlens)
    if cu_seqlens is None:
        return unchecked_scan(query, key, value, log_decay, initial_state, float(scale))
    cu_seqlens = placed("scalar_decay_scan", cu_seqlens, value)
    return unchecked_scan(query, key, value, log_decay, initial_state, float(scale), cu_seqlens)


def scalar_decay_summary(
    key: Tensor, value: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a segment does to any state: (total, end) with h_L = exp(total) h_0 + end.

    total (batch, head) = sum of the log decays, end (batch, head, state, channel) = h_L from
    zero, both float32. Arguments and errors as `scalar_decay_scan`; no gradient.
    """
    key, value = key.detach(), value.detach()
    log_decay = None if log_decay is None else log_decay.detach()
    log_decay = _checked("scalar_decay_summary", key, key, value, log_decay, None)
    batch, length, n_head, _ = value.shape
    total = value.new_zeros((batch, n_head), dtype=torch.float32)
    if log_decay is not None:
        total = log_decay.sum(1, dtype=torch.float32)
    end = start_state(value, key.shape[3], None)
    if end.numel() and length:
        settings = settings_of(value.dtype, key.shape[3])
        with on_device(value):
            decays = None if log_decay is None else Decays(log_decay, settings.CHUNK)
            walk(key, key, value, None, settings, 1.0, decays=decays, final=end)
    return total, end
