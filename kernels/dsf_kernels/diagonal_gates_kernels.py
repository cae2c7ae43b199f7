"""Kernels of the elementwise recurrence that make decay and input from gates as they read them.

The tiles, the look-back and the order of sums are those of `diagonal_scan`.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.combine import along, enter, leave, read, within
from dsf_kernels.diagonal_kernels import tile_place
from dsf_kernels.exponentials import LN_2, LOG2_E, LOG2_E_LOW, fast_exp2, fast_reciprocal


@triton.jit
def power_of_e(x, EXACT: tl.constexpr):
    """e^x, to 4 units in the last place where EXACT, else to |x| units."""
    high = x * LOG2_E
    value = fast_exp2(high)
    if EXACT:
        rest = tl.fma(x, LOG2_E, -high) + x * LOG2_E_LOW
        value *= 1.0 + tl.where(tl.abs(high) < 200.0, rest * LN_2, 0.0)  # no inf - inf
    return value


@triton.jit
def sides(x, EXACT: tl.constexpr):
    """sigmoid(x) and sigmoid(-x), each to a few units of itself."""
    small = power_of_e(-tl.abs(x), EXACT)
    large = fast_reciprocal(1.0 + small)
    small = small * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def one_minus(square, x):
    """1 - square for square = e^-x, x >= 0: a series in x where the difference would cancel."""
    series = 1.0 - x * (1.0 / 7) * (1.0 - x * (1.0 / 8))
    series = 1.0 - x * (1.0 / 5) * (1.0 - x * (1.0 / 6) * series)
    series = 1.0 - x * (1.0 / 3) * (1.0 - x * (1.0 / 4) * series)
    return tl.where(x < 0.5, x * (1.0 - x * 0.5 * series), 1.0 - square)


@triton.jit
def decay(logit, rate, RGLRU: tl.constexpr, EXACT: tl.constexpr):
    """a_t: e^(-rate sigmoid(logit)), or rate + (1 - rate) sigmoid(logit)."""
    gate, shut = sides(logit, EXACT)
    if RGLRU:
        value = power_of_e(-rate * gate, EXACT)
    else:
        value = tl.where(logit >= 0, 1.0 - (1.0 - rate) * shut, rate + (1.0 - rate) * gate)
    return value


@triton.jit(do_not_specialize=["length", "n_tile", "inputs_c", "logit_c", "second_c", "states_c"])
def gated_kernel(inputs, logit, second, rate, reset, initial, states, final, carry, ticket,
                 length, width, n_tile, n_block, initial_b, reset_b, reset_t, inputs_b, inputs_t,
                 inputs_c, logit_b, logit_t, logit_c, second_b, second_t, second_c,
                 states_b, states_t, states_c, RGLRU: tl.constexpr, COMPLEMENT: tl.constexpr,
                 RESET: tl.constexpr, EXACT: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr,
                 S: tl.constexpr, C: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Forward: h = a h + w u. The grid is one program a tile."""
    tile, batch, block = tile_place(ticket, n_tile, n_block)
    start = tile * T * S
    time = tl.arange(0, S)[None, :, None, None] * T + tl.arange(0, T)[None, None, :, None]
    lane = tl.arange(0, C)[:, None] * V + tl.arange(0, V)[None, :]
    keep = lane < width - block * (C * V)
    channel = lane[:, None, None, :]
    inside = tl.minimum(length - start, T * S).to(tl.int32)
    if FULL:
        mask = (time >= 0) & (channel >= 0)
    else:
        mask = (time < inside) & keep[:, None, None, :]
    inputs += batch * inputs_b + start * inputs_t + block * (C * V) * inputs_c
    logit += batch * logit_b + start * logit_t + block * (C * V) * logit_c
    rates = tl.load(rate + block * (C * V) + lane, keep, other=0.0)[:, None, None, :]
    at = logit + time * logit_t + along(channel, logit_c, V)
    x = read(at, mask, 0.0, False)
    b = read(inputs + time * inputs_t + along(channel, inputs_c, V), mask, 0.0, False)
    a = decay(x, rates, RGLRU, EXACT)
    if RGLRU:
        second += batch * second_b + start * second_t + block * (C * V) * second_c
        i = read(second + time * second_t + along(channel, second_c, V), mask, 0.0, False)
        root = tl.sqrt(one_minus(a * a, 2.0 * rates * sides(x, EXACT)[0]))
        if RESET:
            reset += batch * reset_b + start * reset_t
            starts = tl.load(reset + time * reset_t, time < inside, other=0) != 0
            a, root = tl.where(starts, 0.0, a), tl.where(starts, 1.0, root)
        b *= root * sides(i, EXACT)[0]
    if COMPLEMENT:
        b *= (1.0 - rates) * sides(x, EXACT)[1]
    if not FULL:
        a = tl.where(mask, a, 1.0)
    a, b, total, end, a_before, b_before = within(a, b, T, S, C, V)
    segment = tl.arange(0, S)[None, :, None]
    keep = keep[:, None, :] & (segment >= 0)
    lane = lane[:, None, :] * states_c + segment * 0 + block * (C * V)
    carry += (batch * n_tile + tile) * width + lane
    entering = enter(tile, initial + batch * initial_b + lane, carry, keep)
    ends = keep & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, final + batch * width + lane, carry, width, ends, end, 1.0)
    b = a * (a_before * entering + b_before)[:, :, None, :] + b
    states += batch * states_b + start * states_t + block * (C * V) * states_c
    place = states + time * states_t + along(channel, states_c, V)
    tl.store(place, b.to(states.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["length", "n_tile", "inputs_c", "logit_c", "second_c", "states_c",
                               "grads_c", "out_c"])  # fmt: skip
def gated_adjoint_kernel(
    inputs, logit, second, rate, reset, states, grads, initial, grad_final, grad_inputs,
    grad_logit, grad_second, grad_initial, sums, carry, ticket, length, width, n_tile, n_block,
    initial_b, grad_final_b, reset_b, reset_t, inputs_b, inputs_t, inputs_c, logit_b, logit_t,
    logit_c, second_b, second_t, second_c, states_b, states_t, states_c, grads_b, grads_t, grads_c,
    out_b, out_t, out_c,
    RGLRU: tl.constexpr, COMPLEMENT: tl.constexpr, RESET: tl.constexpr, EXACT: tl.constexpr,
    SUMS: tl.constexpr, FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Backward: m_t = a_{t+1} m_{t+1} + dh_t from the last step, and from it every gradient.

    sums (batch, tile, channel): of the gradient of `rate` over the steps of a tile.
    """
    tile, batch, block = tile_place(ticket, n_tile, n_block)
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
    rates = tl.load(rate + block * (C * V) + lane, keep, other=0.0)
    inputs += batch * inputs_b + start * inputs_t + block * (C * V) * inputs_c
    logit += batch * logit_b + start * logit_t + block * (C * V) * logit_c
    states += batch * states_b + start * states_t + block * (C * V) * states_c - states_t
    grads += batch * grads_b + start * grads_t + block * (C * V) * grads_c
    at_logit = logit - back * logit_t + along(channel, logit_c, V)
    later = mask & (back + tl.minimum(tile, 1).to(tl.int32) > 0)
    a = decay(read(at_logit + logit_t, later, 0.0, False), rates[:, None, None, :], RGLRU, EXACT)
    if RESET:
        reset += batch * reset_b + start * reset_t
        after = (back <= newest) & (back + tl.minimum(tile, 1).to(tl.int32) > 0)
        a = tl.where(tl.load(reset - back * reset_t + reset_t, after, other=0) != 0, 0.0, a)
    a = tl.where(later, a, 1.0)
    m = read(grads - back * grads_t + along(channel, grads_c, V), mask, 0.0, False)
    a, m, total, end, a_before, m_before = within(a, m, T, S, C, V)
    segment = tl.arange(0, S)[None, :, None]
    wide = keep[:, None, :] & (segment >= 0)
    spot = lane[:, None, :] * out_c + segment * 0 + block * (C * V)
    if tile == n_tile - 1:
        at_first = logit - start * logit_t + (spot - block * (C * V)) * logit_c
        first = decay(read(at_first, wide, 0.0, False), rates[:, None, :], RGLRU, EXACT)
        if RESET:
            first = tl.where(tl.load(reset - start * reset_t) != 0, 0.0, first)
    else:
        first = tl.full([C, S, V], 1.0, tl.float32)
    carry += (batch * n_tile + tile) * width + spot
    entering = enter(tile, grad_final + batch * grad_final_b + spot, carry, wide)
    ends = wide & (segment == S - 1)
    end = total * entering + end
    leave(tile, n_tile, grad_initial + batch * width + spot, carry, width, ends, end, first)
    m = a * (a_before * entering + m_before)[:, :, None, :] + m
    earlier = mask & (back < newest)
    h = read(states - back * states_t + along(channel, states_c, V), earlier, 0.0, False)
    if tile == n_tile - 1:
        begin = tl.load(initial + batch * initial_b + spot, wide, other=0.0)
        h = tl.where(back == newest, begin[:, :, None, :], h)
    place = batch * out_b + start * out_t + block * (C * V) * out_c
    place += along(channel, out_c, V) - back * out_t
    rates = rates[:, None, None, :]
    gate, shut = sides(read(at_logit, mask, 0.0, False), EXACT)
    u = read(inputs - back * inputs_t + along(channel, inputs_c, V), mask, 0.0, False)
    if RGLRU:
        second += batch * second_b + start * second_t + block * (C * V) * second_c
        i = read(second - back * second_t + along(channel, second_c, V), mask, 0.0, False)
        i, i_shut = sides(i, EXACT)
        speed = rates * gate
        a = power_of_e(-speed, EXACT)
        root = tl.sqrt(one_minus(a * a, 2.0 * speed))
        if RESET:
            starts = tl.load(reset - back * reset_t, back <= newest, other=0) != 0
            a, root = tl.where(starts, 0.0, a), tl.where(starts, 1.0, root)
        slope = tl.where(root > 0, a * a * fast_reciprocal(tl.where(root > 0, root, 1.0)), 0.0)
        per_rate = m * (slope * i * u - a * h)  # less the gradient of log a
        m = m * root * i
        tl.store(grad_second + place, (m * u * i_shut).to(grad_second.dtype.element_ty), mask)
        grad = per_rate * speed * shut
        per_rate = per_rate * gate
    else:
        per_rate = m * (h - u if COMPLEMENT else h) * shut
        grad = per_rate * (1.0 - rates) * gate
        if COMPLEMENT:
            m = m * ((1.0 - rates) * shut)
    tl.store(grad_inputs + place, m.to(grad_inputs.dtype.element_ty), mask)
    tl.store(grad_logit + place, grad.to(grad_logit.dtype.element_ty), mask)
    if SUMS:
        if not FULL:
            per_rate = tl.where(mask, per_rate, 0.0)
        part = tl.sum(tl.sum(per_rate, 2), 1)
        sums += (batch * n_tile + tile) * width + block * (C * V)
        tl.store(sums + lane, part, keep)
