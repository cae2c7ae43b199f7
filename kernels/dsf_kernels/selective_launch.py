"""How the passes of selective_scan are launched: tiles, segments, memory, sums over programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import INTERPRETED, narrow, on_device
from dsf_kernels.selective_adjoint import adjoint_kernel
from dsf_kernels.selective_kernels import connect_kernel, forward_kernel

TILE = {"T": 16}  # steps of a tile
# Channels of a program, all of one group: a lane each, 32 a warp.
WIDE = {"C": 128, "num_warps": 4}
NARROW = {"C": 32, "num_warps": 1}
UNROLL = 4  # states of the forward pass in flight
ROWS = 16  # states whose sums over channels are gathered before they are stored
SEGMENT = {"narrow": 256, "wide": 4096, "channels": 4096}  # steps; wide from so many channels
SEGMENTED = (torch.bfloat16,)  # cut for these types alone: others not yet seen on a GPU
BLOCK = 512


@triton.jit
def _sum_kernel(parts, total, size, n_part, BLOCK: tl.constexpr):
    """Sum over the parts (lane, part, size) in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    n_block = tl.cdiv(size, BLOCK)
    lane, place = program // n_block, program % n_block * BLOCK + tl.arange(0, BLOCK)
    parts += lane * n_part * size
    value = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_part):
        value += tl.load(parts + place, place < size, other=0.0)
        parts += size
    tl.store(total + lane * size + place, value, place < size)


