"""Linear recurrence with a matrix state and one decay per head, in one fused pass over time.

One program owns a head and a slab of channels, keeps the state (N, slab) in registers, and walks
over chunks of 64 tokens: inside a chunk it is a masked matrix product, between chunks a rescale
and an addition. No state goes to memory. With x, y, w (query, key, value) the kernel gives

    out_i = sum_{j <= i} exp(g_i - g_j) (x_i . y_j) w_j + exp(g_i) x_i h_start        forward
    out_j = sum_{i >= j} exp(g_i - g_j) (x_j . y_i) w_i + exp(g_c - g_j) x_j h_end    reverse

g: cumulative log decay in the chunk, c its last step. All three gradients are the same kernel
with the roles moved: dq = forward(dy, v, k), dk = reverse(v, dy, q), dv = reverse(k, q, dy).
The gradient of the log decay is summed from pairs that span a token, never as a difference of
prefix sums, so it stays exact where decays are strong.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunk_kernel import chunk_kernel
from dsf_kernels.combine import cumulate
from dsf_kernels.launch import (
    INTERPRETED,
    check_kind,
    check_tensor,
    narrow,
    on_device,
    power_of_two,
)

CHUNK, SLAB = 64, 64
MAX_WIDTH = 256


def _settings(dtype: torch.dtype, width: int) -> dict:
    """Type and precision of the matrix products, chunk length, warps, pipeline stages."""
    exact = dtype != torch.bfloat16 or INTERPRETED
    return {
        "EXACT": exact,
        "COMPUTE": tl.float32 if exact else tl.bfloat16,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        "CHUNK": CHUNK // 2 if exact else CHUNK,
        "STAGES": 1 if exact else 2,
        "num_warps": 8 if width > 128 or exact else 4,
    }


def _slab(settings: dict, width: int, channels: int, decay_grad: bool) -> int:
    """Channels a program holds: a state of 8192 numbers fills the registers of four warps."""
    least = settings["EXACT"] or decay_grad
    most = SLAB if least else min(2 * SLAB, max(SLAB, 128 * SLAB // width))
    return min(most, power_of_two(channels, 16))


def _launch(x, y, w, out, settings, scale, *, reverse=False, decays=None, extra=None,
            initial=None, final=None, saved=None, decay_grad=None):  # fmt: skip
    """Run the kernel: x, y, w as in the file's head; `out` None when only the state counts."""
    x, y, w, extra = (narrow(t, 1) for t in (x, y, w, x if extra is None else extra))
    batch, length = w.shape[:2]
    n_head = max(x.shape[2], y.shape[2], w.shape[2])
    width, channels = y.shape[3], w.shape[3]
    wide, slab = power_of_two(width, 16), _slab(settings, width, channels, decay_grad is not None)
    if decay_grad is not None:  # its extra tile leaves no room for a second stage (measured)
        settings = settings | {"STAGES": 1}
    full = length % settings["CHUNK"] == 0 and width == wide and channels % slab == 0
    high, low = (x, x) if decays is None else decays
    state_strides = (0, 0, 0, 0) if initial is None else initial.stride()
    targets = [x if target is None else target for target in (initial, final, saved, decay_grad)]
    chunk_kernel[(batch * n_head * -(-channels // slab),)](
        x, y, w, extra, x if out is None else out, high, low, *targets,
        length, -(-length // settings["CHUNK"]), n_head, width, channels,
        float(scale), 1.0 / scale if reverse else 1.0,
        *x.stride(), *y.stride(), *w.stride(), *extra.stride(), *state_strides,
        X_SHARE=n_head // x.shape[2], Y_SHARE=n_head // y.shape[2], W_SHARE=n_head // w.shape[2],
        E_SHARE=n_head // extra.shape[2], REVERSE=reverse, HAS_DECAY=decays is not None,
        HAS_INITIAL=initial is not None, STORE=out is not None, FINAL=final is not None,
        DECAY_GRAD=decay_grad is not None, FULL=full, WIDTH=wide, SLAB=slab, **settings,
    )  # fmt: skip


def _start(value: Tensor, n_state: int, initial: Tensor | None) -> Tensor:
    shape = (value.shape[0], value.shape[2], n_state, value.shape[3])
    zero = value.new_zeros(shape, dtype=torch.float32)
    return zero if initial is None else zero + initial


@torch.library.custom_op("dsf::scalar_decay_scan", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, n_head, channels = value.shape
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if min(batch, length, n_head, channels) == 0:
        return out, _start(value, key.shape[3], initial)
    final = value.new_empty((batch, n_head, key.shape[3], channels), dtype=torch.float32)
    settings = _settings(value.dtype, key.shape[3])
    with on_device(value):
        decays = None if log_decay is None else cumulate(log_decay, settings["CHUNK"])
        _launch(query, key, value, out, settings, scale, decays=decays, initial=initial,
                final=final)  # fmt: skip
    return out, final


@_forward.register_fake
def _(query, key, value, log_decay, initial, scale):
    shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return out, value.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dsf::scalar_decay_scan_adjoint", mutates_args=())
def _adjoint(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    grad: Tensor, grad_final: Tensor | None, scale: float, decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, n_head, channels = value.shape
    n_state, device = key.shape[3], value.device
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
    grad_initial = value.new_empty((batch, n_head, n_state, channels), dtype=torch.float32)
    wide = (batch, length, n_head, n_state)
    grad_query = torch.empty(wide, dtype=query.dtype, device=device)
    grad_key = torch.empty(wide, dtype=key.dtype, device=device)
    grad_decay = value.new_zeros((batch, length if decay_grad else 0, n_head), dtype=torch.float32)
    if min(batch, length, n_head, channels) == 0:
        zeros = torch.zeros(query.shape).to(query), torch.zeros(key.shape).to(key)
        return *zeros, grad_value, grad_decay, _start(value, n_state, grad_final)
    settings = _settings(value.dtype, max(n_state, channels))
    chunk = settings["CHUNK"]
    n_chunk = -(-length // chunk)
    partial = saved = None
    if decay_grad:
        n_slab = -(-n_state // _slab(settings, channels, n_state, True))
        partial = value.new_empty((2, n_slab, batch, n_head, n_chunk * chunk), dtype=torch.float32)
        kept = torch.float32 if value.dtype == torch.float16 else value.dtype
        saved = value.new_empty((batch, n_head, n_chunk, channels, n_state), dtype=kept)
    flipped, flipped_final = (None if t is None else t.mT for t in (initial, grad_final))
    with on_device(value):
        decays = None if log_decay is None else cumulate(log_decay, chunk)
        shared = {"decays": decays, "saved": saved}
        _launch(grad, value, key, grad_query, settings, scale, extra=query, initial=flipped,
                decay_grad=None if partial is None else partial[0], **shared)  # fmt: skip
        _launch(value, grad, query, grad_key, settings, scale, extra=key, initial=flipped_final,
                decay_grad=None if partial is None else partial[1], reverse=True,
                **shared)  # fmt: skip
        _launch(key, query, grad, grad_value, settings, scale, decays=decays, initial=grad_final,
                final=grad_initial, reverse=True)  # fmt: skip
    if partial is not None:
        grad_decay = partial.sum((0, 1))[:, :, :length].mT.contiguous()
    return (
        _over_groups(grad_query, query), _over_groups(grad_key, key), grad_value, grad_decay,
        grad_initial,
    )  # fmt: skip


def _over_groups(grad: Tensor, like: Tensor) -> Tensor:
    """Sum of the heads that share a group, in float32, in the type of `like`."""
    if grad.shape == like.shape:
        return grad
    return grad.unflatten(2, (like.shape[2], -1)).sum(3, dtype=torch.float32).to(like.dtype)


@_adjoint.register_fake
def _(query, key, value, log_decay, initial, grad, grad_final, scale, decay_grad):
    batch, length, n_head, channels = value.shape
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        value.new_empty((batch, length if decay_grad else 0, n_head), dtype=torch.float32),
        value.new_empty((batch, n_head, key.shape[3], channels), dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad, grad_final):
    query, key, value, log_decay, initial = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[3]
    grad = torch.zeros_like(value) if grad is None else grad
    *grads, grad_decay, grad_initial = _adjoint(
        query, key, value, log_decay, initial, grad, grad_final, ctx.scale, wanted
    )
    grad_decay = grad_decay.to(log_decay.dtype) if wanted else None
    return *grads, grad_decay, None if initial is None else grad_initial.to(initial.dtype), None


_forward.register_autograd(_backward, setup_context=_save)


def _checked(function, query, key, value, log_decay, initial_state):
    """Raise on wrong kinds and shapes; the log decay as (batch, time, head)."""
    names = {"value": value, "query": query, "key": key, "log_decay": log_decay,
             "initial_state": initial_state}  # fmt: skip
    check_kind(function, names)
    check_tensor(function, "value", value, dict.fromkeys(("batch", "time", "head", "channel")), "")
    batch, length, n_head, channels = value.shape
    n_state = key.shape[-1]
    for name in ("key", "query"):
        sizes = {"batch": batch, "time": length, "group": None, "state": n_state}
        check_tensor(function, name, names[name], sizes, "sizes are fixed by value and key")
        groups = names[name].shape[2]
        if n_head and (groups == 0 or n_head % groups):
            raise ValueError(
                f"dsf_kernels.{function}: {name}: expected a group count that divides "
                f"head={n_head}, got {groups}."
            )
        if names[name].dtype != value.dtype:
            raise TypeError(
                f"dsf_kernels.{function}: {name}: expected {value.dtype}, the type of value, "
                f"got {names[name].dtype}."
            )
    if max(n_state, channels) > MAX_WIDTH or min(n_state, channels) < 1:
        raise ValueError(
            f"dsf_kernels.{function}: expected state and channel from 1 to {MAX_WIDTH}, got "
            f"state={n_state}, channel={channels}."
        )
    if initial_state is not None:
        sizes = {"batch": batch, "head": n_head, "state": n_state, "channel": channels}
        check_tensor(function, "initial_state", initial_state, sizes, "fixed by key and value")
    if log_decay is None or log_decay.dim() == 3:
        sizes = {"batch": batch, "time": length, "head": n_head}
    else:
        sizes = {"head": n_head}
    if log_decay is not None:
        check_tensor(function, "log_decay", log_decay, sizes, "sizes are fixed by value")
        log_decay = log_decay.expand(batch, length, n_head)
    return log_decay


def scalar_decay_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of a matrix state under one decay per head.

    h_t = exp(l_t) h_{t-1} + B_t u_t, y_t = scale C_t h_t, with C = `query`, B = `key`,
    u = `value`, l = `log_decay` <= 0 (-inf resets exactly; None: no decay; one number per head:
    fixed), h_0 = `initial_state` (zero when None). Covers linear attention, RetNet, simple GLA,
    Mamba-2.

    Shapes: query, key (batch, time, group, state) with group dividing head (head k reads group
    k // (head / group)), value (batch, time, head, channel), log_decay (batch, time, head) or
    (head,), initial_state (batch, head, state, channel); state and channel 1 to 256, time from
    0, any strides; bf16, fp16 or fp32, one type for query, key, value. Returns outputs like
    value and the final state in float32. Differentiable in all five tensors.
    Matrix products round their operands to bf16 for bf16 and to tf32 for fp16, and are exact
    float32 for fp32; sums and the state are float32.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: time x (4 N P + 128 (N + P)) operations a head forward, three times that backward; no
    state in memory, unless log_decay needs a gradient (N P numbers per 64 steps in backward).
    Source: Dao and Gu 2024 (state space duality, section 6), Yang et al. 2024 (chunk form);
    measured figures in kernels/README.md.
    """
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(
            f"dsf_kernels.scalar_decay_scan: scale: expected a finite nonzero number, got {scale}."
        )
    log_decay = _checked("scalar_decay_scan", query, key, value, log_decay, initial_state)
    return _forward(query, key, value, log_decay, initial_state, float(scale))


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
    end = _start(value, key.shape[3], None)
    if end.numel() and length:
        settings = _settings(value.dtype, key.shape[3])
        with on_device(value):
            decays = None if log_decay is None else cumulate(log_decay, settings["CHUNK"])
            _launch(key, key, value, None, settings, 1.0, decays=decays, final=end)
    return total, end
