"""Elementwise linear recurrence, channels last, in one pass over the data.

A tile is C channels by S x T steps, held in registers: each of S warps owns T consecutive steps,
one channel a lane (the compiler lays the first axis of a tile along the lanes, as no stride is
known to be 1), so the loop over T needs no communication. The S totals are combined across
the warps, the tile waits for the state that its predecessor in time publishes, publishes its
own, and only then applies and stores. Tiles are numbered by a ticket, so a predecessor has
always started: no deadlock. The order of every sum is fixed: results repeat bit for bit.
"""

import torch
from torch import Tensor

from dsf_kernels.diagonal_kernels import adjoint_kernel, scan_kernel
from dsf_kernels.launch import check_kind, check_tensor, narrow, on_device
from dsf_kernels.sequences import Sequences, check_sequences, count_rows, placed, results

LANES = 32
# Tiles measured best on H100 and H200. T, S: steps of a warp, warps; V (below): channels a lane.
FORWARD = {"T": 32, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 112}
ADJOINT = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 80}
FORWARD_16 = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 112}
ADJOINT_16 = {"T": 16, "S": 8, "C": LANES, "num_warps": 8, "maxnreg": 128}


def _plan(
    tensors: tuple[Tensor, ...], wide: dict, packed: dict, cu_seqlens: Tensor | None = None
) -> tuple[int, list, Tensor, dict]:
    """Programs; carries, ticket and sizes as the kernels take them; a zero state; the tile.

    Pairs of 16-bit channels load as one word where every tensor has them side by side.
    """
    batch, length, width = tensors[0].shape
    pairs = all(t.element_size() == 2 and t.stride(2) == 1 for t in tensors)
    pairs = pairs and all(t.storage_offset() % 2 == 0 for t in tensors)
    tile = packed | {"V": 2} if pairs else wide | {"V": 1}
    steps, channels = tile["T"] * tile["S"], tile["C"] * tile["V"]
    n_tile, n_block = -(-length // steps), -(-width // channels)
    tile["FULL"] = length % steps == 0 and width % channels == 0 and cu_seqlens is None
    if cu_seqlens is not None:
        n_tile = length // steps + count_rows(tensors[0], cu_seqlens)  # as Sequences
    zeros = tensors[0].new_zeros(1 + batch * n_tile * width, dtype=torch.int32)
    carry = zeros[1:].view(batch, n_tile, width)  # slot 0 is never written: a zero state
    sizes = [carry, zeros, length, width, n_tile, n_block]
    zero = carry[:, 0].view(torch.float32).expand(count_rows(tensors[0], cu_seqlens), -1)
    return batch * n_tile * n_block, sizes, zero, tile


def _table(tile: dict, length: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """Where the tiles of a packed row lie."""
    if cu_seqlens is None:
        return None
    return Sequences(cu_seqlens, length, tile["T"] * tile["S"]).tiles()


def _edge(like: Tensor, given: Tensor | None, cu_seqlens: Tensor | None, empty: bool) -> Tensor:
    """Room for a state (row, channel), filled with the given one (zero for None) where a kernel
    may not write it: without steps, or in a sequence without any."""
    shape = count_rows(like, cu_seqlens), like.shape[2]
    if not empty and cu_seqlens is None:
        return like.new_empty(shape, dtype=torch.float32)
    zero = like.new_zeros(shape, dtype=torch.float32)
    return zero if given is None else zero + given


def _launch_forward(
    decay: Tensor, inputs: Tensor, initial: Tensor | None, log: bool, store: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, width = inputs.shape
    states = results(inputs, cu_seqlens, (batch, length if store else 0, width))
    empty = inputs.numel() == 0 or count_rows(inputs, cu_seqlens) == 0
    final = _edge(inputs, initial, cu_seqlens, empty)
    if empty:
        return states, final
    decay, inputs = narrow(decay, 1), narrow(inputs, 1)
    n_program, sizes, zero, tile = _plan((inputs, decay), FORWARD, FORWARD_16, cu_seqlens)
    initial = zero if initial is None else initial.float().contiguous()
    with on_device(inputs):
        table = _table(tile, length, cu_seqlens)
        scan_kernel[(n_program,)](
            decay, inputs, initial, states, final, table, *sizes, initial.stride(0),
            *decay.stride(), *inputs.stride(), *states.stride(), LOG=log, STORE=store, **tile,
        )  # fmt: skip
    return states, final


@torch.library.custom_op("dsf::diagonal_scan", mutates_args=())
def _forward(
    decay: Tensor, inputs: Tensor, initial: Tensor | None, log: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(decay, inputs, initial, log, True, cu_seqlens)


@_forward.register_fake
def _(decay, inputs, initial, log, cu_seqlens=None):
    shape = count_rows(inputs, cu_seqlens), inputs.shape[2]
    final = inputs.new_empty(shape, dtype=torch.float32)
    return inputs.new_empty(inputs.shape), final


@torch.library.custom_op("dsf::diagonal_scan_adjoint", mutates_args=())
def _adjoint(
    decay: Tensor, states: Tensor, initial: Tensor | None, grads: Tensor,
    grad_final: Tensor | None, log: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_decay = results(decay, cu_seqlens, states.shape)
    grad_inputs = results(states, cu_seqlens, states.shape)
    empty = states.numel() == 0 or count_rows(states, cu_seqlens) == 0
    grad_initial = _edge(states, grad_final, cu_seqlens, empty)
    if empty:
        return grad_decay, grad_inputs, grad_initial
    decay, states, grads = narrow(decay, 1), narrow(states, 1), narrow(grads, 1)
    given = (states, decay, grads)
    n_program, sizes, zero, tile = _plan(given, ADJOINT, ADJOINT_16, cu_seqlens)
    initial = zero if initial is None else initial.float().contiguous()
    grad_final = zero if grad_final is None else grad_final.float().contiguous()
    with on_device(states):
        table = _table(tile, states.shape[1], cu_seqlens)
        adjoint_kernel[(n_program,)](
            decay, states, grads, initial, grad_final, grad_decay, grad_inputs, grad_initial,
            table, *sizes, initial.stride(0), grad_final.stride(0), *decay.stride(),
            *states.stride(), *grads.stride(), *grad_inputs.stride(), LOG=log, **tile,
        )  # fmt: skip
    return grad_decay, grad_inputs, grad_initial


@_adjoint.register_fake
def _(decay, states, initial, grads, grad_final, log, cu_seqlens=None):
    shape = count_rows(states, cu_seqlens), states.shape[2]
    return (
        decay.new_empty(states.shape),
        states.new_empty(states.shape),
        states.new_empty(shape, dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    decay, _, initial, ctx.log, cu_seqlens = inputs
    ctx.save_for_backward(decay, output[0], initial, cu_seqlens)


def _backward(ctx, grads, grad_final):
    decay, states, initial, cu_seqlens = ctx.saved_tensors
    if grads is None:
        grads = torch.zeros_like(states)
    grad_decay, grad_inputs, grad_initial = _adjoint(
        decay, states, initial, grads, grad_final, ctx.log, cu_seqlens
    )
    grad_initial = None if initial is None else grad_initial.to(initial)
    return grad_decay, grad_inputs, grad_initial, None, None


_forward.register_autograd(_backward, setup_context=_save)


def _checked(function, decay, inputs, initial_state, cu_seqlens=None):
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
    states = {k: v for k, v in sizes.items() if k not in ("batch", "time")}
    if cu_seqlens is not None:
        check_sequences(function, cu_seqlens, inputs, initial_state, states, "inputs")
    elif initial_state is not None:
        sizes = {"batch": batch} | states
        check_tensor(function, "initial_state", initial_state, sizes, "sizes are fixed by inputs")
    flat = (batch, length, torch.Size(channels).numel())
    if initial_state is not None:
        initial_state = initial_state.reshape(initial_state.shape[0], flat[2])
    return decay.expand(inputs.shape).reshape(flat), inputs.reshape(flat), initial_state


def diagonal_scan(
    decay: Tensor,
    inputs: Tensor,
    initial_state: Tensor | None = None,
    *,
    log: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states, and the last, of h_t = a_t h_{t-1} + b_t, each channel by itself.

    a = `decay` (exp(decay) with `log=True`; zero and negative values are exact), b = `inputs`,
    h_0 = `initial_state` (zero when None). Real numbers.

    cu_seqlens (n + 1,): n sequences packed along time in one row, each with its own initial and
    final state (n, channel...), as in `scalar_decay_scan`, with its errors; each takes whole
    tiles of up to 256 steps.

    Shapes: inputs (batch, time, channel...), decay the same or size 1 to broadcast,
    initial_state (batch, channel...); bf16, fp16 or fp32 with any strides, time from 0.
    Returns states like inputs and the final state (batch, channel...) in float32. The state is
    float32 throughout. Differentiable in all three tensors; d decay_t is m_t h_{t-1} with the
    stored h, so for 16-bit inputs it carries that type's rounding of h.
    Raises ValueError (shape, device), TypeError (dtype), NotImplementedError (CPU tensor).
    Cost: 3 passes over the data forward, 5 backward; memory beside the results: 4 bytes per
    256 steps and channel. Source: kernels/README.md.
    """
    given = _checked("diagonal_scan", decay, inputs, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = placed("diagonal_scan", cu_seqlens, inputs)
    states, final = _forward(*given, log, cu_seqlens)
    return states.reshape(inputs.shape), final.reshape(final.shape[0], *inputs.shape[2:])


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
