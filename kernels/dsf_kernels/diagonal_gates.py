"""Elementwise recurrences whose decay and input are made from gates as they are read.

What `diagonal_scan` takes as a decay and an input, HGRN, minGRU and the RG-LRU first make from
projections: as many passes over the data again, and as many again backward. Here the kernels read
the projections themselves.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dsf_kernels.diagonal_gates_kernels import gated_adjoint_kernel, gated_kernel
from dsf_kernels.launch import check_kind, check_tensor, check_type, narrow, on_device

LANES = 32
# T, S: steps of a warp, warps; V (below): channels a lane. As many registers as do without spills,
# not yet timed. RAGGED: the same number of steps, where a mask or resets take registers too.
FORWARD = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 128}
FORWARD_16 = {"T": 8, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 96}
ADJOINT = {"T": 8, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 80}
ADJOINT_16 = {"T": 8, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 128}
RAGGED = {"T": 8, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 128}
RAGGED_16 = {"T": 4, "S": 16, "C": LANES, "num_warps": 16, "maxnreg": 128}


def _plan(
    tensors: tuple[Tensor, ...], wide: tuple[dict, dict], packed: tuple[dict, dict], plain: bool
) -> tuple[int, list, Tensor, dict]:
    """Programs; carries, ticket and sizes as the kernels take them; a zero state; the tile.

    Pairs of 16-bit channels load as one word where every tensor has them side by side. wide,
    packed: the tile for whole blocks without resets (`plain`), and for the rest.
    """
    batch, length, width = tensors[0].shape
    pairs = all(t.element_size() == 2 and t.stride(2) == 1 for t in tensors)
    pairs = pairs and all(t.storage_offset() % 2 == 0 for t in tensors)
    choice = packed if pairs else wide
    tile = choice[0] | {"V": 2 if pairs else 1}
    steps, channels = tile["T"] * tile["S"], tile["C"] * tile["V"]
    n_tile, n_block = -(-length // steps), -(-width // channels)
    tile["FULL"] = length % steps == 0 and width % channels == 0
    if not (plain and tile["FULL"]):
        tile |= choice[1]
    zeros = tensors[0].new_zeros(1 + batch * n_tile * width, dtype=torch.int32)
    carry = zeros[1:].view(batch, n_tile, width)  # slot 0 is never written: a zero state
    sizes = [carry, zeros, length, width, n_tile, n_block]
    return batch * n_tile * n_block, sizes, carry[:, 0].view(torch.float32), tile


def _start(initial: Tensor | None, zero: Tensor) -> Tensor:
    return zero if initial is None else initial.float().contiguous()


def _steps(reset: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if reset is None else reset.stride()


def _channels(inputs: Tensor, *more: int) -> Tensor:
    return inputs.new_empty((inputs.shape[0], *more, inputs.shape[2]), dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@torch.library.custom_op("dsf::gated_scan", mutates_args=())
def _forward(
    inputs: Tensor, logit: Tensor, second: Tensor | None, rate: Tensor, reset: Tensor | None,
    initial: Tensor | None, complement: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    states, final = _like(inputs), _channels(inputs)
    if inputs.numel() == 0:
        return states, final.zero_() if initial is None else final.copy_(initial)
    given = [narrow(t, 1) for t in (inputs, logit, logit if second is None else second)]
    n_program, sizes, zero, tile = _plan(
        (*given, states), (FORWARD, FORWARD), (FORWARD_16, FORWARD_16), True
    )
    initial = _start(initial, zero)
    strides = [step for t in (*given, states) for step in t.stride()]
    with on_device(inputs):
        gated_kernel[(n_program,)](
            *given, rate.contiguous(), reset, initial, states, final, *sizes, initial.stride(0),
            *_steps(reset), *strides, RGLRU=second is not None, COMPLEMENT=complement,
            RESET=reset is not None, EXACT=inputs.dtype == torch.float32,
            **tile,
        )  # fmt: skip
    return states, final


@_forward.register_fake
def _(inputs, logit, second, rate, reset, initial, complement):
    return _like(inputs), _channels(inputs)


@torch.library.custom_op("dsf::gated_scan_adjoint", mutates_args=())
def _adjoint(
    inputs: Tensor, logit: Tensor, second: Tensor | None, rate: Tensor, reset: Tensor | None,
    initial: Tensor | None, states: Tensor, grads: Tensor, grad_final: Tensor | None,
    complement: bool, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = _like(inputs), _like(logit), _like(inputs[:0] if second is None else second)
    grad_initial = _channels(inputs)
    if inputs.numel() == 0:
        grad_initial = grad_initial.zero_()
        if grad_final is not None:
            grad_initial = grad_initial + grad_final
        return *found, torch.zeros_like(rate), grad_initial
    given = [narrow(t, 1) for t in (inputs, logit, logit if second is None else second)]
    states, grads = narrow(states, 1), narrow(grads, 1)
    read = (*given, states, grads)
    n_program, sizes, zero, tile = _plan(
        read, (ADJOINT, RAGGED), (ADJOINT_16, RAGGED_16), reset is None
    )
    initial, grad_final = _start(initial, zero), _start(grad_final, zero)
    part = _channels(inputs, sizes[4] if sums else 0)
    strides = [step for t in (*read, found[0]) for step in t.stride()]
    with on_device(inputs):
        gated_adjoint_kernel[(n_program,)](
            *given, rate.contiguous(), reset, states, grads, initial, grad_final, *found,
            grad_initial, part, *sizes, initial.stride(0), grad_final.stride(0), *_steps(reset),
            *strides, RGLRU=second is not None, COMPLEMENT=complement, RESET=reset is not None,
            EXACT=inputs.dtype == torch.float32, SUMS=sums, **tile,
        )  # fmt: skip
    return *found, part.sum((0, 1)), grad_initial


@_adjoint.register_fake
def _(inputs, logit, second, rate, reset, initial, states, grads, grad_final, complement, sums):
    last = _like(inputs[:0] if second is None else second)
    return _like(inputs), _like(logit), last, torch.empty_like(rate), _channels(inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.complement = inputs
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx, grads, grad_final):
    inputs, logit, second, rate, reset, initial, states = ctx.saved_tensors
    grads = torch.zeros_like(states) if grads is None else grads
    found = _adjoint(inputs, logit, second, rate, reset, initial, states, grads, grad_final,
                     ctx.complement, ctx.needs_input_grad[3])  # fmt: skip
    grad_inputs, grad_logit, grad_second, grad_rate, grad_initial = found
    return (
        grad_inputs, grad_logit, None if second is None else grad_second,
        grad_rate if ctx.needs_input_grad[3] else None, None,
        None if initial is None else grad_initial.to(initial), None,
    )  # fmt: skip


_forward.register_autograd(_backward, setup_context=_save)


def _run(function, inputs, logits, rates, initial_state, complement=False, reset=None):
    """Checks, and the operator on flat channels. logits, rates: {name: tensor}."""
    check_kind(function, {"inputs": inputs, **logits, **rates, "initial_state": initial_state})
    if inputs.dim() < 3:
        raise ValueError(
            f"dsf_kernels.{function}: inputs: expected axes (batch, time, channel...), "
            f"got {tuple(inputs.shape)}."
        )
    batch, length, *channels = inputs.shape
    own = {f"channel_{i}": n for i, n in enumerate(channels)}
    for name, tensor in logits.items():
        sizes = {"batch": batch, "time": length, **own}
        check_tensor(function, name, tensor, sizes, "sizes are fixed by inputs")
    check_type(function, "inputs", {"inputs": inputs, **logits})
    for name, tensor in rates.items():
        if tensor is not None:
            check_tensor(function, name, tensor, own, "sizes are fixed by inputs")
    if initial_state is not None:
        sizes = {"batch": batch, **own}
        check_tensor(function, "initial_state", initial_state, sizes, "sizes are fixed by inputs")
        initial_state = initial_state.reshape(batch, -1)
    if reset is not None:
        sizes = {"batch": batch, "time": length}
        check_tensor(function, "reset", reset, sizes, "sizes are fixed by inputs")
        reset = reset.to(device=inputs.device, dtype=torch.uint8)
    width = torch.Size(channels).numel()
    flat = [t.reshape(batch, length, width) for t in (inputs, *logits.values())]
    rate = next(iter(rates.values()))
    rate = inputs.new_zeros(width, dtype=torch.float32) if rate is None else rate.reshape(width)
    second = flat[2] if len(flat) == 3 else None
    states, final = _forward(
        flat[0], flat[1], second, rate.float(), reset, initial_state, complement
    )
    return states.reshape(inputs.shape), final.reshape(batch, *channels)


def gated_scan(
    logit: Tensor, inputs: Tensor, initial_state: Tensor | None = None,
    lower_bound: Tensor | None = None, *, complement: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All states, and the last, of h_t = a_t h_{t-1} + w_t u_t, a_t from a logit by a sigmoid.

    a_t = b + (1 - b) sigmoid(logit_t), b = `lower_bound` in [0, 1) (0 when None); w_t = 1, or
    1 - a_t with `complement`, taken from sigmoid(-logit_t) so that it keeps its digits where a_t
    is near 1; u = `inputs`, h_0 = `initial_state` (zero when None). HGRN (complement, bound),
    minGRU (complement), any recurrence with a log-sigmoid decay.

    Shapes: inputs, logit (batch, time, channel...), lower_bound (channel...), initial_state
    (batch, channel...); bf16, fp16 or fp32, one type for inputs and logit, any strides, time from
    0. Returns states like inputs and the final state in float32; the state is float32 throughout.
    Differentiable in all four tensors; for 16-bit inputs the gradient of the logit carries that
    type's rounding of h.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 3 passes over the data forward, 6 backward (7 where `lower_bound` is differentiated, in
    4 bytes per 64 steps and channel). Source: Qin et al. (2023), equations 4 to 7.
    """
    rates = {"lower_bound": lower_bound}
    return _run("gated_scan", inputs, {"logit": logit}, rates, initial_state, complement)


