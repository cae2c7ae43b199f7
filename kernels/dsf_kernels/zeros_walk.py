"""The walk of ZeroS forward in time: its outputs, or what its gates and queries pull.

State: D = F - H/t, G about the running mean, H (state x a slab of channels), in float32. From the
chunk's start s to its end e, with f = exp(l_s - l_e), r = f/t_s - 1/t_e, x_j = s_j - c_s and
m = c_e - c_s:

    D <- f D + r H + k^T (P_ej - 1/t_e) v,   G <- G - m H + k^T (x_j - m) v,   H <- H + k^T v
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.chunks import cells, rows
from dsf_kernels.zeros_kernels import (
    ENDS,
    FADE,
    FLAT,
    GAIN,
    HIGH,
    INTO_D,
    INTO_G,
    LOGIT,
    MEAN,
    OF_D,
    OF_H,
    PART,
    REST,
    SLOPE,
    TOP,
    added,
    pair,
    place,
    take,
    unit,
)


@triton.jit
def entering(source, row, column, inside, stride_o, stride_n, stride_p, GIVEN: tl.constexpr):
    """The three states that a walk starts from."""
    d = tl.zeros(inside.shape, tl.float32)
    g = tl.zeros(inside.shape, tl.float32)
    h = tl.zeros(inside.shape, tl.float32)
    if GIVEN:
        source += row * stride_n + column * stride_p
        d += tl.load(source, inside, other=0.0).to(tl.float32)
        g += tl.load(source + stride_o, inside, other=0.0).to(tl.float32)
        h += tl.load(source + 2 * stride_o, inside, other=0.0).to(tl.float32)
    return d, g, h


@triton.jit
def nothing(state, EXACT: tl.constexpr):
    """What rounding has lost so far, where that is kept."""
    return tl.zeros_like(state) if EXACT else 0.0


@triton.jit
def leave(target, row, column, inside, d, g, h, n_left, n_right):
    """The three states that a walk ends with."""
    target += row * n_right + column
    tl.store(target, d, inside)
    tl.store(target + n_left * n_right, g, inside)
    tl.store(target + 2 * n_left * n_right, h, inside)


@triton.jit
def reduced(state, past, SCALED: tl.constexpr):
    """The state over how many tokens it has seen where SCALED, as a narrow type asks for."""
    return state / past if SCALED else state


@triton.jit
def existing(time, length, column, width, FULL: tl.constexpr):
    """Which cells of a tile exist: all where FULL."""
    return (time >= 0) & (column >= 0) if FULL else (time < length) & (column < width)


@triton.jit
def scaled(value, factor):
    """Rows of a tile times their factors, in its type."""
    return (value.to(tl.float32) * factor[:, None]).to(value.dtype)


@triton.jit
def asked_of(wish, read, PARTS: tl.constexpr):
    """Rows of `wish` times those of `read`, summed, where PARTS."""
    if PARTS:
        total = tl.sum(wish.to(tl.float32) * read, 1)
    else:
        total = tl.zeros([read.shape[0]], tl.float32)
    return total


@triton.jit
def from_states(qs, wish, d, g, h, chunk, PARTS: tl.constexpr, SCALED: tl.constexpr,
                PRECISION: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """What rows read of the states, GAIN times, and its share of each order, before part."""
    kind = qs.dtype
    past = tl.load(chunk + ENDS * CHUNK + 3) if SCALED else 1.0
    read = tl.dot(qs, d.to(kind), input_precision=PRECISION)
    y = take(chunk, OF_D, 0, CHUNK, CHUNK)[:, None] * read
    by_high = asked_of(wish, read, PARTS)
    read = tl.dot(qs, reduced(g, past, SCALED).to(kind), input_precision=PRECISION)
    y += (take(chunk, SLOPE, 0, CHUNK, CHUNK) * past)[:, None] * read
    by_first = past * asked_of(wish, read, PARTS)
    read = tl.dot(qs, reduced(h, past, SCALED).to(kind), input_precision=PRECISION)
    y += (take(chunk, OF_H, 0, CHUNK, CHUNK) * past)[:, None] * read
    by_zero = past * asked_of(wish, read, PARTS)
    if PARTS:
        by_high *= take(chunk, FADE, 0, CHUNK, CHUNK)
        by_high += take(chunk, REST, 0, CHUNK, CHUNK) * by_zero
        by_first -= take(chunk, MEAN, 0, CHUNK, CHUNK) * by_zero
    return y, by_high, by_first, by_zero


@triton.jit
def from_pairs(wish, right, score, share, over, keep, chunk, EXACT: tl.constexpr,
               PRECISION: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The share of each order, before part, that rows read of a chunk's tokens."""
    near = tl.dot(wish, tl.trans(right), input_precision=PRECISION)
    near = tl.where(keep, near * score, 0.0)
    plain = tl.sum(near, 1)
    base = tl.load(chunk + ENDS * CHUNK + 5) - take(chunk, MEAN, 0, CHUNK, CHUNK)
    by_high = tl.sum(near * share, 1) - take(chunk, PART, 0, CHUNK, CHUNK) * plain
    by_first = unit(EXACT) * tl.sum(near * over, 1) + base * plain
    return by_high, by_first, plain


