"""Selective scan (Mamba's S6), channels last: forward, and all gradients by recomputation.

A program owns 128 channels (32 in narrow groups), one a lane, and walks over time in tiles of 16
steps that lie in the lane's registers; the states are visited one by one. No warp waits for
another, each exponential is evaluated once a pass. Long rows in bf16 are cut in segments that run
side by side: a pass for their last states from zero, then one from the right first states. When
gradients are wanted the forward pass stores the state before every tile (float32); the backward
pass recomputes the states of a tile from there, runs the adjoint recurrence back, and sums over
the channels of B_t and C_t by products with ones. Those sums are stored for every program and
added in a fixed order: results repeat bit for bit.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import check_kind, check_tensor, check_type
from dsf_kernels.selective_launch import (
    empty_grads,
    launch_adjoint,
    launch_forward,
    launch_summary,
    room,
)
from dsf_kernels.sequences import check_sequences, count_rows, placed

MAX_STATE = 256


@torch.library.custom_op("dsf::selective_scan", mutates_args=())
def _forward(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, z: Tensor | None, initial: Tensor | None, softplus: bool, save: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_forward(u, step, A, B, C, D, bias, z, initial, softplus, save, cu_seqlens)


@_forward.register_fake
def _(u, step, A, B, C, D, bias, z, initial, softplus, save, cu_seqlens=None):
    state = count_rows(u, cu_seqlens), A.shape[1], u.shape[2]
    return (
        u.new_empty(u.shape),
        u.new_empty(state, dtype=torch.float32),
        u.new_empty((0,) if z is None else u.shape),
        room(u, B, save, cu_seqlens),
    )


@torch.library.custom_op("dsf::selective_scan_adjoint", mutates_args=())
def _adjoint(
    u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, z: Tensor | None, ungated: Tensor, saved: Tensor, grad: Tensor,
    grad_final: Tensor | None, softplus: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, step, A, (B, C), (D, bias), z, initial state (row, state, channel)."""
    given = u, step, A, B, C, D, bias, z, ungated, saved, grad, grad_final
    return launch_adjoint(*given, softplus, cu_seqlens)


@_adjoint.register_fake
def _(u, step, A, B, C, D, bias, z, ungated, saved, grad, grad_final, softplus, cu_seqlens=None):
    return empty_grads(u, step, A, B, z, cu_seqlens)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the saved states
    *tensors, ctx.softplus, ctx.save, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, output[2], output[3], cu_seqlens)


def _backward(ctx, grad, grad_final, _ungated, _saved):
    u, step, A, B, C, D, bias, z, initial, ungated, saved, cu_seqlens = ctx.saved_tensors
    if not ctx.save:
        given = u, step, A, B, C, D, bias, z, initial
        saved = _forward(*given, ctx.softplus, True, cu_seqlens)[3]
    grad = torch.zeros_like(u) if grad is None else grad
    grad_u, grad_step, grad_A, sums, ends, grad_z, grad_initial = _adjoint(
        u, step, A, B, C, D, bias, z, ungated, saved, grad, grad_final, ctx.softplus, cu_seqlens
    )
    return (
        grad_u, grad_step, grad_A.to(A.dtype), sums[..., 0, :].to(B.dtype),
        sums[..., 1, :].to(C.dtype), None if D is None else ends[0].to(D.dtype),
        None if bias is None else ends[1].to(bias.dtype), None if z is None else grad_z,
        None if initial is None else grad_initial.mT.to(initial.dtype), None, None, None,
    )  # fmt: skip


_forward.register_autograd(_backward, setup_context=_save)


