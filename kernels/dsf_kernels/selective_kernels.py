"""The two passes of selective_scan: a lane owns a channel, T steps of it lie in its registers.

Tiles are (channel, time); no stride is known to be 1, so the compiler lays the first axis along
the lanes and T steps inside a thread: the scan over them needs no communication. States are
visited one after the other. B_t and C_t of a state are the two halves of one 64-bit word, the
same for all lanes.
"""

import triton
import triton.language as tl

from dsf_kernels.combine import combine
from dsf_kernels.exponentials import LOG2_E, decay_of, sigmoid, softplus


@triton.jit
def pick(tile, step, time):
    """Column `step` of a tile, (channel, 1): a choice of registers when T lies in one thread."""
    bits = tl.where(time == step, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def states(a, b, before, time):
    """h_t for every step of the tile, from the state before it."""
    b = tl.where(time == 0, a * before + b, b)
    return tl.associative_scan((a, b), 1, combine)[1]


@triton.jit
def halves(word):
    """The two float32 of a 64-bit word."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def touch_rows(pointer, stride_t, stride_c, rows, width, lane, T: tl.constexpr):
    """A number from every half row of a tile that comes next, which brings it near.

    The caller must use the result, but late: nothing waits for it before.
    """
    row, column = lane % 32 // 2, lane // 32 * 32 + lane % 2 * 16
    return tl.load(pointer + row * stride_t + column * stride_c,
                   (row < rows) & (row < T) & (column < width), other=0)  # fmt: skip


@triton.jit
def touch(pointer, size, lane, STEP: tl.constexpr):
    """A number from every STEP of a block of memory that comes next; as `touch_rows`."""
    return tl.load(pointer + lane * STEP, lane * STEP < size, other=0)


@triton.jit
def fetch(state, first, n_channel, lane, keep, N: tl.constexpr, UNROLL: tl.constexpr):
    """The states first.. of this program's channels, those beyond N 0."""
    found = ()
    for i in tl.static_range(UNROLL):
        n = first + i
        found += (load(state + n * n_channel + lane, keep & (lane * 0 + n < N)),)
    return found


@triton.jit
def load(pointer, mask):
    return tl.load(pointer, mask, other=0.0).to(tl.float32)


@triton.jit
def place(width, n_block, n_group, C: tl.constexpr):
    """Where this program is: segment (of all rows), block (of all groups), group, first channel;
    which lanes hold a channel. Blocks vary fastest, then groups, segments, batch."""
    program = tl.program_id(0).to(tl.int64)
    block, segment = program % (n_block * n_group), program // (n_block * n_group)
    lane = tl.arange(0, C)[:, None]
    group, first = block // n_block, block % n_block * C
    return segment, block, group, group * width + first, lane, lane < width - first


@triton.jit
def first_tile(table, block, n_segment, n_tile):
    """Where a program's tiles begin among the saved ones; table at its segment's row."""
    if table is None:
        tile = tl.program_id(0).to(tl.int64) * n_tile
    else:
        tile = block * n_segment + tl.load(table + 2)
    return tile


@triton.jit
def rate_of(rates, n, n_channel, lane, keep, EXACT: tl.constexpr):
    rate = tl.maximum(load(rates + n * n_channel + lane, keep), -1e30)
    return rate if EXACT else rate * LOG2_E


COUNTS = ["length", "n_tile", "n_segment", "n_block", "n_group", "unit", "u_c", "s_c", "z_c"]


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(u, step, gate, rates, pairs, skip, bias, state, span, out, ungated, saved,
                   table, length, width, n_tile, n_segment, n_block, n_group, unit,
                   u_b, u_c, s_b, s_c, z_b, z_c, n_channel: tl.constexpr,
                   u_t: tl.constexpr, s_t: tl.constexpr, z_t: tl.constexpr,
                   SOFTPLUS: tl.constexpr, GATE: tl.constexpr, SKIP: tl.constexpr,
                   BIAS: tl.constexpr, SAVE: tl.constexpr, SUMMARY: tl.constexpr,
                   FULL: tl.constexpr, EXACT: tl.constexpr,
                   N: tl.constexpr, UNROLL: tl.constexpr, C: tl.constexpr,
                   T: tl.constexpr):  # fmt: skip
    """Outputs of one segment of n_tile tiles, and the state before every tile.

    `state` (segment, state, channel) holds the first state, then the last. SUMMARY: the last
    state alone, and the sum of Delta in `span`, as a sum of two float32. table: None, or, of every
    segment of a packed row, its first token, the one after its last, its first tile; n_segment is
    then the number of tiles.
    """
    segment, block, group, channel, lane, keep = place(width, n_block, n_group, C)
    time = tl.arange(0, T)[None, :]
    batch = segment // n_segment
    start = segment % n_segment * n_tile * T
    left = (length - start).to(tl.int32)
    if table is not None:
        table += 3 * segment
        batch, start = 0, tl.load(table)
        left = (tl.load(table + 1) - start).to(tl.int32)
    flat = (batch * length + start) * n_channel + channel
    u += batch * u_b + channel * u_c + start * u_t
    step += batch * s_b + channel * s_c + start * s_t
    gate += batch * z_b + channel * z_c + start * z_t
    pairs += ((batch * n_group + group) * length + start) * N
    rates += channel
    out += flat
    ungated += flat
    state += segment * N * n_channel + channel
    saved += first_tile(table, block, n_segment, n_tile) * (N * C)
    along = lane * unit  # unit is 1: were it known, lanes would take neighbouring channels
    d = load(skip + channel + along, keep) if SKIP else 0.0
    shift = load(bias + channel + along, keep) if BIAS else 0.0
    total = tl.zeros([C, 1], tl.float32)
    lost = tl.zeros([C, 1], tl.float32)
    sink = tl.zeros([C, 1], tl.float32)
    STEP: tl.constexpr = tl.constexpr(max(8, T * N // C))  # words between touches
    room = width - (channel - group * width)
    for tile in range(tl.minimum(n_tile, tl.cdiv(left, T))):
        if FULL:
            mask = (time >= 0) & (lane >= 0)
            inside = time >= 0
        else:
            inside = time < left - tile * T
            mask = inside & keep
        delta = load(step + time * s_t + lane * s_c, mask) + shift
        value = load(u + time * u_t + lane * u_c, mask)
        delta = softplus(delta, EXACT) if SOFTPLUS else delta
        delta = tl.where(mask, delta, 0.0)
        write = delta * value
        y = value * d
        rows = left - (tile + 1) * T
        near_u = touch_rows(u + T * u_t, u_t, u_c, rows, room, lane, T)
        near_s = touch_rows(step + T * s_t, s_t, s_c, rows, room, lane, T)
        near_p = touch(pairs + T * N, rows * N, lane, STEP)
        held = fetch(state, 0, n_channel, along, keep, N, UNROLL)
        for first in range(0, N, UNROLL):
            following = fetch(state, first + UNROLL, n_channel, along, keep, N, UNROLL)
            for i in tl.static_range(UNROLL):
                n = first + i
                exists = lane * 0 + n < N
                B, read = halves(
                    tl.load(pairs + time * N + n, inside & (time * 0 + n < N), other=0)
                )
                before = held[i]
                if SAVE:
                    tl.store(saved + n * C + along, before, exists)
                rate = rate_of(rates, n, n_channel, along, keep & exists, EXACT)
                s = states(decay_of(delta, rate, EXACT), write * B, before, time)
                if not SUMMARY:
                    y += s * read
                tl.store(state + n * n_channel + along, pick(s, T - 1, time), keep & exists)
            held = following
        sink += near_u.to(tl.float32) + near_s.to(tl.float32) + near_p.to(tl.float32)
        if SUMMARY:
            total, lost = add(total, lost, tl.sum(delta, 1, keep_dims=True))
        else:
            if GATE:
                tl.store(ungated + time * n_channel + along, y.to(out.dtype.element_ty), mask)
                z = load(gate + time * z_t + lane * z_c, mask)
                y *= z * sigmoid(z, EXACT)
            tl.store(out + time * n_channel + along, y.to(out.dtype.element_ty), mask)
        u += T * u_t
        step += T * s_t
        gate += T * z_t
        out += T * n_channel
        ungated += T * n_channel
        pairs += T * N
        saved += N * C
    tl.store(state + along, sink, keep & (lane * 0 + length < 0))  # never
    if SUMMARY:
        store_two(span, segment, n_channel, channel + along, total, lost, keep)


@triton.jit
def add(high, low, value):
    """high + low + value; `low` gathers what rounding loses."""
    total = high + value
    back = total - high
    return total, low + ((high - (total - back)) + (value - back))


@triton.jit
def store_two(to, segment, n_channel, channel, first, second, keep):
    """Two numbers a channel, (segment, 2, channel)."""
    to += segment * 2 * n_channel + channel
    tl.store(to, first, keep)
    tl.store(to + n_channel, second, keep)


@triton.jit(do_not_specialize=["n_segment"])
def connect_kernel(ends, span, rates, outer, offsets, n_segment, size, n_channel,
                   REVERSE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """States at the starts of the segments, in place of their ends from zero.

    h_next = exp(A span) h + end, from `outer` (batch, state, channel), which takes the last.
    REVERSE: from the last segment to the first, for the adjoint. offsets: None, or the first
    segment of every sequence of a packed row.
    """
    program = tl.program_id(0).to(tl.int64)
    n_block = tl.cdiv(size, BLOCK)
    batch = program // n_block
    element = program % n_block * BLOCK + tl.arange(0, BLOCK)
    keep = element < size
    rate = tl.maximum(load(rates + element, keep), -1e30)
    h = load(outer + batch * size + element, keep)
    if offsets is not None:
        first = tl.load(offsets + batch)
        n_segment = (tl.load(offsets + batch + 1) - first).to(tl.int32)
    for i in range(n_segment):
        segment = batch * n_segment if offsets is None else first
        segment += n_segment - 1 - i if REVERSE else i
        total = span + segment * 2 * n_channel + element % n_channel
        high, low = load(total, keep), load(total + n_channel, keep)
        decay = decay_of(high, rate, True)
        decay = tl.where(decay == 0.0, 0.0, decay * (1.0 + rate * low))
        end = load(ends + segment * size + element, keep)
        tl.store(ends + segment * size + element, h, keep)
        h = decay * h + end
    tl.store(outer + batch * size + element, h, keep)