@triton.jit
def faded(d, g, h, chunk, EXACT: tl.constexpr, CHUNK: tl.constexpr):
    """The states at a chunk's end without its tokens, or where EXACT what that adds to them."""
    fall = tl.load(chunk + ENDS * CHUNK)
    rest = tl.load(chunk + ENDS * CHUNK + 1)
    mean = tl.load(chunk + ENDS * CHUNK + 2)
    if EXACT:
        more = fall * d + rest * h, -mean * h, tl.zeros_like(h)
    else:
        more = d + fall * d + rest * h, g - mean * h, h
    return more[0], more[1], more[2], fall


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def walk_kernel(
    query, left, right, factors, moments, out, final, asked, parts,
    length, n_chunk, segment, n_head, n_left, n_right,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c,
    m_b, m_h, m_s, m_o, m_n, m_p, a_b, a_t, a_h, a_c,
    HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr, EXACT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    SLAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y_i = sum_j W_ij (q_i . left_j) right_j and the last states, of a segment of chunks.

    W_ij = HIGH_i 2^(LOGIT_j - TOP_i) + SLOPE_i (s_j - c_s) + FLAT_i in a chunk, COLUMNS of j at a
    time, and OF_D D + SLOPE G + OF_H H of what was before it. SCALED: G and H are read over t_s,
    as a narrow type asks for. With PARTS, `parts` (slab, lane, time, 3) holds each order's output
    before its gate, times `asked`: softmax less mean, first order, mean.
    """
    n_slab, n_segment = tl.cdiv(n_right, SLAB), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    slab, program = program % n_slab, program // n_slab
    segment_number, lane = (program % n_segment).to(tl.int32), program // n_segment
    begin, stop = segment_number * segment, tl.minimum((segment_number + 1) * segment, n_chunk)
    offset = slab.to(tl.int32) * SLAB
    query += place(lane, n_head, q_b, q_h)
    left += place(lane, n_head, k_b, k_h)
    right += place(lane, n_head, v_b, v_h)
    out += lane // n_head * n_head * length * n_right + lane % n_head * n_right
    factors += lane * n_chunk * (ROWS * CHUNK)
    if PARTS:
        asked += place(lane, n_head, a_b, a_h)
        parts += (slab * (tl.num_programs(0) // (n_slab * n_segment)) + lane) * length * 3
    row, column, inside = cells(offset, n_left, n_right, FULL, WIDTH, SLAB)
    source = moments + place(lane, n_head, m_b, m_h) + segment_number.to(tl.int64) * m_s
    d, g, h = entering(source, row, column, inside, m_o, m_n, m_p, HAS_INITIAL)
    d *= GAIN
    d_low, g_low, h_low = nothing(d, EXACT), nothing(d, EXACT), nothing(d, EXACT)
    i, j = tl.arange(0, CHUNK), tl.arange(0, COLUMNS)
    # A loop that may not run at all makes ptxas take every product to its end at once.
    for passed in tl.range(0, tl.maximum(stop - begin, 1), num_stages=STAGES):
        number = begin + passed
        first = number * CHUNK
        chunk = factors + number.to(tl.int64) * (ROWS * CHUNK)
        if STORE:
            qs = rows(query, first, length, q_t, q_c, n_left, 0, FULL, CHUNK, WIDTH)
            wish = qs
            if PARTS:
                wish = rows(asked, first, length, a_t, a_c, n_right, offset, FULL, CHUNK, SLAB)
            y, by_high, by_first, by_zero = from_states(qs, wish, d, g, h, chunk, PARTS, SCALED,
                                                        PRECISION, CHUNK)  # fmt: skip
            high, flat = take(chunk, HIGH, 0, CHUNK, CHUNK), take(chunk, FLAT, 0, CHUNK, CHUNK)
            slope = take(chunk, SLOPE, 0, CHUNK, CHUNK) * unit(EXACT)
            top = take(chunk, TOP, 0, CHUNK, CHUNK)
        d_more, g_more, h_more, fall = faded(d, g, h, chunk, EXACT, CHUNK)
        for at in tl.static_range(0, CHUNK, COLUMNS):
            ks = rows(left, first + at, length, k_t, k_c, n_left, 0, FULL, COLUMNS, WIDTH)
            vs = rows(right, first + at, length, v_t, v_c, n_right, offset, FULL, COLUMNS, SLAB)
            if STORE:
                score = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
                keep = i[:, None] >= (at + j)[None, :]
                own = take(chunk, LOGIT, at, CHUNK, COLUMNS)
                share, over = pair(top, own, chunk, keep, 0, at, 1, EXACT, CHUNK, CHUNK, COLUMNS)
                w = high[:, None] * share + flat[:, None] + slope[:, None] * over
                w = tl.where(keep, w * score, 0.0).to(vs.dtype)
                if PARTS:
                    more = from_pairs(wish, vs, score, share, over, keep, chunk, EXACT,
                                      PRECISION, CHUNK)  # fmt: skip
                    by_high, by_first, by_zero = (
                        by_high + more[0], by_first + more[1], by_zero + more[2],
                    )  # fmt: skip
                y = tl.dot(w, vs, y, input_precision=PRECISION)
            keys = tl.trans(ks)
            h_more = tl.dot(keys, vs, h_more, input_precision=PRECISION)
            weighed = scaled(vs, take(chunk, INTO_D, at, CHUNK, COLUMNS))
            d_more = tl.dot(keys, weighed, d_more, input_precision=PRECISION)
            weighed = scaled(vs, take(chunk, INTO_G, at, CHUNK, COLUMNS))
            g_more = tl.dot(keys, weighed, g_more, input_precision=PRECISION)
        if EXACT:
            d, d_low = added(d, d_low * (1.0 + fall), d_more)
            g, g_low = added(g, g_low, g_more)
            h, h_low = added(h, h_low, h_more)
        else:
            d, g, h = d_more, g_more, h_more
        if STORE:
            known = existing(first + i[:, None], length, column, n_right, FULL)
            target = out + (first + i).to(tl.int64)[:, None] * (n_head * n_right) + column
            y = tl.cast(y * (1.0 / GAIN), out.dtype.element_ty)
            tl.store(target, y, known)
            if PARTS:
                target = parts + (first + i).to(tl.int64) * 3
                part = take(chunk, PART, 0, CHUNK, CHUNK)
                tl.store(target, by_high, first + i < length)
                tl.store(target + 1, part * by_first, first + i < length)
                tl.store(target + 2, part * by_zero, first + i < length)
    if FINAL:
        final += (lane * n_segment + segment_number) * 3 * n_left * n_right
        leave(final, row, column, inside, d * (1.0 / GAIN), g, h, n_left, n_right)
