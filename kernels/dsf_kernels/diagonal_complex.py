"""Complex elementwise linear recurrence, channels last, in one pass over the data.

The decay comes as log modulus and phase, so that long products stay on or inside the unit circle
and -inf gives an exact zero. Inputs and states are complex64; the kernels see the float32 pairs.
"""

import torch
from torch import Tensor

from dsf_kernels.diagonal_complex_kernels import _adjoint_kernel, _scan_kernel
from dsf_kernels.launch import check_kind, check_tensor, narrow, on_device
from dsf_kernels.sequences import Sequences, check_sequences, count_rows, placed, results

# T, S, C: steps of a warp, warps, channels. Half the steps of real numbers: twice the registers.
FORWARD = {"T": 16, "S": 8, "C": 32, "num_warps": 8, "maxnreg": 128}
ADJOINT = {"T": 8, "S": 8, "C": 32, "num_warps": 8, "maxnreg": 128}


def _plan(inputs: Tensor, tile: dict, cu_seqlens: Tensor | None) -> tuple[int, list, Tensor, dict]:
    """Programs; tiles, carries, ticket and sizes as the kernels take them; a zero state; the
    tile."""
    batch, length, width = inputs.shape
    steps, table = tile["T"] * tile["S"], None
    n_tile, n_block = -(-length // steps), -(-width // tile["C"])
    full = length % steps == 0 and width % tile["C"] == 0 and cu_seqlens is None
    if cu_seqlens is not None:
        sequences = Sequences(cu_seqlens, length, steps)
        n_tile, table = sequences.bound, sequences.tiles()
    words = torch.zeros(4 + batch * n_tile * width * 2, dtype=torch.int32, device=inputs.device)
    carry = words[4:].view(batch, n_tile, width, 2)  # slot 0 is never written: a zero state
    sizes = [table, carry, words, length, width, n_tile, n_block]
    zero = carry[:, 0].view(torch.float32).expand(count_rows(inputs, cu_seqlens), -1, -1)
    return batch * n_tile * n_block, sizes, zero, tile | {"FULL": full}


def _edge(like: Tensor, given: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Room for a state (row, channel) that is the given one, or 0, where no kernel writes it."""
    zero = like.new_zeros((count_rows(like, cu_seqlens), like.shape[2]))
    return zero if given is None else zero + given


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
    log_modulus: Tensor, phase: Tensor, inputs: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    states = results(inputs, cu_seqlens, inputs.shape)
    final = _edge(inputs, initial, cu_seqlens)
    if inputs.numel() == 0 or final.shape[0] == 0:
        return states, final
    log_modulus, phase, inputs = (
        narrow(x, 1) for x in (log_modulus, phase, inputs.resolve_conj())
    )
    n_program, sizes, zero, tile = _plan(inputs, FORWARD, cu_seqlens)
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
    grad_final: Tensor | None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_inputs = results(states, cu_seqlens, states.shape)
    grad_modulus, grad_phase = (
        results(states, cu_seqlens, states.shape, torch.float32) for _ in range(2)
    )
    grad_initial = _edge(states, grad_final, cu_seqlens)
    if states.numel() == 0 or grad_initial.shape[0] == 0:
        return grad_modulus, grad_phase, grad_inputs, grad_initial
    log_modulus, phase, grads = (narrow(x, 1) for x in (log_modulus, phase, grads.resolve_conj()))
    n_program, sizes, zero, tile = _plan(states, ADJOINT, cu_seqlens)
    start, end = _packed(initial, zero), _packed(grad_final, zero)
    with on_device(states):
        _adjoint_kernel[(n_program,)](
            log_modulus, phase, _pairs(states), _pairs(grads), start, end, grad_modulus,
            grad_phase, _pairs(grad_inputs), _pairs(grad_initial), *sizes, start.stride(0),
            end.stride(0), *_numbers(log_modulus, phase, states, grads, grad_inputs), **tile,
        )  # fmt: skip
    return grad_modulus, grad_phase, grad_inputs, grad_initial


@_forward.register_fake
def _(log_modulus, phase, inputs, initial, cu_seqlens=None):
    final = inputs.new_empty((count_rows(inputs, cu_seqlens), inputs.shape[2]))
    return inputs.new_empty(inputs.shape), final


@_adjoint.register_fake
def _(log_modulus, phase, states, initial, grads, grad_final, cu_seqlens=None):
    real = states.new_empty(states.shape, dtype=torch.float32)
    first = states.new_empty((count_rows(states, cu_seqlens), states.shape[2]))
    return real, torch.empty_like(real), states.new_empty(states.shape), first


def _save(ctx, inputs, output):
    log_modulus, phase, _, initial, cu_seqlens = inputs
    ctx.save_for_backward(log_modulus, phase, output[0], initial, cu_seqlens)


def _backward(ctx, grads, grad_final):
    log_modulus, phase, states, initial, cu_seqlens = ctx.saved_tensors
    if grads is None:
        grads = torch.zeros_like(states)
    *found, grad_initial = _adjoint(
        log_modulus, phase, states, initial, grads, grad_final, cu_seqlens
    )
    return *found, None if initial is None else grad_initial, None


_forward.register_autograd(_backward, setup_context=_save)


def _check(function, log_modulus, phase, inputs, initial_state, cu_seqlens):
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
    del sizes["time"]
    if cu_seqlens is not None:
        del sizes["batch"]
        check_sequences(function, cu_seqlens, inputs, initial_state, sizes, "inputs")
    elif initial_state is not None:
        check_tensor(function, "initial_state", initial_state, sizes, "sizes are fixed by inputs")


def complex_diagonal_scan(
    log_modulus: Tensor,
    phase: Tensor,
    inputs: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states, and the last, of h_t = a_t h_{t-1} + b_t, each channel by itself.

    a = exp(l + i p) with l = `log_modulus` (-inf: a is exactly 0) and p = `phase` in radians,
    |p| < 8192; b = `inputs`, h_0 = `initial_state` (zero when None).

    cu_seqlens (n + 1,): n sequences packed along time in one row, each with its own initial and
    final state (n, channel), as in `scalar_decay_scan`, with its errors.

    Shapes: inputs (batch, time, channel) complex64; log_modulus, phase the same or size 1 to
    broadcast, float32; initial_state (batch, channel) complex64; any strides, time from 0.
    Returns states like inputs and the final state (batch, channel), complex64. Differentiable in
    all four tensors (torch's convention: d/d re + i d/d im); where a is 0 the gradients of l and p
    are 0. Each a_t is rounded once: errors grow with the steps that the state remembers.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 24 bytes a step and channel forward, 40 backward; memory beside the results: 8 bytes per
    128 steps and channel. Source: kernels/README.md.
    """
    given = log_modulus, phase, inputs, initial_state
    _check("complex_diagonal_scan", *given, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = placed("complex_diagonal_scan", cu_seqlens, inputs)
    shape = inputs.shape
    return _forward(
        log_modulus.expand(shape), phase.expand(shape), inputs, initial_state, cu_seqlens
    )
