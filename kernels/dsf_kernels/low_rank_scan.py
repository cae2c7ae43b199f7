"""Diagonal plus low rank of rank 1, and the delta rule with a decay a state: matrix state.

Two forms: by chunks (low_rank_chunk_launch.py), and, in this file, one step after the other with
the state in registers, a program a slab of 16 channels, in exact float32. Backward the states
before each chunk of 32 steps are saved by a second walk, and

    p_t = scale C_t^T dy_t + A_{t+1}^T p_{t+1},    A^T = diag(a) + w x^T
    dC = scale h dy,  dB = p u,  du = B^T p,  dx = p (w^T h'),  dw = h' (x^T p),  dl = a p . h'

with h' the state before the step; no gradient divides by a decay, which may be 0.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import (
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    over_groups,
    power_of_two,
    start_state,
)
from dsf_kernels.low_rank_chunk_scan import fake, low_rank_chunk_scan
from dsf_kernels.low_rank_kernels import forward_kernel, gradient_kernel
from dsf_kernels.operators import operator

MAX_WIDTH = 128
CHUNK = 32
SLAB = 16


def _launch(tensors, decay):
    """Sizes, strides of the streams, and constants that both kernels take."""
    query, key, value, left, right = tensors
    shares = {"Q_SHARE": query, "K_SHARE": key, "X_SHARE": left, "W_SHARE": right}
    settings = {name: value.shape[2] // t.shape[2] for name, t in shares.items()}
    strides = [s for t in tensors for s in t.stride()]
    strides += (0, 0, 0, 0) if decay is None else decay.stride()
    settings |= {"HAS_DECAY": decay is not None, "CHUNK": CHUNK, "SLAB": SLAB,
                 "WIDTH": power_of_two(key.shape[3]), "num_warps": 4}  # fmt: skip
    return strides, settings


def _walk(tensors, decay, initial, scale, out, final, states):
    value, n_state = tensors[2], tensors[1].shape[3]
    batch, length, head, channels = value.shape
    strides, settings = _launch(tensors, decay)
    held = (0, 0, 0, 0) if initial is None else initial.stride()
    forward_kernel[(batch * head * -(-channels // SLAB),)](
        *tensors, value if decay is None else decay, value if initial is None else initial,
        value if out is None else out, value if final is None else final,
        value if states is None else states, length, -(-length // CHUNK), head, n_state,
        channels, float(scale), *strides, *held, HAS_INITIAL=initial is not None,
        SAVE=states is not None, **settings,
    )  # fmt: skip


def _forward(
    query: Tensor, key: Tensor, value: Tensor, left: Tensor, right: Tensor,
    log_decay: Tensor | None, initial: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, final = fake(query, key, value, left, right, log_decay, initial, scale)
    if value.numel() == 0:
        return out, start_state(value, key.shape[3], initial)
    with on_device(value):
        tensors = query, key, value, left, right
        _walk(tensors, log_decay, initial, scale, out, final, None)
    return out, final


def _backward(ctx, grad, grad_final):
    *tensors, log_decay, initial = ctx.saved_tensors
    query, key, value, left, right = tensors
    batch, length, head, channels = value.shape
    n_state, scale = key.shape[3], ctx.rest[0]
    if value.numel() == 0:
        last = start_state(value, n_state, grad_final)
        return (*(torch.zeros_like(t) for t in tensors),
                None if log_decay is None else torch.zeros_like(log_decay),
                None if initial is None else last.to(initial.dtype), None)  # fmt: skip
    grad = torch.zeros_like(value) if grad is None else grad
    n_slab, n_chunk, lanes = -(-channels // SLAB), -(-length // CHUNK), batch * head
    strides, settings = _launch(tensors, log_decay)

    def empty(*shape):
        return value.new_empty(shape, dtype=torch.float32)

    states = empty(lanes, n_chunk, n_state, channels)
    scratch = empty(lanes * n_slab, CHUNK, settings["WIDTH"], SLAB)
    parts = [empty(n_slab, batch, length, head, n_state) for _ in range(4)]
    steep = parts[0] if log_decay is None else torch.empty_like(parts[0])
    d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    d_initial = empty(batch, head, n_state, channels)
    pulled = (0, 0, 0, 0) if grad_final is None else grad_final.stride()
    with on_device(value):
        _walk(tensors, log_decay, initial, scale, None, None, states)
        gradient_kernel[(lanes * n_slab,)](
            *tensors, value if log_decay is None else log_decay, grad,
            value if grad_final is None else grad_final, states, scratch, parts[0], parts[1],
            d_value, parts[2], parts[3], steep, d_initial, length, n_chunk, batch, head,
            n_state, channels, float(scale), *strides, *grad.stride(), *pulled,
            HAS_INITIAL=grad_final is not None, **settings,
        )  # fmt: skip
    likes = (query, key, left, right)
    d_query, d_key, d_left, d_right = (
        over_groups(p.sum(0), t) for p, t in zip(parts, likes, strict=True)
    )
    return (d_query, d_key, d_value, d_left, d_right,
            None if log_decay is None else steep.sum(0).to(log_decay.dtype),
            None if initial is None else d_initial.to(initial.dtype), None)  # fmt: skip


_scan = operator("low_rank_scan", _forward, fake, _backward)


def low_rank_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    right: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of a recurrence with a diagonal plus rank 1 transition.

    h_t = (diag(a_t) + x_t w_t^T) h_{t-1} + B_t u_t, y_t = scale C_t h_t, with C = `query`, B =
    `key`, u = `value`, x = `left`, w = `right`, a = exp(`log_decay`) (-inf gives exact 0; None:
    1), h_0 = `initial_state` (zero when None). RWKV-7, DPLR, IPLR.

    Shapes: query, key, left, right (batch, time, group, state) with group dividing head, value
    (batch, time, head, channel), log_decay (batch, time, head, state), initial_state (batch,
    head, state, channel); state and channel 1 to 128, time from 0, any strides; bf16, fp16 or
    fp32, one type for all but log_decay and initial_state. Returns outputs like value and the
    final state in float32. Differentiable in all seven tensors, once.
    form: "serial", one step after the other, all sums in float32; None or "chunk", by chunks of
    16 tokens, whose products round their operands to bf16 for bf16 (the solve to tf32) and are
    exact float32 for the others.
    Raises ValueError (shape, device, form), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: serial, time x 8 N P operations a head, one step after the other, backward three times
    that, and N P / 32 numbers a token and head in memory; by chunks of c, time x (6 N P + 8 c (N
    log c + P)), 4 N + 4 c numbers a token and head, backward 8 N + 8 c and 2 N P / c.
    Source: Peng et al. 2025 (RWKV-7, generalised delta rule), Yang et al. 2024 (DeltaNet, the
    solve of a chunk).
    """
    check_scale("low_rank_scan", scale)
    if form not in (None, "chunk", "serial"):
        raise ValueError(
            f"dsf_kernels.low_rank_scan: form: expected chunk, serial or None, got {form!r}."
        )
    names = {"value": value, "query": query, "key": key, "left": left, "right": right}
    check_kind("low_rank_scan", names | {"log_decay": log_decay, "initial_state": initial_state})
    for one, two in ((query, key), (left, right)):
        check_matrix_state("low_rank_scan", one, two, value, initial_state, MAX_WIDTH)
    sizes = dict(zip(("batch", "time", "head"), value.shape, strict=False))
    if left.shape[3] != key.shape[3]:
        expected = {"batch": None, "time": None, "group": None, "state": key.shape[3]}
        check_tensor("low_rank_scan", "left", left, expected, "state is fixed by key")
    if log_decay is not None:
        expected = sizes | {"state": key.shape[3]}
        check_tensor("low_rank_scan", "log_decay", log_decay, expected, "one a state")
    scan = _scan if form == "serial" else low_rank_chunk_scan
    return scan(query, key, value, left, right, log_decay, initial_state, float(scale))