def _checked(function, u, step_size, A, B, C, D, z, bias, initial_state, cu_seqlens=None):
    """Raise on wrong kinds and shapes."""
    names = {"u": u, "step_size": step_size, "A": A, "B": B, "C": C, "D": D, "z": z,
             "bias": bias, "initial_state": initial_state}  # fmt: skip
    check_kind(function, names)
    check_tensor(function, "u", u, dict.fromkeys(("batch", "time", "channel")), "three axes")
    batch, length, channels = u.shape
    check_tensor(function, "A", A, {"channel": channels, "state": None}, "channel is fixed by u")
    n_state = A.shape[1]
    if not 1 <= n_state <= MAX_STATE:
        raise ValueError(
            f"dsf_kernels.{function}: A: expected 1 to {MAX_STATE} states, got {n_state}."
        )
    full = {"batch": batch, "time": length, "channel": channels}
    group = {"batch": batch, "time": length, "group": None, "state": n_state}
    state = {"batch": batch, "channel": channels, "state": n_state}
    sizes = {"step_size": full, "z": full, "B": group, "C": group, "D": {"channel": channels},
             "bias": {"channel": channels}}  # fmt: skip
    if cu_seqlens is None:
        sizes["initial_state"] = state
    else:
        del state["batch"]
        check_sequences(function, cu_seqlens, u, initial_state, state, "u")
    for name, expected in sizes.items():
        tensor = names[name]
        if tensor is not None:
            check_tensor(function, name, tensor, expected, "sizes are fixed by u and A")
    n_group = B.shape[2]
    if n_group == 0 or channels % n_group or C.shape[2] != n_group:
        raise ValueError(
            f"dsf_kernels.{function}: B, C: expected one group count that divides "
            f"channel={channels}, got {n_group} and {C.shape[2]}."
        )
    check_type(function, "u", {"u": u, "step_size": step_size, "z": z, "B": B, "C": C})


def selective_scan(
    u: Tensor,
    step_size: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    softplus: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last state, of the selective scan S6, every channel with its own states.

    h_t[d,n] = exp(s_t[d] A[d,n]) h_{t-1}[d,n] + s_t[d] B_t[n] u_t[d],
    y_t[d] = (sum_n C_t[n] h_t[d,n] + D[d] u_t[d]) SiLU(z_t[d]), with s_t = `step_size` + `bias`,
    or its softplus; without D the skip, without z the gate is left out; h_0 = `initial_state`
    (zero when None). A <= 0 decays; a product s_t A of -100 or less forgets exactly.

    cu_seqlens (n + 1,): n sequences packed along time in one row, each with its own initial and
    final state (n, channel, state), as in `scalar_decay_scan`, with its errors.

    Shapes: u, step_size, z (batch, time, channel); A (channel, state); B, C (batch, time, group,
    state) with group dividing channel (channel d reads group d // (channel / group)); D, bias
    (channel,); initial_state (batch, channel, state); state 1 to 256, time from 0, any strides;
    bf16, fp16 or fp32, one type for u, step_size, z, B, C. Returns outputs like u and the final
    state (batch, channel, state) in float32. Differentiable in all nine tensors.
    The state and all sums are float32; for fp32 inputs exponentials are accurate to a unit in the
    last place; for bf16 (fp16) the gradients of B and C sum over channels numbers rounded to bf16
    (tf32).
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: time x channel x state exponentials forward, as many again backward, and as many again
    in each where a row is cut in segments. Memory for gradients: state / 16 float32 numbers a
    token and channel, and 2 state float32 numbers a token and program in the backward pass. The
    kernels are compiled for each number of channels and stride of time.
    Source: Gu and Dao 2023 (equation 2, section 3.3); measured figures in kernels/README.md.
    """
    tensors = (u, step_size, A, B, C, D, bias, z, initial_state)
    _checked("selective_scan", u, step_size, A, B, C, D, z, bias, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = placed("selective_scan", cu_seqlens, u)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, final, _, _ = _forward(*tensors, softplus, save, cu_seqlens)
    return out, final.mT


def selective_summary(
    u: Tensor,
    step_size: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a segment does to any state: (total, end) with h_L = total h_0 + end.

    total = exp(A sum_t s_t) and end = h_L from zero, both (batch, channel, state) float32.
    Arguments and errors as `selective_scan`; no gradient.
    """
    u, step_size, A, B = (t.detach() for t in (u, step_size, A, B))
    bias = None if bias is None else bias.detach()
    _checked("selective_summary", u, step_size, A, B, B, None, None, bias, None)
    span, end = launch_summary(u, step_size, A, B, bias, softplus)
    return torch.exp(span[..., None] * A.double()).float(), end.mT
