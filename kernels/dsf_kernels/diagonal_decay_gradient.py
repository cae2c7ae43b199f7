"""The kernel of diagonal_decay_scan's gradients, parallel over chunks and slabs of states."""

import triton
import triton.language as tl

from dsf_kernels.chunks import rows, two_floats
from dsf_kernels.combine import product
from dsf_kernels.diagonal_decay_kernels import grow, outside, put, tile
from dsf_kernels.exponentials import LN_2, LOG2_E


@triton.jit
def decays_single(log, EXACT: tl.constexpr):
    """exp of a log decay; exact: to a unit in the last place however strong, -inf gives 0."""
    if EXACT:
        top, rest = two_floats(tl.maximum(log, -110.0).to(tl.float64) * LOG2_E)
        a = tl.exp2(top) * (1.0 + LN_2 * rest)
    else:
        a = tl.exp2(log * LOG2_E)
    return a


@triton.jit
def spread(w, SIZE: tl.constexpr):
    """Sums of w (state, high, low) in blocks of SIZE tokens: before each, and from each on."""
    N: tl.constexpr = w.shape[0]
    HIGH: tl.constexpr = w.shape[1]
    LOW: tl.constexpr = w.shape[2]
    before = tl.zeros([N, HIGH, LOW], tl.float32)
    onward, whole = w, w
    for level in tl.static_range(0, 6):
        if 2**level < SIZE and 2**level < LOW:
            before, onward, whole = grow(before, onward, whole, True)
    if SIZE > LOW:
        earlier, later = outside(tl.sum(whole, 2), True, SIZE // LOW)
        before, onward = before + earlier, onward + later
    return before, onward


@triton.jit(do_not_specialize=["length", "n_chunk", "q_n", "k_n", "g_n", "o_n", "o_t"])
def gradient_kernel(query, key, log_decay, value, grad, start, end, ones,
                    grad_query, grad_key, grad_decay, table,
                    length, n_chunk, n_head, width, channels, scale,
                    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n,
                    v_b, v_t, v_h, v_p, d_b, d_t, d_h, d_p, o_n, o_t,
                    EXACT: tl.constexpr, COMPUTE: tl.constexpr,
                    PRECISION: tl.constexpr, PAIRED: tl.constexpr, FULL: tl.constexpr,
                    CHUNK: tl.constexpr, HIGH: tl.constexpr, SLAB: tl.constexpr,
                    LEVELS: tl.constexpr, CHANNELS: tl.constexpr,
                    PART: tl.constexpr, ONES: tl.constexpr):  # fmt: skip
    """Gradients of the queries, keys and log decays of one chunk and SLAB states.

    start, end: the state at the chunk's start, the state's gradient at its end. ones: factors
    without effect on the numbers, loaded after each product: they make the compiler hand the
    product's tile to the threads that keep a state's tokens, rather than those tiles to others.
    table: see pair_kernel.
    """
    LOW: tl.constexpr = CHUNK // HIGH
    n_slab = tl.cdiv(width, SLAB)
    program = tl.program_id(0).to(tl.int64)
    slab, program = program % n_slab, program // n_slab
    chunk, lane = program % n_chunk, program // n_chunk
    batch, head = lane // n_head, lane % n_head
    offset = slab.to(tl.int32) * SLAB
    first = chunk * CHUNK
    if table is not None:
        first = tl.load(table + 2 * chunk)
    query += batch * q_b + head * q_h + first * q_t
    key += batch * k_b + head * k_h + first * k_t
    log_decay += batch * g_b + head * g_h + first * g_t
    value += batch * v_b + head * v_h
    grad += batch * d_b + head * d_h
    start += program * width * channels
    end += program * width * channels
    place = ((batch * length + first) * n_head + head) * width
    if table is not None:
        length = first + tl.load(table + 2 * chunk + 1)
    grad_query += place
    grad_key += place
    grad_decay += place
    time = tl.arange(0, HIGH)[None, :, None] * LOW + tl.arange(0, LOW)[None, None, :]
    i = tl.arange(0, CHUNK)
    span = i[:, None] ^ i[None, :]
    lower = tl.zeros([CHUNK, CHUNK], tl.float32)
    upper = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in tl.range(0, CHANNELS, PART):
        v = rows(value, first, length, v_t, v_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        d = rows(grad, first, length, d_t, d_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        lower = tl.dot(d, tl.trans(v), lower, input_precision=PRECISION)
        upper = tl.dot(v, tl.trans(d), upper, input_precision=PRECISION)
    pairs = tl.where(i[:, None] > i[None, :], lower, upper).to(COMPUTE)
    same = tl.sum(tl.where(span == 0, lower, 0.0), 0)
    same = tl.reshape(same, [HIGH, LOW])[None, :, :]
    q = tile(query, q_n, q_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
    k = tile(key, k_n, k_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
    a = tile(log_decay, g_n, g_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
    a = decays_single(a, EXACT)
    q = q * scale
    dq, dk = same * k, same * q
    dl = tl.zeros([SLAB, HIGH, LOW], tl.float32)
    suffix = tl.full([SLAB, HIGH, LOW], 1.0, tl.float32)
    prefix, whole = a, a
    for level in tl.static_range(0, LEVELS):
        second = (time & (2**level)) != 0
        operand = tl.where(second, q, k)
        if 2**level > LOW:
            every = tl.reduce(whole, 2, product)
            before, after = outside(every, False, 2**level // LOW)
            factor = tl.where(second, prefix * before, suffix * after)
        else:
            factor = tl.where(second, prefix, suffix)
        z = tl.reshape((factor * operand).to(COMPUTE), [SLAB, CHUNK])
        near = (span ^ 2**level) < 2**level
        dz = tl.dot(tl.where(near, pairs, 0.0).to(COMPUTE), tl.trans(z), input_precision=PRECISION)
        dz = tl.trans(dz)
        here = tile(
            ones + ONES * level, o_n, o_t, 0, CHUNK, 0, SLAB, PAIRED, True, SLAB, HIGH, LOW
        )
        dz = tl.reshape(dz, [SLAB, HIGH, LOW]) * here * factor
        dq = tl.where(second, dq + dz, dq)
        dk = tl.where(second, dk, dk + dz)
        before, onward = spread(dz * operand, 2**level)
        dl += tl.where(second, onward, before)
        if 2**level < LOW:
            prefix, suffix, whole = grow(prefix, suffix, whole, False)
    dq_state = tl.zeros([CHUNK, SLAB], tl.float32)
    dk_state = tl.zeros([CHUNK, SLAB], tl.float32)
    through = tl.zeros([SLAB], tl.float32)
    for part in tl.range(0, CHANNELS, PART):
        v = rows(value, first, length, v_t, v_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        d = rows(grad, first, length, d_t, d_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        s = rows(start, offset, width, channels, 1, channels, part, FULL, SLAB, PART)
        e = rows(end, offset, width, channels, 1, channels, part, FULL, SLAB, PART)
        dq_state = tl.dot(d, tl.trans(s), dq_state, input_precision=PRECISION)
        dk_state = tl.dot(v, tl.trans(e), dk_state, input_precision=PRECISION)
        through += tl.sum(s.to(tl.float32) * e.to(tl.float32), 1)
    whole = tl.reduce(whole, 2, product)
    before, after = outside(whole, False, HIGH)
    here = tile(ones + ONES * 6, o_n, o_t, 0, CHUNK, 0, SLAB, PAIRED, True, SLAB, HIGH, LOW)
    dz = tl.reshape(tl.trans(dq_state), [SLAB, HIGH, LOW]) * here * (prefix * before)
    dq += dz
    _, onward = spread(dz * q, CHUNK)
    here = tile(ones + ONES * 7, o_n, o_t, 0, CHUNK, 0, SLAB, PAIRED, True, SLAB, HIGH, LOW)
    dz = tl.reshape(tl.trans(dk_state), [SLAB, HIGH, LOW]) * here * (suffix * after)
    dk += dz
    before, _ = spread(dz * k, CHUNK)
    dl += onward + before + (through * tl.reduce(whole, 1, product))[:, None, None]
    stride = n_head * width
    put(grad_query, dq * scale, o_n, stride, first, length, offset, width, PAIRED, FULL, SLAB,
        HIGH, LOW)  # fmt: skip
    put(grad_key, dk, o_n, stride, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
    put(grad_decay, dl, o_n, stride, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
