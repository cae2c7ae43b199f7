"""The backward pass of selective_scan: a tile's states again, then the adjoint back through it."""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import LN_2, decay_of, sigmoid, softplus
from dsf_kernels.selective_kernels import (
    COUNTS,
    add,
    first_tile,
    halves,
    load,
    pick,
    place,
    rate_of,
    states,
    store_two,
    touch,
    touch_rows,
)


@triton.jit
def adjoint_scan(a, g, after, time, T: tl.constexpr):
    """m_t = g_t + a_{t+1} m_{t+1} from the last step back, and a_1 m_1 for the tile before."""
    m = g
    for back in tl.static_range(T):
        now = after + pick(g, T - 1 - back, time)
        m = tl.where(time == T - 1 - back, now, m)
        after = now * pick(a, T - 1 - back, time)
    return m, after


@triton.jit
def shifted(tile, first, time, T: tl.constexpr):
    """The tile one step later, `first` in front."""
    moved = tl.where(time == 0, first, tile)
    for i in tl.static_range(1, T):
        moved = tl.where(time == i, pick(tile, i - 1, time), moved)
    return moved


@triton.jit
def ahead(saved, grad_state, grad_rates, n, n_channel, lane, keep, N: tl.constexpr,
          C: tl.constexpr):  # fmt: skip
    """What state n needs from memory, asked for while state n - 1 is worked on."""
    n = tl.minimum(n, N - 1)
    before = tl.load(saved + n * C + lane)
    place = n * n_channel + lane
    return before, load(grad_state + place, keep), load(grad_rates + place, keep)


@triton.jit
def through_gate(dy, gate, ungated, grad_gate, mask, SUMMARY: tl.constexpr, EXACT: tl.constexpr):
    """The gradient before the gate, and (stored) that of the gate."""
    z = load(gate, mask)
    s = sigmoid(z, EXACT)
    if not SUMMARY:
        slope = dy * load(ungated, mask) * (s * (1.0 + z * (1.0 - s)))
        tl.store(grad_gate, slope.to(grad_gate.dtype.element_ty), mask)
    return dy * (z * s)


@triton.jit
def sum_channels(mixed, left, right, to, here, inside, N: tl.constexpr, C: tl.constexpr,
                 T: tl.constexpr, ROWS: tl.constexpr, MIX: tl.constexpr):  # fmt: skip
    """Sums of two tiles over channels: stored (MIX None), or into the row `here` of `mixed`."""
    if MIX is None:
        tl.store(to, tl.sum(left, 0, keep_dims=True), inside)
        tl.store(to + N, tl.sum(right, 0, keep_dims=True), inside)
    else:
        both = tl.join(left.to(MIX), right.to(MIX))
        ones = tl.full([ROWS, C], 1.0, MIX)
        sums = tl.dot(ones, tl.reshape(both, [C, 2 * T]))  # all rows are equal
        mixed = tl.where(tl.arange(0, ROWS)[:, None] == here, sums, mixed)
    return mixed