def _sum_parts(parts: Tensor) -> Tensor:
    """(lane, part, size) summed over part."""
    n_lane, n_part, size = parts.shape
    total = parts.new_empty((n_lane, size))
    grid = (n_lane * -(-size // BLOCK),)
    _sum_kernel[grid](parts, total, size, n_part, BLOCK=BLOCK)
    return total


def _pairs(B: Tensor, C: Tensor) -> Tensor:
    """B and C as float32 side by side, one 64-bit word a state: (batch, group, time, state)."""
    batch, length, n_group, n_state = B.shape
    pairs = B.new_empty((batch, n_group, length, n_state, 2), dtype=torch.float32)
    pairs[..., 0] = B.transpose(1, 2)
    pairs[..., 1] = C.transpose(1, 2)
    return pairs.view(torch.int64)


def _sizes(u: Tensor, B: Tensor) -> tuple[int, int, list, dict]:
    """Programs; segments of a row; sizes as both kernels take them; constants of the tile.

    Long rows are cut in segments that run side by side. Where, depends on the length, width and
    type alone: a row by itself gives the bits that it gives in a batch.
    """
    batch, length, channels = u.shape
    n_group = B.shape[2]
    width = channels // n_group
    tile = TILE | (WIDE if width >= WIDE["C"] else NARROW)
    steps = SEGMENT["wide" if channels >= SEGMENT["channels"] else "narrow"]
    steps = steps if u.dtype in SEGMENTED else max(1, length)
    n_segment, n_tile = max(1, -(-length // steps)), -(-min(steps, length) // tile["T"])
    n_block = -(-width // tile["C"])
    full = length % tile["T"] == 0 and width % tile["C"] == 0
    constants = {"FULL": full, "EXACT": u.dtype == torch.float32, "N": B.shape[3]}
    constants["n_channel"] = channels
    sizes = [length, width, n_tile, n_segment, n_block, n_group, 1]
    return batch * n_segment * n_group * n_block, n_segment, sizes, tile | constants


def room(u: Tensor, B: Tensor, save: bool) -> Tensor:
    """Memory for the states before every tile of the adjoint: (program, tile, state, lane)."""
    programs, _, sizes, tile = _sizes(u, B)
    shape = (programs, sizes[2] if save else 0, B.shape[3], tile["C"])
    return u.new_empty(shape, dtype=torch.float32)


def _flags(D: Tensor | None, bias: Tensor | None, z: Tensor | None, softplus: bool) -> dict:
    return {"SKIP": D is not None, "BIAS": bias is not None, "GATE": z is not None,
            "SOFTPLUS": softplus}  # fmt: skip


def _strides(**tensors: Tensor) -> dict:
    """{name_b, name_t, name_c: stride}."""
    return {f"{name}_{axis}": step for name, tensor in tensors.items()
            for axis, step in zip("btc", tensor.stride(), strict=True)}  # fmt: skip


def _float(tensor: Tensor | None, default: Tensor) -> Tensor:
    return default if tensor is None else tensor.float().contiguous()


def _fold(states: Tensor, span: Tensor, rates: Tensor, outer: Tensor, reverse: bool) -> None:
    batch, n_segment, n_state, channels = states.shape
    size = n_state * channels
    connect_kernel[(batch * -(-size // BLOCK),)](
        states, span, rates, outer, n_segment, size, channels, REVERSE=reverse, BLOCK=BLOCK
    )


def _connect(run, outer: Tensor, rates: Tensor, n_segment: int, reverse: bool) -> Tensor:
    """Run segments from their right first states; `outer` (batch, state, channel) takes the last.

    run(states, span, summary) replaces states (batch, segment, state, channel), the first of each
    segment, by the last ones.
    """
    batch, n_state, channels = outer.shape
    if n_segment == 1:
        run(outer, outer, False)
        return outer
    states = outer.new_zeros((batch, n_segment, n_state, channels))
    span = outer.new_empty((batch, n_segment, 2, channels))
    run(states, span, True)
    _fold(states, span, rates, outer, reverse)
    run(states, span, False)
    last = states[:, 0 if reverse else -1]
    return last.clone(memory_format=torch.contiguous_format)


def _forward_pass(u, step, A, B, C, D, bias, z, out, ungated, saved, softplus):
    """run(states, span, summary) of `_connect`, the rates (state, channel), segments of a row."""
    rates = A.float().mT.contiguous()
    skip, shift, pairs = _float(D, rates), _float(bias, rates), _pairs(B, C)
    u, step = narrow(u, 1), narrow(step, 1)
    gate = u if z is None else narrow(z, 1)
    programs, n_segment, sizes, tile = _sizes(u, B)
    save = saved.shape[1] > 0

    def run(states, span, summary):
        forward_kernel[(programs,)](
            u, step, gate, rates, pairs, skip, shift, states, span, out, ungated, saved, *sizes,
            **_strides(u=u, s=step, z=gate), **_flags(D, bias, z, softplus),
            SAVE=save and not summary, SUMMARY=summary, UNROLL=UNROLL, **tile,
        )  # fmt: skip

    return run, rates, n_segment


def launch_forward(u, step, A, B, C, D, bias, z, initial, softplus, save):
    """Outputs, final state (batch, state, channel), outputs before the gate, saved states."""
    like = {"dtype": u.dtype, "device": u.device}
    out = torch.empty(u.shape, **like)
    ungated = torch.empty((0,) if z is None else u.shape, **like)
    state, saved = first_state(u, A, initial), room(u, B, save)
    if u.numel():
        with on_device(u):
            run, rates, n_segment = _forward_pass(
                u, step, A, B, C, D, bias, z, out, ungated, saved, softplus
            )
            state = _connect(run, state, rates, n_segment, False)
    return out, state, ungated, saved


def launch_summary(u, step, A, B, bias, softplus):
    """The sum of Delta (batch, channel), float64, and the last state from zero."""
    end = first_state(u, A, None)
    if u.numel() == 0:
        return end.new_zeros((u.shape[0], u.shape[2]), dtype=torch.float64), end
    with on_device(u):
        run, rates, n_segment = _forward_pass(
            u, step, A, B, B, None, bias, None, u, u, room(u, B, False), softplus
        )
        states = end.new_zeros((end.shape[0], n_segment, *end.shape[1:]))
        span = end.new_empty((u.shape[0], n_segment, 2, u.shape[2]))
        run(states, span, True)
        _fold(states, span, rates, end, False)
    return span.double().sum((1, 2)), end


def first_state(u: Tensor, A: Tensor, initial: Tensor | None) -> Tensor:
    """A copy of the initial state, or zeros, float32, (batch, state, channel)."""
    state = u.new_zeros((u.shape[0], A.shape[1], u.shape[2]), dtype=torch.float32)
    return state if initial is None else state.copy_(initial.mT)


def empty_grads(u, step, A, B, z):
    """Memory for the results of the adjoint, in the types of the kernels."""
    batch, length, channels = u.shape
    floats = {"dtype": torch.float32, "device": u.device}
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(u.shape, dtype=step.dtype, device=u.device),
        torch.empty((channels, A.shape[1]), **floats),
        torch.empty((batch, length, B.shape[2], 2, B.shape[3]), **floats),
        torch.empty((2, channels), **floats),
        torch.empty(u.shape if z is not None else (0,), dtype=u.dtype, device=u.device),
        torch.empty((batch, A.shape[1], channels), **floats),
    )


def launch_adjoint(u, step, A, B, C, D, bias, z, ungated, saved, grad, grad_final, softplus):
    """Gradients of u, step, A, (B, C), (D, bias), z, initial state (batch, state, channel)."""
    batch, length, channels = u.shape
    n_group, n_state = B.shape[2:]
    grad_u, grad_step, _, _, _, grad_z, outer = empty_grads(u, step, A, B, z)
    if grad_final is None:
        outer.zero_()
    else:
        outer.copy_(grad_final)
    programs, n_segment, sizes, tile = _sizes(u, B)
    rates = A.float().mT.contiguous()
    grad_rates = outer.new_zeros((batch * n_segment, n_state, channels))
    ends = outer.new_zeros((batch * n_segment, 2, channels))
    sums = outer.new_zeros((batch, n_group, 0 if u.numel() else length, 2, n_state))
    if u.numel():
        skip, shift, pairs = _float(D, rates), _float(bias, rates), _pairs(B, C)
        u, step, grad = narrow(u, 1), narrow(step, 1), narrow(grad, 1)
        gate = u if z is None else narrow(z, 1)
        parts = outer.new_empty((batch * n_group, sizes[4], length * 2 * n_state))
        coarse = tl.float32 if INTERPRETED else tl.bfloat16  # its bf16 products are wrong
        mix = {torch.bfloat16: coarse, torch.float16: tl.float32}.get(u.dtype)

        def run(states, span, summary):
            adjoint_kernel[(programs,)](
                u, step, gate, ungated, grad, rates, pairs, skip, shift, saved, span, states,
                grad_rates, grad_u, grad_step, grad_z, parts, ends, *sizes,
                **_strides(u=u, s=step, z=gate, g=grad), **_flags(D, bias, z, softplus),
                MIX=mix, SUMMARY=summary, ROWS=ROWS, num_stages=1, **tile,
            )  # fmt: skip

        with on_device(u):
            outer = _connect(run, outer, rates, n_segment, True)
            sums = _sum_parts(parts).view(batch, n_group, length, 2, n_state)
    return (
        grad_u, grad_step, grad_rates.sum(0).mT.contiguous(), sums.transpose(1, 2).contiguous(),
        ends.sum(0), grad_z, outer,
    )  # fmt: skip
