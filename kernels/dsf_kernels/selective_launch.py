"""How the passes of selective_scan are launched: tiles, segments, memory, sums over programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import INTERPRETED, narrow, on_device
from dsf_kernels.selective_adjoint import adjoint_kernel
from dsf_kernels.selective_kernels import forward_kernel
from dsf_kernels.selective_segments import Segments, connect, fold
from dsf_kernels.sequences import count_rows, results

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


def _steps(u: Tensor) -> int:
    """Steps of a segment: long rows are cut in segments that run side by side.

    Where, depends on the length, width and type alone: a row by itself gives the bits that it
    gives in a batch.
    """
    if u.dtype not in SEGMENTED:
        return max(1, u.shape[1])
    return SEGMENT["wide" if u.shape[2] >= SEGMENT["channels"] else "narrow"]


def _sizes(u: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, list, dict]:
    """Programs; segments of a row; sizes as both kernels take them; constants of the tile."""
    batch, length, channels = u.shape
    n_group = B.shape[2]
    width = channels // n_group
    tile = TILE | (WIDE if width >= WIDE["C"] else NARROW)
    steps = _steps(u)
    n_segment, n_tile = max(1, -(-length // steps)), -(-min(steps, length) // tile["T"])
    n_block = -(-width // tile["C"])
    full = length % tile["T"] == 0 and width % tile["C"] == 0 and cu_seqlens is None
    constants = {"FULL": full, "EXACT": u.dtype == torch.float32, "N": B.shape[3]}
    constants["n_channel"] = channels
    between = n_segment
    if cu_seqlens is not None:  # as Sequences
        count = count_rows(u, cu_seqlens)
        n_segment, between = length // steps + count, length // tile["T"] + count
    sizes = [length, width, n_tile, between, n_block, n_group, 1]
    return batch * n_segment * n_group * n_block, n_segment, sizes, tile | constants


def _segments(u: Tensor, cu_seqlens: Tensor | None) -> Segments | None:
    if cu_seqlens is None:
        return None
    return Segments(cu_seqlens, u.shape[1], _steps(u), TILE["T"])


def _connected(run, outer, rates, n_segment, reverse, packed: Segments | None) -> Tensor:
    if packed is None:
        return connect(run, outer, rates, n_segment, reverse)
    return packed.connect(run, outer, rates, reverse)


def room(u: Tensor, B: Tensor, save: bool, cu_seqlens: Tensor | None = None) -> Tensor:
    """Memory for the states before every tile of the adjoint: (program, tile, state, lane); of a
    packed row (block, tile, state, lane)."""
    programs, n_segment, sizes, tile = _sizes(u, B, cu_seqlens)
    n_tile = sizes[2]
    if cu_seqlens is not None:
        programs, n_tile = programs // max(1, n_segment), sizes[3]
    shape = (programs, n_tile if save else 0, B.shape[3], tile["C"])
    return u.new_empty(shape, dtype=torch.float32)


def _empty(u: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether there is nothing to run."""
    return u.numel() == 0 or count_rows(u, cu_seqlens) == 0


def _flags(D: Tensor | None, bias: Tensor | None, z: Tensor | None, softplus: bool) -> dict:
    return {"SKIP": D is not None, "BIAS": bias is not None, "GATE": z is not None,
            "SOFTPLUS": softplus}  # fmt: skip


def _strides(**tensors: Tensor) -> dict:
    """{name_b, name_t, name_c: stride}."""
    return {f"{name}_{axis}": step for name, tensor in tensors.items()
            for axis, step in zip("btc", tensor.stride(), strict=True)}  # fmt: skip


def _float(tensor: Tensor | None, default: Tensor) -> Tensor:
    return default if tensor is None else tensor.float().contiguous()


def _forward_pass(u, step, A, B, C, D, bias, z, out, ungated, saved, softplus, cu_seqlens=None):
    """run(states, span, summary) of `connect`, the rates (state, channel), segments of a row, and
    those of packed sequences."""
    rates = A.float().mT.contiguous()
    skip, shift, pairs = _float(D, rates), _float(bias, rates), _pairs(B, C)
    u, step = narrow(u, 1), narrow(step, 1)
    gate = u if z is None else narrow(z, 1)
    programs, n_segment, sizes, tile = _sizes(u, B, cu_seqlens)
    packed, save = _segments(u, cu_seqlens), saved.shape[1] > 0
    table = None if packed is None else packed.table

    def run(states, span, summary):
        forward_kernel[(programs,)](
            u, step, gate, rates, pairs, skip, shift, states, span, out, ungated, saved, table,
            *sizes, **_strides(u=u, s=step, z=gate), **_flags(D, bias, z, softplus),
            SAVE=save and not summary, SUMMARY=summary, UNROLL=UNROLL, **tile,
        )  # fmt: skip

    return run, rates, n_segment, packed


