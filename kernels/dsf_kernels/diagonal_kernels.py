"""The two passes of diagonal_scan, and the order of their tiles."""

import triton
import triton.language as tl

from dsf_kernels.combine import along, enter, leave, read, within


@triton.jit
def tile_place(ticket, n_tile, n_block):
    """Tile, batch, and channel block of this program; tiles in time vary slowest."""
    ticket = tl.atomic_add(ticket, 1, sem="relaxed").to(tl.int64)
    n_lane = tl.num_programs(0) // n_tile
    lane = ticket % n_lane
    return ticket // n_lane, lane // n_block, lane % n_block


@triton.jit
def tile_of(table, tile, width):
    """Sequence, its first token and the one after its last, which of its tiles this is, of how
    many, and the channels that exist: none where no sequence owns the tile."""
    table += 5 * tile
    origin, stop = tl.load(table + 1), tl.load(table + 2)
    known = tl.where(stop > origin, width, 0)
    return tl.load(table), origin, stop, tl.load(table + 3), tl.load(table + 4), known


@triton.jit(do_not_specialize=["length", "n_tile", "decay_c", "inputs_c", "states_c"])
def scan_kernel(decay, inputs, initial, states, final, table, carry, ticket,
                length, width, n_tile, n_block, initial_b,
                decay_b, decay_t, decay_c, inputs_b, inputs_t, inputs_c,
                states_b, states_t, states_c, LOG: tl.constexpr, STORE: tl.constexpr,
                FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
                V: tl.constexpr):  # fmt: skip
    """Forward: h = a h + b. The grid is one program a tile.

    table: None, or what Sequences.tiles says of every tile of a packed row.
    """
    tile, batch, block = tile_place(ticket, n_tile, n_block)
    slot, row, known = tile, batch, width
    if table is not None:
        row, origin, length, tile, n_tile, known = tile_of(table, tile, width)
    start = tile * T * S if table is None else origin + tile * T * S
    time = tl.arange(0, S)[None, :, None, None] * T + tl.arange(0, T)[None, None, :, None]
    lane = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    keep = lane < known - block * (C * V)
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
    carry += (batch * n_tile + tile if table is None else slot) * width + lane
    entering = enter(tile, initial + row * initial_b + lane, carry, keep)
    ends = keep & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, final + row * width + lane, carry, width, ends, end, 1.0)
    if STORE:
        b = a * (a_before * entering + b_before)[:, :, None, :] + b
        states += batch * states_b + start * states_t + block * (C * V) * states_c
        place = states + time * states_t + along(channel, states_c, V)
        tl.store(place, b.to(states.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length", "n_tile", "decay_c", "states_c", "grads_c", "out_c"])
def adjoint_kernel(decay, states, grads, initial, grad_final, grad_decay, grad_inputs,
                   grad_initial, table, carry, ticket, length, width, n_tile, n_block, initial_b,
                   grad_final_b, decay_b, decay_t, decay_c, states_b, states_t, states_c,
                   grads_b, grads_t, grads_c, out_b, out_t, out_c, LOG: tl.constexpr,
                   FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
                   V: tl.constexpr):  # fmt: skip
    """Backward: m_t = a_{t+1} m_{t+1} + dh_t from the last step; db = m, da_t = m_t h_{t-1}.

    Tiles count from the last step; table: see scan_kernel.
    """
    tile, batch, block = tile_place(ticket, n_tile, n_block)
    slot, row, known = tile, batch, width
    if table is not None:
        row, origin, length, tile, n_tile, known = tile_of(table, tile, width)
    start = length - 1 - tile * T * S
    steps = start if table is None else start - origin
    back = tl.arange(0, S)[None, :, None, None] * T + tl.arange(0, T)[None, None, :, None]
    lane = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    keep = lane < known - block * (C * V)
    channel = lane[:, None, None, :]
    newest = tl.minimum(steps, T * S).to(tl.int32)
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
        begin = tl.load(initial + row * initial_b + lane, keep, other=0.0)
        h = tl.where(back == newest, begin[:, :, None, :], h)
        at_first = decay - steps * decay_t + (lane - block * (C * V)) * decay_c
        first = read(at_first, keep, 0.0, LOG)
    else:
        first = tl.full([C, S, V], 1.0, tl.float32)
    carry += (batch * n_tile + tile if table is None else slot) * width + lane
    entering = enter(tile, grad_final + row * grad_final_b + lane, carry, keep)
    ends = keep & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, grad_initial + row * width + lane, carry, width, ends, end, first)
    m = a * (a_before * entering + m_before)[:, :, None, :] + m
    place = batch * out_b + start * out_t + block * (C * V) * out_c
    place += along(channel, out_c, V) - back * out_t
    tl.store(grad_inputs + place, m.to(grad_inputs.dtype.element_ty), mask)
    m = m * h
    if LOG:
        m = m * read(at_decay, mask, 0.0, LOG)
    tl.store(grad_decay + place, m.to(grad_decay.dtype.element_ty), mask)
