"""The walk of ZeroS backward in time, and what closes the gradients of its logits.

Adjoint states E_D, E_G, E_H of what is held at a chunk's end. Token j of the chunk gets

    (P_ej - 1/t_e) E_D + (x_j - m) E_G + E_H    and, from rows i of the chunk, W_ij.
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.combine import combine
from dsf_kernels.exponentials import fast_exp2
from dsf_kernels.zeros_kernels import GAIN, edges, gates_of, place, rows, share, tile
from dsf_kernels.zeros_walk import read_factors


@triton.jit
def pulled(d, g, h, pull, read, high, slope, none, fade, part, means, count, known, e_log, e_mean,
           e_count, PRECISION: tl.constexpr):  # fmt: skip
    """The adjoint states at a chunk's start; E_G and E_H in units of 1/GAIN."""
    kind = read.dtype
    value = read.to(tl.float32)
    turned = tl.trans(pull)
    whole = tl.where(known, fast_exp2(tl.minimum(-e_log, 0.0).to(tl.float32)), 0.0)
    tokens = tl.maximum(count, 1.0)
    rest = whole / tokens - tl.div_rn(1.0, e_count)
    h += (rest * GAIN) * d - e_mean * g
    c = high * (fade / tokens - part) + part * (none - slope * means)
    h = tl.dot(turned, ((c * GAIN)[:, None] * value).to(kind), h, input_precision=PRECISION)
    d = tl.dot(
        turned, ((high * fade)[:, None] * value).to(kind), whole * d, input_precision=PRECISION
    )
    c = slope * part * GAIN
    g = tl.dot(turned, (c[:, None] * value).to(kind), g, input_precision=PRECISION)
    return d, g, h


