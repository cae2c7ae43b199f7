"""mLSTM: matrix memory with exponential input gates, a running maximum and a bounded divisor.

The maximum m turns the gates into log decays l_t + m_{t-1} - m_t and weights exp(i_t - m_t) <= 1.
With the weights on the values (keys may serve several heads), numerator and divisor are each a
`scalar_decay_scan`: over the weighted values, and over the weights as one more column, apart, as
one column more than a power of two would double the tiles. Result and gradients do not depend on
m, so it is a constant in the gradients.
"""

import torch
from torch import Tensor

from dsf_kernels.launch import (
    check_kind,
    check_matrix_state,
    check_scale,
    check_tensor,
    on_device,
    power_of_two,
)
from dsf_kernels.mlstm_kernels import (
    divide_adjoint_kernel,
    divide_kernel,
    maximum_kernel,
    weights_adjoint_kernel,
    weights_kernel,
)
from dsf_kernels.operators import operator
from dsf_kernels.scalar_decay_scan import MAX_WIDTH, unchecked_scan

TILE = 1024  # steps of a scan of the maximum
CELLS = 1024  # numbers of a tile of an elementwise kernel
FORGET = ("sigmoid", "exponential")


def _blocks(value: Tensor) -> tuple[tuple[int], dict]:
    """Grid and tiles of a kernel over the rows (batch, time, head) of channels."""
    wide = power_of_two(value.shape[3])
    rows = max(1, CELLS // wide)
    grid = (value.shape[0] * -(-value.shape[1] * value.shape[2] // rows),)
    return grid, {"ROWS": rows, "WIDE": wide, "num_warps": 4}


def _state_strides(initial: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if initial is None else initial.stride()


def _maximum(
    input_gate: Tensor, forget_gate: Tensor, initial: Tensor | None, exponential: bool
) -> Tensor:
    top = torch.empty(input_gate.shape, dtype=torch.float32, device=input_gate.device)
    batch, length, n_head = top.shape
    if top.numel():
        with on_device(top):
            maximum_kernel[(batch * n_head,)](
                input_gate, forget_gate, top if initial is None else initial, top, length, n_head,
                *input_gate.stride(), *forget_gate.stride(), *_state_strides(initial),
                HAS_INITIAL=initial is not None, EXPONENTIAL=exponential,
                TILE=min(TILE, power_of_two(length, 16)), num_warps=4,
            )  # fmt: skip
    return top


def _fake_maximum(input_gate, forget_gate, initial, exponential):
    return torch.empty(input_gate.shape, dtype=torch.float32, device=input_gate.device)


def _fake_weights(value, input_gate, forget_gate, top, initial, exponential):
    column = value.new_empty((*value.shape[:3], 1))
    return value.new_empty(value.shape), column, top.new_empty(top.shape)


def _weights(
    value: Tensor, input_gate: Tensor, forget_gate: Tensor, top: Tensor, initial: Tensor | None,
    exponential: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = _fake_weights(value, input_gate, forget_gate, top, initial, exponential)
    _, length, n_head, channels = value.shape
    grid, tiles = _blocks(value)
    if grid[0]:
        with on_device(value):
            weights_kernel[grid](
                value, input_gate, forget_gate, top, top if initial is None else initial, *found,
                length, n_head, channels, *value.stride(), *input_gate.stride(),
                *forget_gate.stride(), *_state_strides(initial),
                HAS_INITIAL=initial is not None, EXPONENTIAL=exponential, **tiles,
            )  # fmt: skip
    return found


def _fake_weights_adjoint(
    value, input_gate, forget_gate, top, d_weighted, d_weights, d_decay, exponential
):
    given = (value, input_gate, forget_gate)
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given)


def _run_weights_adjoint(
    value: Tensor, input_gate: Tensor, forget_gate: Tensor, top: Tensor, d_weighted: Tensor,
    d_weights: Tensor, d_decay: Tensor, exponential: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [t.contiguous() for t in (d_weighted, d_weights, d_decay)]  # the scans' are already
    found = _fake_weights_adjoint(value, input_gate, forget_gate, top, *grads, exponential)
    _, length, n_head, channels = value.shape
    grid, tiles = _blocks(value)
    if grid[0]:
        with on_device(value):
            weights_adjoint_kernel[grid](
                value, input_gate, forget_gate, top, *grads, *found,
                length, n_head, channels, *value.stride(), *input_gate.stride(),
                *forget_gate.stride(), EXPONENTIAL=exponential, **tiles,
            )  # fmt: skip
    return found


_weights_adjoint = operator("mlstm_weights_adjoint", _run_weights_adjoint, _fake_weights_adjoint)


def _weights_backward(ctx, *grads):
    value, input_gate, forget_gate, top, initial = ctx.saved_tensors
    like = (value, top[..., None].to(value.dtype), top)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]
    found = _weights_adjoint(value, input_gate, forget_gate, top, *grads, ctx.rest[0])
    d_initial = None
    if initial is not None and ctx.needs_input_grad[4]:  # l_1 + m_0 - m_1 is the first log decay
        d_initial = grads[2][:, :1].sum(1).to(initial.dtype)
    return *found, None, d_initial, None


def _fake_divide(numerator, divisor, top, eps):
    return numerator.new_empty(numerator.shape)


def _run_divide(numerator: Tensor, divisor: Tensor, top: Tensor, eps: float) -> Tensor:
    out = numerator.new_empty(numerator.shape)
    grid, tiles = _blocks(numerator)
    if grid[0]:
        with on_device(out):
            divide_kernel[grid](
                numerator, divisor, top, out, top.numel(), out.shape[3], eps, **tiles
            )
    return out


def _fake_divide_adjoint(numerator, divisor, top, grad, eps):
    return numerator.new_empty(numerator.shape), divisor.new_empty(divisor.shape)


def _run_divide_adjoint(
    numerator: Tensor, divisor: Tensor, top: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    found = _fake_divide_adjoint(numerator, divisor, top, grad, eps)
    _, length, n_head, channels = numerator.shape
    grid, tiles = _blocks(numerator)
    if grid[0]:
        with on_device(numerator):
            divide_adjoint_kernel[grid](
                numerator, divisor, top, grad, *found, length, n_head, channels, eps,
                *grad.stride(), **tiles,
            )  # fmt: skip
    return found


_divide_adjoint = operator("mlstm_divide_adjoint", _run_divide_adjoint, _fake_divide_adjoint)


def _divide_backward(ctx, grad):
    return *_divide_adjoint(*ctx.saved_tensors, grad, ctx.rest[0]), None, None


_running_maximum = operator("mlstm_maximum", _maximum, _fake_maximum)
_weighted = operator("mlstm_weights", _weights, _fake_weights, _weights_backward)
_divide = operator("mlstm_divide", _run_divide, _fake_divide, _divide_backward)


def _check(query, key, value, gates, initial, scale, eps, forget):
    function = "mlstm_scan"
    check_scale(function, scale)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"dsf_kernels.{function}: eps: expected a finite number >= 0, got {eps}.")
    if forget not in FORGET:
        raise ValueError(
            f"dsf_kernels.{function}: forget: expected one of {FORGET}, got {forget!r}."
        )
    state, key_sum, m = initial
    parts = {"initial_state": state, "initial_key_sum": key_sum, "initial_maximum": m}
    check_kind(function, {"value": value, "query": query, "key": key} | gates | parts)
    check_matrix_state(function, query, key, value, state, MAX_WIDTH)
    batch, length, n_head, _ = value.shape
    sizes = {"batch": batch, "time": length, "head": n_head}
    for name, gate in gates.items():
        check_tensor(function, name, gate, sizes, "sizes are fixed by value")
    if state is not None:
        lane = {"batch": batch, "head": n_head}
        wide = lane | {"state": key.shape[3]}
        check_tensor(function, "initial_key_sum", key_sum, wide, "fixed by key and value")
        check_tensor(function, "initial_maximum", m, lane, "fixed by value")


def mlstm_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    scale: float = 1.0,
    eps: float = 0.0,
    forget: str = "sigmoid",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Outputs, and the last (state, key sum, maximum), of the stabilised mLSTM.

        m_t = max(m_{t-1} + l_t, i_t),   a_t = exp(l_t + m_{t-1} - m_t),   b_t = exp(i_t - m_t)
        S_t = a_t S_{t-1} + b_t B_t u_t,   n_t = a_t n_{t-1} + b_t B_t
        y_t = scale C_t S_t / (max(|scale C_t n_t|, exp(-m_t)) + eps)

    with C = `query`, B = `key`, u = `value`, i = `input_gate` and f = `forget_gate` before
    activation, l = log sigmoid(f), or f where forget = "exponential"; -inf in a gate closes it
    exactly (where both are closed m_t is -1e30, and what follows starts anew). `initial` = (S_0,
    n_0, m_0), the first two in units of exp(m_0); None: zeros. eps as the released code has it
    (1e-6 there), on the divisor in units of exp(m_t).

    Shapes: query, key (batch, time, group, state) with group dividing head, value (batch, time,
    head, channel), gates (batch, time, head), S (batch, head, state, channel), n (batch, head,
    state), m (batch, head); state and channel 1 to 256, time from 0, any strides; bf16, fp16 or
    fp32, one type for query, key, value. Returns outputs like value and (S, n, m) in float32.
    Differentiable in all tensors, m_t held constant: nothing depends on it but the units of S and
    n; the last m has no gradient.
    Rounding as `scalar_decay_scan`; for 16-bit inputs numerator and divisor are rounded once
    before the division, and in fp16 either is inf above 65504, which open gates reach over
    thousands of tokens: use bf16 there. Weighted values, and gradients by the numerator, keep
    fewer digits below 6e-5 in fp16: scale the loss. The error grows by sum |q.k| / divisor where
    terms cancel; where |C_t n_t| is within rounding of exp(-m_t), the gradient is of either side.
    Raises ValueError (shape, device, eps, forget), TypeError (dtype), NotImplementedError (CPU).
    Cost: `scalar_decay_scan` with P channels and again with one; 4 passes over arrays like value
    beside it, in backward 6 and the sums of two gradients of query and key; m in length / 1024
    tiles in turn. Kept for backward: the weighted values and the numerator.
    Source: Beck et al. (2024), eqs. 19-27.
    """
    gates = {"input_gate": input_gate, "forget_gate": forget_gate}
    state, key_sum, m = (None, None, None) if initial is None else initial
    _check(query, key, value, gates, (state, key_sum, m), scale, eps, forget)
    exponential = forget == "exponential"
    start = None if m is None else m.detach()
    top = _running_maximum(input_gate.detach(), forget_gate.detach(), start, exponential)
    weighted, column, log_decay = _weighted(value, input_gate, forget_gate, top, m, exponential)
    scale = float(scale)
    numerator, state = unchecked_scan(query, key, weighted, log_decay, state, scale)
    sums = None if key_sum is None else key_sum[..., None]
    divisor, sums = unchecked_scan(query, key, column, log_decay, sums, scale)
    y = _divide(numerator, divisor, top, float(eps))
    if value.shape[1]:
        start = top[:, -1].clone()
    elif start is None:
        start = top.new_zeros((value.shape[0], value.shape[2]))
    else:
        start = start.float().clone()
    return y, (state, sums[..., 0], start)