def launch_forward(u, step, A, B, C, D, bias, z, initial, softplus, save, cu_seqlens=None):
    """Outputs, final state (row, state, channel), outputs before the gate, saved states."""
    out = results(u, cu_seqlens, u.shape)
    ungated = u.new_empty((0,) if z is None else u.shape)
    state, saved = first_state(u, A, initial, cu_seqlens), room(u, B, save, cu_seqlens)
    if not _empty(u, cu_seqlens):
        with on_device(u):
            run, rates, n_segment, packed = _forward_pass(
                u, step, A, B, C, D, bias, z, out, ungated, saved, softplus, cu_seqlens
            )
            state = _connected(run, state, rates, n_segment, False, packed)
    return out, state, ungated, saved


def launch_summary(u, step, A, B, bias, softplus):
    """The sum of Delta (batch, channel), float64, and the last state from zero."""
    end = first_state(u, A, None)
    if u.numel() == 0:
        return end.new_zeros((u.shape[0], u.shape[2]), dtype=torch.float64), end
    with on_device(u):
        run, rates, n_segment, _ = _forward_pass(
            u, step, A, B, B, None, bias, None, u, u, room(u, B, False), softplus
        )
        states = end.new_zeros((end.shape[0], n_segment, *end.shape[1:]))
        span = end.new_empty((u.shape[0], n_segment, 2, u.shape[2]))
        run(states, span, True)
        fold(states, span, rates, end, False)
    return span.double().sum((1, 2)), end


def first_state(
    u: Tensor, A: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """A copy of the initial state, or zeros, float32, (row, state, channel)."""
    shape = count_rows(u, cu_seqlens), A.shape[1], u.shape[2]
    state = u.new_zeros(shape, dtype=torch.float32)
    return state if initial is None else state.copy_(initial.mT)


def empty_grads(u, step, A, B, z, cu_seqlens=None):
    """Memory for the results of the adjoint, in the types of the kernels."""
    batch, length, channels = u.shape
    floats = {"dtype": torch.float32, "device": u.device}
    return (
        results(u, cu_seqlens, u.shape),
        results(step, cu_seqlens, u.shape),
        torch.empty((channels, A.shape[1]), **floats),
        torch.empty((batch, length, B.shape[2], 2, B.shape[3]), **floats),
        torch.empty((2, channels), **floats),
        results(u, cu_seqlens, u.shape if z is not None else (0,)),
        torch.empty((count_rows(u, cu_seqlens), A.shape[1], channels), **floats),
    )


def launch_adjoint(u, step, A, B, C, D, bias, z, ungated, saved, grad, grad_final, softplus,
                   cu_seqlens=None):  # fmt: skip
    """Gradients of u, step, A, (B, C), (D, bias), z, initial state (row, state, channel)."""
    batch, length, channels = u.shape
    n_group, n_state = B.shape[2:]
    empty = _empty(u, cu_seqlens)
    grad_u, grad_step, _, _, _, grad_z, outer = empty_grads(u, step, A, B, z, cu_seqlens)
    if grad_final is None:
        outer.zero_()
    else:
        outer.copy_(grad_final)
    programs, n_segment, sizes, tile = _sizes(u, B, cu_seqlens)
    rates = A.float().mT.contiguous()
    grad_rates = outer.new_zeros((batch * n_segment, n_state, channels))
    ends = outer.new_zeros((batch * n_segment, 2, channels))
    sums = outer.new_zeros((batch, n_group, length if empty else 0, 2, n_state))
    if not empty:
        skip, shift, pairs = _float(D, rates), _float(bias, rates), _pairs(B, C)
        u, step, grad = narrow(u, 1), narrow(step, 1), narrow(grad, 1)
        gate = u if z is None else narrow(z, 1)
        parts = (batch * n_group, sizes[4], length * 2 * n_state)
        parts = results(outer, cu_seqlens, parts)
        coarse = tl.float32 if INTERPRETED else tl.bfloat16  # its bf16 products are wrong
        mix = {torch.bfloat16: coarse, torch.float16: tl.float32}.get(u.dtype)
        packed = _segments(u, cu_seqlens)
        table = None if packed is None else packed.table

        def run(states, span, summary):
            adjoint_kernel[(programs,)](
                u, step, gate, ungated, grad, rates, pairs, skip, shift, saved, span, states,
                grad_rates, grad_u, grad_step, grad_z, parts, ends, table, *sizes,
                **_strides(u=u, s=step, z=gate, g=grad), **_flags(D, bias, z, softplus),
                MIX=mix, SUMMARY=summary, ROWS=ROWS, num_stages=1, **tile,
            )  # fmt: skip

        with on_device(u):
            outer = _connected(run, outer, rates, n_segment, True, packed)
            sums = _sum_parts(parts).view(batch, n_group, length, 2, n_state)
    return (
        grad_u, grad_step, grad_rates.sum(0).mT.contiguous(), sums.transpose(1, 2).contiguous(),
        ends.sum(0), grad_z, outer,
    )  # fmt: skip