@triton.jit(do_not_specialize=[*COUNTS, "g_c"])
def adjoint_kernel(u, step, gate, ungated, grad, rates, pairs, skip, bias, saved, span,
                   grad_state, grad_rates, grad_u, grad_step, grad_gate, grad_pairs, grad_ends,
                   table, length, width, n_tile, n_segment, n_block, n_group, unit,
                   u_b, u_c, s_b, s_c, z_b, z_c, g_b, g_c, n_channel: tl.constexpr,
                   u_t: tl.constexpr, s_t: tl.constexpr, z_t: tl.constexpr, g_t: tl.constexpr,
                   SOFTPLUS: tl.constexpr, GATE: tl.constexpr, SKIP: tl.constexpr,
                   BIAS: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                   SUMMARY: tl.constexpr, MIX: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
                   T: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """All gradients of one segment, tiles from the last to the first.

    m_t = C_t dy_t + a_{t+1} m_{t+1}. grad_state (segment, state, channel) holds a_t m_t between
    tiles: the gradient of the last state, then of the first. grad_pairs: the sums over this
    program's channels of m_t Delta_t u_t and h_t dy_t, (time, 2, state). grad_ends: sums over time
    for D and bias. MIX: the type in which the sums over channels go through the matrix unit, or
    None for float32 additions. SUMMARY: grad_state alone, and the sum of Delta in `span`.
    table: see forward_kernel.
    """
    segment, block, group, channel, lane, keep = place(width, n_block, n_group, C)
    time = tl.arange(0, T)[None, :]
    batch = segment // n_segment
    start, stop = segment % n_segment * n_tile * T, length
    if table is not None:
        table += 3 * segment
        batch, start, stop = 0, tl.load(table), tl.load(table + 1)
    tiles = tl.minimum(n_tile, tl.cdiv((stop - start).to(tl.int32), T))
    start += (tiles - 1) * T
    flat = (batch * length + start) * n_channel + channel
    u += batch * u_b + channel * u_c + start * u_t
    step += batch * s_b + channel * s_c + start * s_t
    gate += batch * z_b + channel * z_c + start * z_t
    grad += batch * g_b + channel * g_c + start * g_t
    ungated += flat
    grad_u += flat
    grad_step += flat
    grad_gate += flat
    pairs += ((batch * n_group + group) * length + start) * N
    grad_pairs += ((batch * n_group * n_block + block) * length + start) * (2 * N)
    rates += channel
    grad_state += segment * N * n_channel + channel
    grad_rates += segment * N * n_channel + channel
    saved += (first_tile(table, block, n_segment, n_tile) + tiles - 1) * (N * C)
    along = lane * unit
    d = load(skip + channel + along, keep) if SKIP else 0.0
    shift = load(bias + channel + along, keep) if BIAS else 0.0
    grad_skip = tl.zeros([C, 1], tl.float32)
    grad_bias = tl.zeros([C, 1], tl.float32)
    reach = tl.zeros([C, 1], tl.float32)
    lost = tl.zeros([C, 1], tl.float32)
    sink = tl.zeros([C, 1], tl.float32)
    STEP: tl.constexpr = tl.constexpr(max(8, T * N // C))  # words between touches
    room = width - (channel - group * width)
    left = (stop - start).to(tl.int32)
    start = (tiles - 1) * T  # steps of this segment before the tile
    for _ in range(tiles):
        if FULL:
            mask = (time >= 0) & (lane >= 0)
            inside = time >= 0
        else:
            inside = time < left
            mask = inside & keep
        x = load(step + time * s_t + lane * s_c, mask) + shift
        value = load(u + time * u_t + lane * u_c, mask)
        dy = load(grad + time * g_t + lane * g_c, mask)
        at = time * n_channel + along
        if GATE:
            place_z = gate + time * z_t + lane * z_c
            dy = through_gate(dy, place_z, ungated + at, grad_gate + at, mask, SUMMARY, EXACT)
        delta = softplus(x, EXACT) if SOFTPLUS else x
        delta = tl.where(mask, delta, 0.0)
        write = delta * value
        grad_write = tl.zeros([C, T], tl.float32)
        grad_delta = tl.zeros([C, T], tl.float32)
        near_u = touch_rows(u - T * u_t, u_t, u_c, start, room, lane, T)
        near_s = touch_rows(step - T * s_t, s_t, s_c, start, room, lane, T)
        near_g = touch_rows(grad - T * g_t, g_t, g_c, start, room, lane, T)
        near_p = touch(pairs - T * N, start * N, lane, STEP)
        near_h = touch(saved - N * C, start * (N * C), lane, N)
        for first in range(0, N, ROWS):
            before, after, total = ahead(saved, grad_state, grad_rates, first, n_channel, along,
                                         keep, N, C)  # fmt: skip
            mixed = tl.zeros([ROWS, 2 * T], tl.float32)
            for n in range(first, min(first + ROWS, N)):
                B, read = halves(tl.load(pairs + time * N + n, inside, other=0))
                rate = rate_of(rates, n, n_channel, along, keep, EXACT)
                a = decay_of(delta, rate, EXACT)
                following = ahead(saved, grad_state, grad_rates, n + 1, n_channel, along, keep,
                                  N, C)  # fmt: skip
                if SUMMARY:
                    after = adjoint_scan(a, dy * read, after, time, T)[1]
                    tl.store(grad_state + n * n_channel + along, after, keep)
                else:
                    h = states(a, write * B, before, time)
                    h_grad = h * dy
                    past = a * shifted(h, before, time, T)
                    m, after = adjoint_scan(a, dy * read, after, time, T)
                    past *= m
                    grad_delta += past * rate
                    grad_write += m * B
                    total += tl.sum(past * delta, 1, keep_dims=True)
                    tl.store(grad_state + n * n_channel + along, after, keep)
                    tl.store(grad_rates + n * n_channel + along, total, keep)
                    to = grad_pairs + time * (2 * N) + n
                    mixed = sum_channels(mixed, m * write, h_grad, to, n - first, inside, N, C, T,
                                         ROWS, MIX)  # fmt: skip
                before, after, total = following
            if MIX is not None and not SUMMARY:
                row = tl.arange(0, ROWS)[:, None]
                column = tl.arange(0, 2 * T)[None, :]
                tl.store(grad_pairs + column * N + first + row, mixed,
                         (row < N - first) & (column < 2 * left))  # fmt: skip
        sink += near_u.to(tl.float32) + near_s.to(tl.float32) + near_g.to(tl.float32)
        sink += near_p.to(tl.float32) + near_h
        if SUMMARY:
            reach, lost = add(reach, lost, tl.sum(delta, 1, keep_dims=True))
        else:
            grad_delta = grad_delta if EXACT else grad_delta * LN_2
            grad_delta += grad_write * value
            grad_u_tile = grad_write * delta + dy * d
            if SOFTPLUS:
                grad_delta *= sigmoid(x, EXACT)
            grad_skip += tl.sum(dy * value, 1, keep_dims=True)
            grad_bias += tl.sum(tl.where(mask, grad_delta, 0.0), 1, keep_dims=True)
            tl.store(grad_u + at, grad_u_tile.to(grad_u.dtype.element_ty), mask)
            tl.store(grad_step + at, grad_delta.to(grad_step.dtype.element_ty), mask)
        u -= T * u_t
        step -= T * s_t
        gate -= T * z_t
        grad -= T * g_t
        ungated -= T * n_channel
        grad_u -= T * n_channel
        grad_step -= T * n_channel
        grad_gate -= T * n_channel
        pairs -= T * N
        grad_pairs -= T * 2 * N
        saved -= N * C
        left += T
        start -= T
    channel += along
    tl.store(grad_ends + along, sink, keep & (lane * 0 + length < 0))  # never
    if SUMMARY:
        store_two(span, segment, n_channel, channel, reach, lost, keep)
    else:
        store_two(grad_ends, segment, n_channel, channel, grad_skip, grad_bias, keep)