def rglru_scan(
    inputs: Tensor, recurrence_logit: Tensor, input_logit: Tensor, parameter: Tensor,
    initial_state: Tensor | None = None, *, reset: Tensor | None = None, c: float = 8.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All states, and the last, of the RG-LRU from its projections.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(i_t) x_t, log a_t = -c softplus(L) sigmoid(r_t),
    with x = `inputs`, r = `recurrence_logit`, i = `input_logit`, L = `parameter`, h_0 =
    `initial_state` (zero when None). 1 - a^2 is taken from log a, so that a slow decay keeps its
    digits; where it is exactly 0 its root has no gradient. A fast one knows log a_t to a few units
    of rounding, and so a_t to |log a_t| times as many. Where `reset` (batch, time) is True a
    document starts: a_t is exactly 0 and the root 1.

    Shapes: inputs and logits (batch, time, channel...), parameter (channel...), initial_state
    (batch, channel...); bf16, fp16 or fp32, one type for inputs and logits, any strides, time from
    0. Returns states like inputs and the final state in float32; the state is float32 throughout.
    Differentiable in all five tensors; for 16-bit inputs the gradients of recurrence_logit and
    parameter carry that type's rounding of h.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 4 passes over the data forward, 8 backward, and 4 bytes per 64 steps and channel.
    Source: De et al. (2024), equations 1 to 4.
    """
    check_kind("rglru_scan", {"parameter": parameter})
    logits = {"recurrence_logit": recurrence_logit, "input_logit": input_logit}
    rates = {"parameter": c * softplus(parameter.float())}
    return _run("rglru_scan", inputs, logits, rates, initial_state, reset=reset)
