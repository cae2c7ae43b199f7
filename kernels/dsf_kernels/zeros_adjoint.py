"""The walk of ZeroS backward in time, and what closes the gradients of its logits and gates.

Adjoint states E_D, E_G, E_H of what is held at a chunk's end. Token j of the chunk gets

    (P_ej - 1/t_e) E_D + (x_j - m) E_G + E_H    and, from rows i of the chunk, W_ij.
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.chunks import cells, rows
from dsf_kernels.combine import combine
from dsf_kernels.zeros_kernels import (
    ENDS,
    FLAT,
    GAIN,
    HIGH,
    INTO_D,
    INTO_G,
    LOGIT,
    OF_D,
    OF_H,
    SLOPE,
    TOP,
    added,
    pair,
    place,
    take,
    unit,
)
from dsf_kernels.zeros_walk import asked_of, entering, existing, leave, nothing, scaled


@triton.jit
def faded(d, g, h, chunk, EXACT: tl.constexpr, CHUNK: tl.constexpr):
    """The adjoint states at a chunk's start without its rows, or where EXACT what that adds."""
    fall = tl.load(chunk + ENDS * CHUNK)
    rest = tl.load(chunk + ENDS * CHUNK + 1)
    mean = tl.load(chunk + ENDS * CHUNK + 2)
    if EXACT:
        more = fall * d, tl.zeros_like(g), rest * d - mean * g
    else:
        more = d + fall * d, g, h + rest * d - mean * g
    return more[0], more[1], more[2], fall


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def adjoint_kernel(
    other, pull, values, factors, moments, out, final, asked, parts,
    length, n_chunk, segment, n_head, n_left, n_right,
    k_b, k_t, k_h, k_c, q_b, q_t, q_h, q_c, v_b, v_t, v_h, v_c,
    m_b, m_h, m_s, m_o, m_n, m_p, a_b, a_t, a_h, a_c,
    HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr, EXACT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    SLAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out_j = sum_{i>=j} W_ij (other_j . pull_i) values_i, and the gradient of the first states.

    Arguments as walk_kernel; moments: the gradient of the last states. With PARTS, `parts` (slab,
    lane, time) holds the same with d W_ij / d s_j in place of W_ij, shares and means held fixed
    elsewhere, times `asked`.
    """
    n_slab, n_segment = tl.cdiv(n_right, SLAB), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    slab, program = program % n_slab, program // n_slab
    segment_number, lane = (program % n_segment).to(tl.int32), program // n_segment
    begin, stop = segment_number * segment, tl.minimum((segment_number + 1) * segment, n_chunk)
    offset = slab.to(tl.int32) * SLAB
    other += place(lane, n_head, k_b, k_h)
    pull += place(lane, n_head, q_b, q_h)
    values += place(lane, n_head, v_b, v_h)
    out += lane // n_head * n_head * length * n_right + lane % n_head * n_right
    factors += lane * n_chunk * (ROWS * CHUNK)
    if PARTS:
        asked += place(lane, n_head, a_b, a_h)
        parts += (slab * (tl.num_programs(0) // (n_slab * n_segment)) + lane) * length
    row, column, inside = cells(offset, n_left, n_right, FULL, WIDTH, SLAB)
    source = moments + place(lane, n_head, m_b, m_h) + segment_number.to(tl.int64) * m_s
    d, g, h = entering(source, row, column, inside, m_o, m_n, m_p, HAS_INITIAL)
    g *= GAIN
    h *= GAIN
    d_low, g_low, h_low = nothing(d, EXACT), nothing(d, EXACT), nothing(d, EXACT)
    j, i = tl.arange(0, CHUNK), tl.arange(0, COLUMNS)
    # A loop that may not run at all makes ptxas take every product to its end at once.
    for passed in tl.range(0, tl.maximum(stop - begin, 1), num_stages=STAGES):
        number = stop - 1 - passed
        first = number * CHUNK
        chunk = factors + number.to(tl.int64) * (ROWS * CHUNK)
        if STORE:
            ks = rows(other, first, length, k_t, k_c, n_left, 0, FULL, CHUNK, WIDTH)
            kind = ks.dtype
            own, into_d = take(chunk, LOGIT, 0, CHUNK, CHUNK), take(chunk, INTO_D, 0, CHUNK, CHUNK)
            wish = ks
            if PARTS:
                wish = rows(asked, first, length, a_t, a_c, n_right, offset, FULL, CHUNK, SLAB)
            read = tl.dot(ks, d.to(kind), input_precision=PRECISION)
            y = into_d[:, None] * read
            into_f = into_d + GAIN * tl.load(chunk + ENDS * CHUNK + 4)  # exp(s_j - l_e) GAIN
            seen = into_f * asked_of(wish, read, PARTS)
            read = tl.dot(ks, g.to(kind), input_precision=PRECISION)
            y += take(chunk, INTO_G, 0, CHUNK, CHUNK)[:, None] * read
            seen += asked_of(wish, read, PARTS)
            y = tl.dot(ks, h.to(kind), y, input_precision=PRECISION)
        d_more, g_more, h_more, fall = faded(d, g, h, chunk, EXACT, CHUNK)
        for at in tl.static_range(0, CHUNK, COLUMNS):
            qs = rows(pull, first + at, length, q_t, q_c, n_left, 0, FULL, COLUMNS, WIDTH)
            vs = rows(values, first + at, length, v_t, v_c, n_right, offset, FULL, COLUMNS, SLAB)
            slope = take(chunk, SLOPE, at, CHUNK, COLUMNS)
            if STORE:
                score = tl.dot(ks, tl.trans(qs), input_precision=PRECISION)
                keep = (at + i)[None, :] >= j[:, None]
                top = take(chunk, TOP, at, CHUNK, COLUMNS)
                share, over = pair(top, own, chunk, keep, at, 0, 0, EXACT, CHUNK, COLUMNS, CHUNK)
                w = take(chunk, HIGH, at, CHUNK, COLUMNS)[None, :] * share
                if PARTS:
                    near = tl.dot(wish, tl.trans(vs), input_precision=PRECISION)
                    near = tl.where(keep, (w + slope[None, :]) * near * score, 0.0)
                    seen += tl.sum(near, 1)
                w += (slope * unit(EXACT))[None, :] * over
                w += take(chunk, FLAT, at, CHUNK, COLUMNS)[None, :]
                w = tl.where(keep, w * score, 0.0).to(kind)
                y = tl.dot(w, vs, y, input_precision=PRECISION)
            turned = tl.trans(qs)
            weighed = scaled(vs, take(chunk, OF_D, at, CHUNK, COLUMNS))
            d_more = tl.dot(turned, weighed, d_more, input_precision=PRECISION)
            weighed = scaled(vs, slope)
            g_more = tl.dot(turned, weighed, g_more, input_precision=PRECISION)
            weighed = scaled(vs, take(chunk, OF_H, at, CHUNK, COLUMNS))
            h_more = tl.dot(turned, weighed, h_more, input_precision=PRECISION)
        if EXACT:
            d, d_low = added(d, d_low * (1.0 + fall), d_more)
            g, g_low = added(g, g_low, g_more)
            h, h_low = added(h, h_low, h_more)
        else:
            d, g, h = d_more, g_more, h_more
        if STORE:
            known = existing(first + j[:, None], length, column, n_right, FULL)
            target = out + (first + j).to(tl.int64)[:, None] * (n_head * n_right) + column
            y = tl.cast(y * (1.0 / GAIN), out.dtype.element_ty)
            tl.store(target, y, known)
            if PARTS:
                tl.store(parts + first + j, seen * (1.0 / GAIN), first + j < length)
    if FINAL:
        final += (lane * n_segment + segment_number) * 3 * n_left * n_right
        leave(final, row, column, inside, d, g * (1.0 / GAIN), h * (1.0 / GAIN), n_left, n_right)


@triton.jit
def over_slabs(source, slabs, stride, inside):
    """The sum of what the slabs of channels gave, in float64."""
    total = tl.zeros(inside.shape, tl.float64)
    for slab in range(slabs):
        total += tl.load(source + slab * stride, inside, other=0.0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=["length"])
def close_kernel(logit, first, higher, log_total, initial, parts, own, ends, out, d_first,
                 d_higher, d_zero, first_ends, length, n_head, n_part, n_own, s_b, s_t, s_h,
                 g1_b, g1_t, g1_h, gh_b, gh_t, gh_h, HAS_INITIAL: tl.constexpr,
                 HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of gates and logits from the last token on.

    parts, own: of the walks, n_part and n_own slabs; with A_j = higher (parts_0 + parts_2), B_j =
    slope parts_2 / t, ds_j = own_j - exp(s_j - l_j) r_j - R_j, r_j = A_j + exp(l_j - l_{j+1})
    r_{j+1}, R_j = B_j + R_{j+1}; `ends`: r and R after the last token; first_ends: before the
    first. Sums in float64.
    """
    lane = tl.program_id(0).to(tl.int64)
    lanes = tl.num_programs(0).to(tl.int64)
    logit += place(lane, n_head, s_b, s_h)
    first += place(lane, n_head, g1_b, g1_h)
    higher += place(lane, n_head, gh_b, gh_h)
    target = lane // n_head * n_head * length + lane % n_head
    parts += lane * length * 3
    log_total += lane * length
    own += lane * length
    count = tl.zeros([], tl.float64)
    if HAS_INITIAL:
        count += tl.load(initial + lane * 3 + 2)
    r = tl.load(ends + lane * 2)
    total = tl.load(ends + lane * 2 + 1)
    row = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(length, BLOCK)):
        step = length - 1 - (tl.cast(block, tl.int64) * BLOCK + row)
        inside = step >= 0
        at = target + step * n_head
        by_high = over_slabs(parts + step * 3, n_part, lanes * length * 3, inside)
        by_first = over_slabs(parts + step * 3 + 1, n_part, lanes * length * 3, inside)
        by_zero = over_slabs(parts + step * 3 + 2, n_part, lanes * length * 3, inside)
        high = tl.load(higher + step * gh_t, inside, other=0.0).to(tl.float64)
        slope = tl.load(first + step * g1_t, inside, other=0.0).to(tl.float64) - high
        tl.store(d_first + at, by_first.to(d_first.dtype.element_ty), inside)
        tl.store(d_higher + at, (by_high - by_first).to(d_higher.dtype.element_ty), inside)
        if HAS_ZERO:
            tl.store(d_zero + at, by_zero.to(d_zero.dtype.element_ty), inside)
        level = tl.load(log_total + step, inside, other=0.0)
        later = inside & (step < length - 1)
        after = tl.load(log_total + step + 1, later, other=0.0)
        decay = tl.where(later, tl.exp(tl.where(later, level - after, 0.0)), 1.0)
        decay, sums = tl.associative_scan((decay, high * (by_high + by_zero)), 0, combine)
        sums += decay * r
        tokens = tl.where(inside, count + (step + 1).to(tl.float64), 1.0)
        means = total + tl.cumsum(slope * by_zero / tokens, 0)
        s = tl.load(logit + step * s_t, inside, other=0.0).to(tl.float64)
        grad = over_slabs(own + step, n_own, lanes * length, inside)
        grad -= tl.exp(tl.where(inside, s - level, 0.0)) * sums + means
        tl.store(out + at, grad.to(out.dtype.element_ty), inside)
        end = row == BLOCK - 1
        r = tl.sum(tl.where(end, sums, 0.0), 0)
        total = tl.sum(tl.where(end, means, 0.0), 0)
    if HAS_INITIAL:
        r *= tl.exp(tl.load(initial + lane * 3) - tl.load(log_total))
    tl.store(first_ends + lane * 2, r)
    tl.store(first_ends + lane * 2 + 1, total)
