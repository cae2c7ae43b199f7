"""Elementwise linear recurrence, channels last, in one pass over the data.

A tile is C channels by S x T steps, held in registers: each of S warps owns T consecutive steps,
one channel a lane (the compiler lays the first axis of a tile along the lanes, as no stride is
known to be 1), so the loop over T needs no communication. The S totals are combined across
the warps, the tile waits for the state that its predecessor in time publishes, publishes its
own, and only then applies and stores. Tiles are numbered by a ticket, so a predecessor has
always started: no deadlock. The order of every sum is fixed: results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.combine import along, enter, leave, read, within
from dsf_kernels.launch import check_kind, check_tensor, narrow, on_device

LANES = 32
# Tiles measured best on H100 and H200. T, S: steps of a warp, warps; V (below): channels a lane.
FORWARD = {"T": 32, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 112}
ADJOINT = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 80}
FORWARD_16 = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 112}
ADJOINT_16 = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 128}


@triton.jit
def _place(ticket, n_tile, n_block):
    """Tile, batch, and channel block of this program; tiles in time vary slowest."""
    ticket = tl.atomic_add(ticket, 1, sem="relaxed").to(tl.int64)
    n_lane = tl.num_programs(0) // n_tile
    lane = ticket % n_lane
    return ticket // n_lane, lane // n_block, lane % n_block


@triton.jit(do_not_specialize=["length", "n_tile", "decay_c", "inputs_c", "states_c"])
def _scan_kernel(decay, inputs, initial, states, final, carry, ticket,
                 length, width, n_tile, n_block, initial_b,
                 decay_b, decay_t, decay_c, inputs_b, inputs_t, inputs_c,
                 states_b, states_t, states_c, LOG: tl.constexpr, STORE: tl.constexpr,
                 FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
                 V: tl.constexpr):  # fmt: skip
    """Forward: h = a h + b. The grid is one program a tile."""
    tile, batch, block = _place(ticket, n_tile, n_block)
    start = tile * T * S
    time = tl.arange(0, S)[None, :, None, None] * T + tl.arange(0, T)[None, None, :, None]
    lane = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    keep = lane < width - block * (C * V)
    channel = lane[:, None, None, :]
    if FULL:
        mask = (time >= 0) & (channel >= 0)
    else:
        inside = tl.minimum(length - start, T * S).to(tl.int32)
        mask = (time < inside) & keep[:, None, None, :]
    decay += batch * decay_b + start * decay_t + block * (C * V) * decay_c
    inputs += batch * inputs_b + start * inputs_t + block * (C * V) * inputs_c
    a = read(decay + time * decay_t + along(channel, decay_c, V), mask, 0.0 if LOG else 1.0, LOG)
    b = read(inputs + time * inputs_t + along(channel, inputs_c, V), mask, 0.0, False)
    a, b, total, end, a_before, b_before = within(a, b, T, S, C, V)
    segment = tl.arange(0, S)[None, :, None]
    keep = keep[:, None, :] & (segment >= 0)
    lane = lane[:, None, :] * states_c + segment * 0 + block * (C * V)
    carry += (batch * n_tile + tile) * width + lane
    entering = enter(tile, initial + batch * initial_b + lane, carry, keep)
    ends = keep & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, final + batch * width + lane, carry, width, ends, end, 1.0)
    if STORE:
        b = a * (a_before * entering + b_before)[:, :, None, :] + b
        states += batch * states_b + start * states_t + block * (C * V) * states_c
        place = states + time * states_t + along(channel, states_c, V)
        tl.store(place, b.to(states.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length", "n_tile", "decay_c", "states_c", "grads_c", "out_c"])
def _adjoint_kernel(decay, states, grads, initial, grad_final, grad_decay, grad_inputs,
                    grad_initial, carry, ticket, length, width, n_tile, n_block, initial_b,
                    grad_final_b, decay_b, decay_t, decay_c, states_b, states_t, states_c,
                    grads_b, grads_t, grads_c, out_b, out_t, out_c, LOG: tl.constexpr,
                    FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
                    V: tl.constexpr):  # fmt: skip
    """Backward: m_t = a_{t+1} m_{t+1} + dh_t from the last step; db = m, da_t = m_t h_{t-1}."""
    tile, batch, block = _place(ticket, n_tile, n_block)
    start = length - 1 - tile * T * S
    back = tl.arange(0, S)[None, :, None, None] * T + tl.arange(0, T)[None, None, :, None]
    lane = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    keep = lane < width - block * (C * V)
    channel = lane[:, None, None, :]
    newest = tl.minimum(start, T * S).to(tl.int32)
    if FULL:
        mask = (back >= 0) & (channel >= 0)
    else:
        mask = (back <= newest) & keep[:, None, None, :]
    decay += batch * decay_b + start * decay_t + block * (C * V) * decay_c
    states += batch * states_b + start * states_t + block * (C * V) * states_c
    grads += batch * grads_b + start * grads_t + block * (C * V) * grads_c
    at_decay = decay - back * decay_t + along(channel, decay_c, V)
    later = mask & (back + tl.minimum(tile, 1).to(tl.int32) > 0)
    a = read(at_decay + decay_t, later, 0.0 if LOG else 1.0, LOG)
    m = read(grads - back * grads_t + along(channel, grads_c, V), mask, 0.0, False)
    states -= states_t
    earlier = mask & (back < newest)
    h = read(states - back * states_t + along(channel, states_c, V), earlier, 0.0, False)
    a, m, total, end, a_before, m_before = within(a, m, T, S, C, V)
    segment = tl.arange(0, S)[None, :, None]
    keep = keep[:, None, :] & (segment >= 0)
    lane = lane[:, None, :] * out_c + segment * 0 + block * (C * V)
    if tile == n_tile - 1:
        begin = tl.load(initial + batch * initial_b + lane, keep, other=0.0)
        h = tl.where(back == newest, begin[:, :, None, :], h)
        at_first = decay - start * decay_t + (lane - block * (C * V)) * decay_c
        first = read(at_first, keep, 0.0, LOG)
    else:
        first = tl.full([C, S, V], 1.0, tl.float32)
    carry += (batch * n_tile + tile) * width + lane
    entering = enter(tile, grad_final + batch * grad_final_b + lane, carry, keep)
    ends = keep & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, grad_initial + batch * width + lane, carry, width, ends, end, first)
    m = a * (a_before * entering + m_before)[:, :, None, :] + m
    place = batch * out_b + start * out_t + block * (C * V) * out_c
    place += along(channel, out_c, V) - back * out_t
    tl.store(grad_inputs + place, m.to(grad_inputs.dtype.element_ty), mask)
    m = m * h
    if LOG:
        m = m * read(at_decay, mask, 0.0, LOG)
    tl.store(grad_decay + place, m.to(grad_decay.dtype.element_ty), mask)


def _plan(tensors: tuple[Tensor, ...], wide: dict, packed: dict) -> tuple[int, list, Tensor, dict]:
    """Programs; carries, ticket and sizes as the kernels take them; a zero state; the tile.

    Pairs of 16-bit channels load as one word where every tensor has them side by side.
    """
    batch, length, width = tensors[0].shape
    pairs = all(t.element_size() == 2 and t.stride(2) == 1 for t in tensors)
    pairs = pairs and all(t.storage_offset() % 2 == 0 for t in tensors)
    tile = packed | {"V": 2} if pairs else wide | {"V": 1}
    n_tile = -(-length // (tile["T"] * tile["S"]))
    n_block = -(-width // (tile["C"] * tile["V"]))
    tile["FULL"] = length % (tile["T"] * tile["S"]) == 0 and width % (tile["C"] * tile["V"]) == 0
    zeros = tensors[0].new_zeros(1 + batch * n_tile * width, dtype=torch.int32)
    carry = zeros[1:].view(batch, n_tile, width)  # slot 0 is never written: a zero state
    sizes = [carry, zeros, length, width, n_tile, n_block]
    return batch * n_tile * n_block, sizes, carry[:, 0].view(torch.float32), tile


def _launch_forward(
    decay: Tensor, inputs: Tensor, initial: Tensor | None, log: bool, store: bool
) -> tuple[Tensor, Tensor]:
    batch, length, width = inputs.shape
    states = torch.empty((batch, length if store else 0, width), dtype=inputs.dtype,
                         device=inputs.device)  # fmt: skip
    if inputs.numel() == 0:
        final = inputs.new_zeros((batch, width), dtype=torch.float32)
        return states, final if initial is None else final + initial
    final = inputs.new_empty((batch, width), dtype=torch.float32)
    decay, inputs = narrow(decay, 1), narrow(inputs, 1)
    n_program, sizes, zero, tile = _plan((inputs, decay), FORWARD, FORWARD_16)
    initial = zero if initial is None else initial.float().contiguous()
    with on_device(inputs):
        _scan_kernel[(n_program,)](
            decay, inputs, initial, states, final, *sizes, initial.stride(0), *decay.stride(),
            *inputs.stride(), *states.stride(), LOG=log, STORE=store, **tile,
        )  # fmt: skip
    return states, final


@torch.library.custom_op("dsf::diagonal_scan", mutates_args=())
def _forward(
    decay: Tensor, inputs: Tensor, initial: Tensor | None, log: bool
) -> tuple[Tensor, Tensor]:
    return _launch_forward(decay, inputs, initial, log, store=True)


@_forward.register_fake
def _(decay, inputs, initial, log):
    final = inputs.new_empty((inputs.shape[0], inputs.shape[2]), dtype=torch.float32)
    return torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device), final


@torch.library.custom_op("dsf::diagonal_scan_adjoint", mutates_args=())
def _adjoint(
    decay: Tensor, states: Tensor, initial: Tensor | None, grads: Tensor,
    grad_final: Tensor | None, log: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, width = states.shape
    grad_decay = torch.empty(states.shape, dtype=decay.dtype, device=states.device)
    grad_inputs = torch.empty_like(states, memory_format=torch.contiguous_format)
    if states.numel() == 0:
        zero = states.new_zeros((batch, width), dtype=torch.float32)
        return grad_decay, grad_inputs, zero if grad_final is None else zero + grad_final
    grad_initial = states.new_empty((batch, width), dtype=torch.float32)
    decay, states, grads = narrow(decay, 1), narrow(states, 1), narrow(grads, 1)
    n_program, sizes, zero, tile = _plan((states, decay, grads), ADJOINT, ADJOINT_16)
    initial = zero if initial is None else initial.float().contiguous()
    grad_final = zero if grad_final is None else grad_final.float().contiguous()
    with on_device(states):
        _adjoint_kernel[(n_program,)](
            decay, states, grads, initial, grad_final, grad_decay, grad_inputs, grad_initial,
            *sizes, initial.stride(0), grad_final.stride(0), *decay.stride(), *states.stride(),
            *grads.stride(), *grad_inputs.stride(), LOG=log, **tile,
        )  # fmt: skip
    return grad_decay, grad_inputs, grad_initial


@_adjoint.register_fake
def _(decay, states, initial, grads, grad_final, log):
    shape = (states.shape[0], states.shape[2])
    return (
        torch.empty(states.shape, dtype=decay.dtype, device=decay.device),
        torch.empty(states.shape, dtype=states.dtype, device=states.device),
        states.new_empty(shape, dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    decay, _, initial, ctx.log = inputs
    ctx.save_for_backward(decay, output[0], initial)


def _backward(ctx, grads, grad_final):
    decay, states, initial = ctx.saved_tensors
    if grads is None:
        grads = torch.zeros_like(states)
    grad_decay, grad_inputs, grad_initial = _adjoint(
        decay, states, initial, grads, grad_final, ctx.log
    )
    return grad_decay, grad_inputs, None if initial is None else grad_initial.to(initial), None


_forward.register_autograd(_backward, setup_context=_save)


def _checked(function, decay, inputs, initial_state):
    check_kind(function, {"inputs": inputs, "decay": decay, "initial_state": initial_state})
    if inputs.dim() < 3:
        raise ValueError(
            f"dsf_kernels.{function}: inputs: expected axes (batch, time, channel...), "
            f"got {tuple(inputs.shape)}."
        )
    batch, length, *channels = inputs.shape
    sizes = {"batch": batch, "time": length} | {f"channel_{i}": n for i, n in enumerate(channels)}
    free = {k: None if decay.dim() == len(sizes) and decay.shape[i] == 1 else v
            for i, (k, v) in enumerate(sizes.items())}  # fmt: skip
    check_tensor(function, "decay", decay, free, "sizes are fixed by inputs, size 1 broadcasts")
    if initial_state is not None:
        del sizes["time"]
        check_tensor(function, "initial_state", initial_state, sizes, "sizes are fixed by inputs")
        initial_state = initial_state.reshape(batch, -1)
    flat = (batch, length, channels and torch.Size(channels).numel())
    return decay.expand(inputs.shape).reshape(flat), inputs.reshape(flat), initial_state


def diagonal_scan(
    decay: Tensor, inputs: Tensor, initial_state: Tensor | None = None, *, log: bool = False
) -> tuple[Tensor, Tensor]:
    """All states, and the last, of h_t = a_t h_{t-1} + b_t, each channel by itself.

    a = `decay` (exp(decay) with `log=True`; zero and negative values are exact), b = `inputs`,
    h_0 = `initial_state` (zero when None). Real numbers.

    Shapes: inputs (batch, time, channel...), decay the same or size 1 to broadcast,
    initial_state (batch, channel...); bf16, fp16 or fp32 with any strides, time from 0.
    Returns states like inputs and the final state (batch, channel...) in float32. The state is
    float32 throughout. Differentiable in all three tensors; d decay_t is m_t h_{t-1} with the
    stored h, so for 16-bit inputs it carries that type's rounding of h.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 3 passes over the data forward, 5 backward; memory beside the results: 4 bytes per
    256 steps and channel. Source: kernels/README.md.
    """
    channels = (inputs.shape[0], *inputs.shape[2:])
    decay, flat, initial_state = _checked("diagonal_scan", decay, inputs, initial_state)
    states, final = _forward(decay, flat, initial_state, log)
    return states.reshape(inputs.shape), final.reshape(channels)


def diagonal_summary(decay: Tensor, inputs: Tensor, *, log: bool = False) -> tuple[Tensor, Tensor]:
    """What a segment does to any state: (total, end) with h_L = total h_0 + end.

    total = a_L ... a_1 and end = h_L from zero, both (batch, channel...) float32. Arguments and
    errors as `diagonal_scan`; no gradient. Cost: 3 reads of the data, nothing stored.
    """
    channels = (inputs.shape[0], *inputs.shape[2:])
    decay, flat, _ = _checked("diagonal_summary", decay.detach(), inputs.detach(), None)
    one = flat.new_ones((flat.shape[0], flat.shape[2]))
    nothing = flat.new_zeros((1, 1, 1)).expand(flat.shape)
    total = _launch_forward(decay, nothing, one, log, store=False)[1]
    end = _launch_forward(decay, flat, None, log, store=False)[1]
    return total.reshape(channels), end.reshape(channels)
