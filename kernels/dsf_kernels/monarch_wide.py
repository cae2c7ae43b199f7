"""The half-steps of monarch_attention whose tiles do not fit in one program: one step, forward.

A program holds ROWS rows and walks over what they attend to, COLUMNS at a time, with running
maximum, sum and entropy: on a new maximum top', with f = 2^(top - top'),

    E' = f (E + Z (top - top')) + E_new,   Z' = f Z + Z_new,   sum w log2 w = E / Z - log2 Z.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import LN_2, LOG2_E, fast_exp2, fast_log2
from dsf_kernels.monarch_kernels import NONE, SIZES, gather, kept, lane, scatter, tokens


@triton.jit
def power(x, EXACT: tl.constexpr):
    """2^x."""
    return tl.exp2(x) if EXACT else fast_exp2(x)


@triton.jit(do_not_specialize=SIZES)
def wide_right_kernel(
    query, key, value, mask, means, entropy, mixed,
    length, b, m, front, head, share, width, channels, scale,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, m_b, m_t,
    HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`right_kernel` of the first and last step, for ROWS places of a block."""
    parts = tl.cdiv(b, ROWS)
    batch, h, both, tile = lane(m * parts, head)
    k, start = tile // parts, tile % parts * ROWS
    at, near = tokens(b - start, 1, k * b + start - front, length, ROWS)
    asks = kept(mask, batch, at, near, m_b, m_t, HAS_MASK)
    a = gather(query + batch * q_b + h * q_h, at, asks, q_t, q_d, width, WIDTH, COMPUTE)
    key += batch * k_b + h // share * k_h
    value += batch * v_b + h * v_h
    EXACT: tl.constexpr = a.dtype == tl.float32
    top = tl.full([ROWS], NONE, tl.float32)
    total, moved = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    y = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, b, COLUMNS):
        time, there = tokens(b - first, 1, k * b + first - front, length, COLUMNS)
        real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
        keys = gather(key, time, real, k_t, k_d, width, WIDTH, COMPUTE)
        values = gather(value, time, real, v_t, v_d, channels, CHANNELS, COMPUTE)
        x = tl.dot(a, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        x = tl.where(real[None, :], x, NONE)
        new = tl.maximum(top, tl.max(x, 1))
        factor = power(top - new, EXACT)
        x = x - new[:, None]
        e = power(x, EXACT)
        moved = factor * (moved + total * (top - new)) + tl.sum(e * x, 1)
        total = factor * total + tl.sum(e, 1)
        e = e.to(COMPUTE)
        mean = mean * factor[:, None] + tl.dot(e, keys, input_precision=PRECISION)
        y = y * factor[:, None] + tl.dot(e, values, input_precision=PRECISION)
        top = new
    place = start + tl.arange(0, ROWS)
    row = (both * b + place) * m + k
    inside = place < b
    log = tl.log2(total) if EXACT else fast_log2(total)
    inner = tl.where(top > NONE, (moved / total - log) * LN_2, float("inf"))
    tl.store(entropy + row, inner, mask=inside)
    scatter(means, mean * (scale / total)[:, None], row, inside, width, 1, width)
    scatter(mixed, y / total[:, None], row, inside, channels, 1, channels)


@triton.jit(do_not_specialize=SIZES)
def wide_left_kernel(
    query, means, entropy, mixed, out, length, b, m, front, head, width, channels,
    q_b, q_t, q_h, q_d, o_b, o_t, o_h, o_d, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`left_kernel` of the last step, for ROWS blocks of a place."""
    parts = tl.cdiv(m, ROWS)
    batch, h, both, tile = lane(b * parts, head, True)
    j, start = tile // parts, tile % parts * ROWS
    time, there = tokens(m - start, b, j - front + start * b, length, ROWS)
    q = gather(query + batch * q_b + h * q_h, time, there, q_t, q_d, width, WIDTH, COMPUTE)
    EXACT: tl.constexpr = q.dtype == tl.float32
    top = tl.full([ROWS], NONE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, m, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        inside = k < m
        row = (both * b + j) * m + k
        a = gather(means, row, inside, width, 1, width, WIDTH, COMPUTE)
        y = gather(mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
        c = tl.load(entropy + row, mask=inside, other=float("inf"))
        x = tl.dot(q, tl.trans(a), input_precision=PRECISION) * LOG2_E - (c * LOG2_E)[None, :]
        new = tl.maximum(top, tl.max(x, 1))
        factor = power(top - new, EXACT)
        e = power(x - new[:, None], EXACT)
        total = factor * total + tl.sum(e, 1)
        e = e.to(COMPUTE)
        o = o * factor[:, None] + tl.dot(e, y, input_precision=PRECISION)
        top = new
    o = o / tl.where(total == 0.0, 1.0, total)[:, None]
    scatter(out + batch * o_b + h * o_h, o, time, there, o_t, o_d, channels)
