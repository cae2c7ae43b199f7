"""The walk of ZeroS forward in time: its outputs, or what its gates and queries pull.

State: D = F - H/t, G about the running mean, H (state x a slab of channels), in float32. From the
chunk's start s to its end e, with f = exp(l_s - l_e), r = f/t_s - 1/t_e, x_j = s_j - c_s and
m = c_e - c_s:

    D <- f D + r H + k^T (P_ej - 1/t_e) v,   G <- G - m H + k^T (x_j - m) v,   H <- H + k^T v
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_exp2
from dsf_kernels.zeros_kernels import GAIN, edges, gates_of, place, rows, share, tile


@triton.jit
def read_factors(sums, row, count, known):
    """fade, 1/t and t_s/t of every row: of what was before the chunk."""
    fade = tl.where(known, fast_exp2(tl.minimum(-sums, 0.0).to(tl.float32)), 0.0)
    tokens = count + (row + 1).to(tl.float32)
    part = tl.div_rn(tl.full(tokens.shape, 1.0, tl.float32), tokens)
    return fade, part, count * part


@triton.jit
def carried(d, g, h, left, right, lower, x, inside, count, known, e_log, e_mean, e_count,
            PRECISION: tl.constexpr):  # fmt: skip
    """The states after a chunk; D in units of 1/GAIN."""
    fade = tl.where(known, fast_exp2(tl.minimum(-e_log, 0.0).to(tl.float32)), 0.0)
    part = 1.0 / e_count
    rest = fade / tl.maximum(count, 1.0) - part
    weight = (share(lower, e_log, inside, PRECISION == "ieee") - part) * GAIN
    kind = right.dtype
    value = right.to(tl.float32)
    keys = tl.trans(left)
    d = fade * d + (rest * GAIN) * h
    d = tl.dot(keys, (weight[:, None] * value).to(kind), d, input_precision=PRECISION)
    g -= e_mean * h
    g = tl.dot(keys, ((x - e_mean)[:, None] * value).to(kind), g, input_precision=PRECISION)
    h = tl.dot(keys, right, h, input_precision=PRECISION)
    return d, g, h


@triton.jit(do_not_specialize=["length"])
def walk_kernel(
    query, left, right, logit, first, higher, zero, log_total, mean, moments, initial, out, final,
    asked, parts, length, n_head, n_left, n_right, n_slab,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, s_b, s_t, s_h,
    g1_b, g1_t, g1_h, gh_b, gh_t, gh_h, g0_b, g0_t, g0_h, m_b, m_h, m_o, m_n, m_p,
    a_b, a_t, a_h, a_c,
    HAS_INITIAL: tl.constexpr, HAS_ZERO: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, SLAB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_i = sum_j W_ij (q_i . left_j) right_j, and the last state.

    With PARTS, `parts` (slab, lane, time, 3) holds each order's output before its gate, times
    `asked`: softmax less mean, first order, mean.
    """
    lane = tl.program_id(0).to(tl.int64) // n_slab
    slab = tl.program_id(0) % n_slab
    query += place(lane, n_head, q_b, q_h)
    left += place(lane, n_head, k_b, k_h)
    right += place(lane, n_head, v_b, v_h)
    logit += place(lane, n_head, s_b, s_h)
    first += place(lane, n_head, g1_b, g1_h)
    higher += place(lane, n_head, gh_b, gh_h)
    zero += place(lane, n_head, g0_b, g0_h)
    out += lane // n_head * n_head * length * n_right + lane % n_head * n_right
    log_total += lane * length
    mean += lane * length
    initial += lane * 3
    if PARTS:
        asked += place(lane, n_head, a_b, a_h)
        parts += (slab.to(tl.int64) * (tl.num_programs(0) // n_slab) + lane) * length * 3
    n, p = tl.arange(0, WIDTH), slab * SLAB + tl.arange(0, SLAB)
    whole = (n < n_left)[:, None] & (p < n_right)[None, :]
    d = tl.zeros([WIDTH, SLAB], tl.float32)
    g = tl.zeros([WIDTH, SLAB], tl.float32)
    h = tl.zeros([WIDTH, SLAB], tl.float32)
    if HAS_INITIAL:
        source = moments + place(lane, n_head, m_b, m_h) + n[:, None] * m_n + p[None, :] * m_p
        d += tl.load(source, whole, other=0.0).to(tl.float32) * GAIN
        g += tl.load(source + m_o, whole, other=0.0).to(tl.float32)
        h += tl.load(source + 2 * m_o, whole, other=0.0).to(tl.float32)
    row = tl.arange(0, CHUNK)
    for chunk in range(tl.cdiv(length, CHUNK)):
        start = tl.cast(chunk, tl.int64) * CHUNK
        inside = row < (length - start).to(tl.int32)
        end = tl.minimum(start + CHUNK, length) - 1
        count, known, centre, level, e_log, e_mean, e_count = edges(
            log_total, mean, initial, start, end, HAS_INITIAL)  # fmt: skip
        sums, means, lower, x = rows(
            log_total, mean, logit, s_t, start, row, inside, centre, level)  # fmt: skip
        fade, part, past = read_factors(sums, row, count, known)
        q = tile(query, start, row, inside, q_t, n, n_left, q_c)
        k = tile(left, start, row, inside, k_t, n, n_left, k_c)
        v = tile(right, start, row, inside, v_t, p, n_right, v_c)
        kind = v.dtype
        scaled = 1.0 / tl.maximum(count, 1.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        keep = (row[:, None] >= row[None, :]) & inside[:, None]
        higher_order = (
            share(lower[None, :], sums[:, None], keep, PRECISION == "ieee") - part[:, None]
        )
        first_order = x[None, :] - means[:, None]
        high, slope, none = gates_of(
            first, higher, zero, start, row, inside, g1_t, gh_t, g0_t, HAS_ZERO
        )
        if PARTS:
            w = tl.where(keep, higher_order * GAIN * score, 0.0).to(kind)
            y_high = tl.dot(w, v, input_precision=PRECISION)
            y_high += fade[:, None] * tl.dot(q, d.to(kind), input_precision=PRECISION)
            y_high *= 1.0 / GAIN
            w = tl.where(keep, first_order * part[:, None] * score, 0.0).to(kind)
            y_first = tl.dot(w, v, input_precision=PRECISION)
            in_g = tl.dot(q, (g * scaled).to(kind), input_precision=PRECISION)
            y_first += past[:, None] * in_g
            in_h = tl.dot(q, (h * scaled).to(kind), input_precision=PRECISION)
            y_high += (fade - past)[:, None] * in_h
            y_first -= (past * means)[:, None] * in_h
            w = tl.where(keep, part[:, None] * score, 0.0).to(kind)
            y_zero = tl.dot(w, v, input_precision=PRECISION) + past[:, None] * in_h
            y = high[:, None] * y_high + slope[:, None] * y_first + none[:, None] * y_zero
            wish = tile(asked, start, row, inside, a_t, p, n_right, a_c).to(tl.float32)
            tl.store(parts + start * 3 + row * 3, tl.sum(wish * y_high, 1), inside)
            tl.store(parts + start * 3 + row * 3 + 1, tl.sum(wish * y_first, 1), inside)
            tl.store(parts + start * 3 + row * 3 + 2, tl.sum(wish * y_zero, 1), inside)
        else:
            w = high[:, None] * higher_order + (slope * part)[:, None] * first_order
            w = (w + (none * part)[:, None]) * GAIN * score
            y = tl.dot(tl.where(keep, w, 0.0).to(kind), v, input_precision=PRECISION)
            y += (high * fade)[:, None] * tl.dot(q, d.to(kind), input_precision=PRECISION)
            in_g = tl.dot(q, (g * scaled).to(kind), input_precision=PRECISION)
            y += (slope * past * GAIN)[:, None] * in_g
            c = high * (fade - past) + past * (none - slope * means)
            in_h = tl.dot(q, (h * scaled).to(kind), input_precision=PRECISION)
            y += (c * GAIN)[:, None] * in_h
            y *= 1.0 / GAIN
        store = out + start * n_head * n_right + row[:, None] * (n_head * n_right) + p[None, :]
        tl.store(store, y.to(out.dtype.element_ty), inside[:, None] & (p < n_right)[None, :])
        d, g, h = carried(d, g, h, k, v, lower, x, inside, count, known, e_log, e_mean, e_count,
                          PRECISION)  # fmt: skip
    source = final + lane * 3 * n_left * n_right + n[:, None] * n_right + p[None, :]
    tl.store(source, d * (1.0 / GAIN), whole)
    tl.store(source + n_left * n_right, g, whole)
    tl.store(source + 2 * n_left * n_right, h, whole)
