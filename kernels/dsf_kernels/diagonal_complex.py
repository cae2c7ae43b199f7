"""Complex elementwise linear recurrence, channels last, in one pass over the data.

The decay comes as log modulus and phase, so that long products stay on or inside the unit circle
and -inf gives an exact zero. Inputs and states are complex64; the kernels see the float32 pairs.
"""

import torch
from torch import Tensor

from dsf_kernels.diagonal_complex_kernels import _adjoint_kernel, _scan_kernel
from dsf_kernels.launch import check_kind, check_tensor, narrow, on_device

# T, S, C: steps of a warp, warps, channels. Half the steps of real numbers: twice the registers.
FORWARD = {"T": 16, "S": 8, "C": 32, "num_warps": 8, "maxnreg": 128}
ADJOINT = {"T": 8, "S": 8, "C": 32, "num_warps": 8, "maxnreg": 128}


def _plan(inputs: Tensor, tile: dict) -> tuple[int, list, Tensor, dict]:
    """Programs; carries, ticket and sizes as the kernels take them; a zero state; the tile."""
    batch, length, width = inputs.shape
    n_tile = -(-length // (tile["T"] * tile["S"]))
    n_block = -(-width // tile["C"])
    full = length % (tile["T"] * tile["S"]) == 0 and width % tile["C"] == 0
    words = torch.zeros(4 + batch * n_tile * width * 2, dtype=torch.int32, device=inputs.device)
    carry = words[4:].view(batch, n_tile, width, 2)  # slot 0 is never written: a zero state
    sizes = [carry, words, length, width, n_tile, n_block]
    zero = carry[:, 0].view(torch.float32)
    return batch * n_tile * n_block, sizes, zero, tile | {"FULL": full}


def _pairs(x: Tensor) -> Tensor:
    """The numbers as float32 pairs, a view unless lazily conjugated."""
    return torch.view_as_real(x.resolve_conj())


def _packed(x: Tensor | None, zero: Tensor) -> Tensor:
    """A state as pairs without gaps."""
    return zero if x is None else _pairs(x).contiguous()


def _numbers(*tensors: Tensor) -> list[int]:
    """Strides of batch, time and channel, in whole numbers."""
    return [step for tensor in tensors for step in tensor.stride()]


@torch.library.custom_op("dsf::complex_diagonal_scan", mutates_args=())
def _forward(
    log_modulus: Tensor, phase: Tensor, inputs: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    states = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    final = inputs.new_zeros((inputs.shape[0], inputs.shape[2]))
    if inputs.numel() == 0:
        return states, final if initial is None else final + initial
    log_modulus, phase, inputs = (
        narrow(x, 1) for x in (log_modulus, phase, inputs.resolve_conj())
    )
    n_program, sizes, zero, tile = _plan(inputs, FORWARD)
    start = _packed(initial, zero)
    with on_device(inputs):
        _scan_kernel[(n_program,)](
            log_modulus, phase, _pairs(inputs), start, _pairs(states), _pairs(final), *sizes,
            start.stride(0), *_numbers(log_modulus, phase, inputs, states), **tile,
        )  # fmt: skip
    return states, final


@torch.library.custom_op("dsf::complex_diagonal_scan_adjoint", mutates_args=())
def _adjoint(
    log_modulus: Tensor, phase: Tensor, states: Tensor, initial: Tensor | None, grads: Tensor,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = states.shape
    grad_inputs = torch.empty(shape, dtype=states.dtype, device=states.device)
    grad_modulus = torch.empty(shape, dtype=torch.float32, device=states.device)
    grad_phase = torch.empty_like(grad_modulus)
    grad_initial = states.new_zeros((shape[0], shape[2]))
    if states.numel() == 0:
        grad_initial = grad_initial if grad_final is None else grad_initial + grad_final
        return grad_modulus, grad_phase, grad_inputs, grad_initial
    log_modulus, phase, grads = (narrow(x, 1) for x in (log_modulus, phase, grads.resolve_conj()))
    n_program, sizes, zero, tile = _plan(states, ADJOINT)
    start, end = _packed(initial, zero), _packed(grad_final, zero)
    with on_device(states):
        _adjoint_kernel[(n_program,)](
            log_modulus, phase, _pairs(states), _pairs(grads), start, end, grad_modulus,
            grad_phase, _pairs(grad_inputs), _pairs(grad_initial), *sizes, start.stride(0),
            end.stride(0), *_numbers(log_modulus, phase, states, grads, grad_inputs), **tile,
        )  # fmt: skip
    return grad_modulus, grad_phase, grad_inputs, grad_initial


@_forward.register_fake
def _(log_modulus, phase, inputs, initial):
    states = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    return states, inputs.new_empty((inputs.shape[0], inputs.shape[2]))


@_adjoint.register_fake
def _(log_modulus, phase, states, initial, grads, grad_final):
    real = torch.empty(states.shape, dtype=torch.float32, device=states.device)
    numbers = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    return real, torch.empty_like(real), numbers, states.new_empty(states[:, :1].squeeze(1).shape)


def _save(ctx, inputs, output):
    log_modulus, phase, _, initial = inputs
    ctx.save_for_backward(log_modulus, phase, output[0], initial)


def _backward(ctx, grads, grad_final):
    log_modulus, phase, states, initial = ctx.saved_tensors
    if grads is None:
        grads = torch.zeros_like(states)
    *found, grad_initial = _adjoint(log_modulus, phase, states, initial, grads, grad_final)
    return *found, None if initial is None else grad_initial


_forward.register_autograd(_backward, setup_context=_save)


def _check(function, log_modulus, phase, inputs, initial_state):
    decays = {"log_modulus": log_modulus, "phase": phase}
    numbers = {"inputs": inputs, "initial_state": initial_state}
    for names, dtype in ((decays, torch.float32), (numbers, torch.complex64)):
        for name, tensor in names.items():
            if tensor is not None and tensor.dtype != dtype:
                raise TypeError(
                    f"dsf_kernels.{function}: {name}: expected {dtype}, got {tensor.dtype}."
                )
    parts = {k: v if v is None else v.real for k, v in numbers.items()}
    check_kind(function, decays | parts)
    sizes = dict.fromkeys(("batch", "time", "channel"))
    check_tensor(function, "inputs", inputs, sizes, "any sizes")
    sizes = dict(zip(sizes, inputs.shape, strict=True))
    for name, tensor in decays.items():
        free = {k: None if tensor.dim() == 3 and tensor.shape[i] == 1 else v
                for i, (k, v) in enumerate(sizes.items())}  # fmt: skip
        check_tensor(function, name, tensor, free, "sizes are fixed by inputs, size 1 broadcasts")
    if initial_state is not None:
        del sizes["time"]
        check_tensor(function, "initial_state", initial_state, sizes, "sizes are fixed by inputs")


def complex_diagonal_scan(
    log_modulus: Tensor, phase: Tensor, inputs: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All states, and the last, of h_t = a_t h_{t-1} + b_t, each channel by itself.

    a = exp(l + i p) with l = `log_modulus` (-inf: a is exactly 0) and p = `phase` in radians,
    |p| < 8192; b = `inputs`, h_0 = `initial_state` (zero when None).

    Shapes: inputs (batch, time, channel) complex64; log_modulus, phase the same or size 1 to
    broadcast, float32; initial_state (batch, channel) complex64; any strides, time from 0.
    Returns states like inputs and the final state (batch, channel), complex64. Differentiable in
    all four tensors (torch's convention: d/d re + i d/d im); where a is 0 the gradients of l and p
    are 0. Each a_t is rounded once: errors grow with the steps that the state remembers.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 24 bytes a step and channel forward, 40 backward; memory beside the results: 8 bytes per
    128 steps and channel. Source: kernels/README.md.
    """
    _check("complex_diagonal_scan", log_modulus, phase, inputs, initial_state)
    shape = inputs.shape
    return _forward(log_modulus.expand(shape), phase.expand(shape), inputs, initial_state)