@triton.jit(do_not_specialize=["length"])
def adjoint_kernel(
    other, pull, read, logit, first, higher, zero, log_total, mean, final, initial, out,
    start_grad, asked, parts, length, n_head, n_left, n_right, n_slab,
    k_b, k_t, k_h, k_c, q_b, q_t, q_h, q_c, v_b, v_t, v_h, v_c, s_b, s_t, s_h,
    g1_b, g1_t, g1_h, gh_b, gh_t, gh_h, g0_b, g0_t, g0_h, m_b, m_h, m_o, m_n, m_p,
    a_b, a_t, a_h, a_c,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_ZERO: tl.constexpr,
    PARTS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_j = sum_{i>=j} W_ij (other_j . pull_i) read_i, and the gradient of the first state.

    With PARTS, `parts` (slab, lane, time) holds the same with d W_ij / d s_j in place of W_ij,
    shares and means held fixed elsewhere, times `asked`.
    """
    lane = tl.program_id(0).to(tl.int64) // n_slab
    slab = tl.program_id(0) % n_slab
    other += place(lane, n_head, k_b, k_h)
    pull += place(lane, n_head, q_b, q_h)
    read += place(lane, n_head, v_b, v_h)
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
        parts += (slab.to(tl.int64) * (tl.num_programs(0) // n_slab) + lane) * length
    n, p = tl.arange(0, WIDTH), slab * SLAB + tl.arange(0, SLAB)
    whole = (n < n_left)[:, None] & (p < n_right)[None, :]
    d = tl.zeros([WIDTH, SLAB], tl.float32)
    g = tl.zeros([WIDTH, SLAB], tl.float32)
    h = tl.zeros([WIDTH, SLAB], tl.float32)
    if HAS_FINAL:
        source = final + place(lane, n_head, m_b, m_h) + n[:, None] * m_n + p[None, :] * m_p
        d += tl.load(source, whole, other=0.0).to(tl.float32)
        g += tl.load(source + m_o, whole, other=0.0).to(tl.float32) * GAIN
        h += tl.load(source + 2 * m_o, whole, other=0.0).to(tl.float32) * GAIN
    row = tl.arange(0, CHUNK)
    n_chunk = tl.cdiv(length, CHUNK)
    for passed in range(n_chunk):
        start = tl.cast(n_chunk - 1 - passed, tl.int64) * CHUNK
        inside = row < (length - start).to(tl.int32)
        end = tl.minimum(start + CHUNK, length) - 1
        count, known, centre, level, e_log, e_mean, e_count = edges(
            log_total, mean, initial, start, end, HAS_INITIAL)  # fmt: skip
        sums, means, lower, x = rows(
            log_total, mean, logit, s_t, start, row, inside, centre, level)  # fmt: skip
        fade, part, _ = read_factors(sums, row, count, known)
        fade = tl.where(inside, fade, 0.0)
        high, slope, none = gates_of(
            first, higher, zero, start, row, inside, g1_t, gh_t, g0_t, HAS_ZERO
        )
        k = tile(other, start, row, inside, k_t, n, n_left, k_c)
        q = tile(pull, start, row, inside, q_t, n, n_left, q_c)
        v = tile(read, start, row, inside, v_t, p, n_right, v_c)
        kind = v.dtype
        in_d = tl.dot(k, d.to(kind), input_precision=PRECISION)
        in_g = tl.dot(k, g.to(kind), input_precision=PRECISION)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        keep = (row[None, :] >= row[:, None]) & inside[None, :]
        p_ij = share(lower[:, None], sums[None, :], keep, PRECISION == "ieee")
        w = high[None, :] * (p_ij - part[None, :]) + (none * part)[None, :]
        w += (slope * part)[None, :] * (x[:, None] - means[None, :])
        w = tl.where(keep, w * GAIN * score, 0.0).to(kind)
        y = tl.dot(w, v, input_precision=PRECISION)
        y = tl.dot(k, h.to(kind), y, input_precision=PRECISION)
        p_end = share(lower, e_log, inside, PRECISION == "ieee")
        y += ((p_end - tl.div_rn(1.0, e_count)) * GAIN)[:, None] * in_d
        y = (y + (x - e_mean)[:, None] * in_g) * (1.0 / GAIN)
        if PARTS:
            w = (high[None, :] * p_ij + (slope * part)[None, :]) * GAIN * score
            u = tl.dot(tl.where(keep, w, 0.0).to(kind), v, input_precision=PRECISION)
            u = (u + in_g) * (1.0 / GAIN) + p_end[:, None] * in_d
            wish = tile(asked, start, row, inside, a_t, p, n_right, a_c).to(tl.float32)
            tl.store(parts + start + row, tl.sum(wish * u, 1), inside)
        store = out + start * n_head * n_right + row[:, None] * (n_head * n_right) + p[None, :]
        tl.store(store, y.to(out.dtype.element_ty), inside[:, None] & (p < n_right)[None, :])
        d, g, h = pulled(d, g, h, q, v, high, slope, none, fade, part, means, count, known, e_log,
                         e_mean, e_count, PRECISION)  # fmt: skip
    source = start_grad + lane * 3 * n_left * n_right + n[:, None] * n_right + p[None, :]
    tl.store(source, d, whole)
    tl.store(source + n_left * n_right, g * (1.0 / GAIN), whole)
    tl.store(source + 2 * n_left * n_right, h * (1.0 / GAIN), whole)


@triton.jit(do_not_specialize=["length"])
def close_kernel(logit, log_total, initial, steep, flat, ends, own, out, first_ends, length,
                 n_head, s_b, s_t, s_h, HAS_INITIAL: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of the logits from the last token on: `own` less what shares and means pull.

    own_j - exp(s_j - l_j) r_j - R_j, r_j = steep_j + exp(l_j - l_{j+1}) r_{j+1}, R_j = flat_j +
    R_{j+1}; `ends`: r and R after the last token; first_ends: before the first. In float64.
    """
    lane = tl.program_id(0).to(tl.int64)
    logit += place(lane, n_head, s_b, s_h)
    out += lane // n_head * n_head * length + lane % n_head
    base = lane * length
    r = tl.load(ends + lane * 2)
    total = tl.load(ends + lane * 2 + 1)
    row = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(length, BLOCK)):
        step = length - 1 - (tl.cast(block, tl.int64) * BLOCK + row)
        inside = step >= 0
        level = tl.load(log_total + base + step, inside, other=0.0)
        later = inside & (step < length - 1)
        after = tl.load(log_total + base + step + 1, later, other=0.0)
        decay = tl.where(later, tl.exp(tl.where(later, level - after, 0.0)), 1.0)
        pull = tl.load(steep + base + step, inside, other=0.0).to(tl.float64)
        decay, sums = tl.associative_scan((decay, pull), 0, combine)
        sums += decay * r
        pull = tl.load(flat + base + step, inside, other=0.0).to(tl.float64)
        means = total + tl.cumsum(pull, 0)
        s = tl.load(logit + step * s_t, inside, other=0.0).to(tl.float64)
        grad = tl.load(own + base + step, inside, other=0.0).to(tl.float64)
        grad -= tl.exp(tl.where(inside, s - level, 0.0)) * sums + means
        tl.store(out + step * n_head, grad.to(out.dtype.element_ty), inside)
        end = row == BLOCK - 1
        r = tl.sum(tl.where(end, sums, 0.0), 0)
        total = tl.sum(tl.where(end, means, 0.0), 0)
    if HAS_INITIAL:
        before = tl.load(initial + lane * 3)
        r *= tl.exp(before - tl.load(log_total + base))
    tl.store(first_ends + lane * 2, r)
    tl.store(first_ends + lane * 2 + 1, total)
