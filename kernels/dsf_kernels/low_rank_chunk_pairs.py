"""Device code of low_rank_scan by chunks: what a chunk does, whatever state enters it.

A log is a log decay in units of log 2. Its sum over a span of tokens is a product with a mask of
zeros and ones: nothing is subtracted, so a span of no decay after a strong one is exact.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import rows
from dsf_kernels.exponentials import LOG2_E, exact_exp2, fast_exp2


@triton.jit
def power(log, EXACT: tl.constexpr):
    """2^log, exactly 0 where it is below the smallest normal number."""
    return exact_exp2(log, 0.0) if EXACT else fast_exp2(log)


@triton.jit
def logs(log_decay, first, length, g_t, g_n, width, offset, FULL: tl.constexpr,
         CHUNK: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """A tile of log decays, in units of log 2; below -160 no number is left."""
    log = rows(log_decay, first, length, g_t, g_n, width, offset, FULL, CHUNK, SLAB)
    return tl.maximum(log.to(tl.float32) * LOG2_E, -160.0)


@triton.jit
def summed(mask, log, SPAN: tl.constexpr):
    """Sums of log over the tokens that each row of the mask names."""
    return tl.dot(mask.to(tl.float32), log, input_precision=SPAN)


@triton.jit
def within_half(level, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(row, token): the tokens between a row and the middle of its block of 2^(level+1) tokens:
    those after it where it lies in the first half, those before it in the second."""
    i, t = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        i, t = t, i
    second = (i & (1 << level)) != 0
    return ((i >> level) == (t >> level)) & ((second & (t < i)) | ((second == 0) & (t > i)))


@triton.jit
def halves(q, k, x, w, log, a, level, CHUNK: tl.constexpr, EXACT: tl.constexpr,
           SPAN: tl.constexpr):  # fmt: skip
    """Of blocks of 2^(level+1) tokens: which rows are second; (q | k) and (w | x); the decays
    from and to the block's middle that belong to them."""
    second = (tl.arange(0, CHUNK)[:, None] & (1 << level)) != 0
    before = power(summed(within_half(level, CHUNK, False), log, SPAN), EXACT)
    upto = tl.where(second, before * a, before)
    return second, tl.where(second, q, k), tl.where(second, w, x), upto, before


@triton.jit
def parted(level, CHUNK: tl.constexpr):
    """(i, j): the pairs that the middles of blocks of 2^(level+1) tokens part."""
    span = tl.arange(0, CHUNK)[:, None] ^ tl.arange(0, CHUNK)[None, :]
    return (span ^ (1 << level)) < (1 << level)


@triton.jit
def inverse(g, CHUNK: tl.constexpr, LEVELS: tl.constexpr, SOLVE: tl.constexpr):
    """(I - g)^-1 of a strictly lower matrix, from blocks of 1, 2, 4 .. rows."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    t = tl.where(i == j, 1.0, 0.0) + tl.where((i >> 1) == (j >> 1), g, 0.0)
    for level in tl.range(1, LEVELS):
        beside = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        step = tl.dot(t, tl.where(beside, g, 0.0), input_precision=SOLVE)
        t += tl.dot(step, t, input_precision=SOLVE)
    return t


@triton.jit(do_not_specialize=["length", "n_chunk"])
def prepare_kernel(query, key, left, right, log_decay, read, find, put, write, score,
                   solve, mixed, cross, total, length, n_chunk, n_head, width, scale,
                   q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, x_b, x_t, x_h, x_n,
                   w_b, w_t, w_h, w_n, g_b, g_t, g_h, g_n,
                   Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
                   W_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr, FULL: tl.constexpr,
                   EXACT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                   SOLVE: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
                   LEVELS: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """One chunk of one head: see low_rank_chunk_launch.py for the equations and names."""
    program = tl.program_id(0).to(tl.int64)
    chunk, lane = program % n_chunk, program // n_chunk
    batch, head = lane // n_head, lane % n_head
    first = chunk * CHUNK
    query += batch * q_b + head // Q_SHARE * q_h
    key += batch * k_b + head // K_SHARE * k_h
    left += batch * x_b + head // X_SHARE * x_h
    right += batch * w_b + head // W_SHARE * w_h
    log_decay += batch * g_b + head * g_h
    stream, squares = program * CHUNK * width, program * CHUNK * CHUNK
    read, find, put, write = read + stream, find + stream, put + stream, write + stream
    score, solve = score + squares, solve + squares
    mixed, cross = mixed + squares, cross + squares
    i = tl.arange(0, CHUNK)
    square = i[:, None] * CHUNK + i[None, :]
    later, same = i[:, None] > i[None, :], i[:, None] == i[None, :]
    qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    qx, wk, wx = qk, qk, qk
    for offset in tl.range(0, WIDTH, SLAB):
        q = rows(query, first, length, q_t, q_n, width, offset, FULL, CHUNK, SLAB)
        k = rows(key, first, length, k_t, k_n, width, offset, FULL, CHUNK, SLAB)
        x = rows(left, first, length, x_t, x_n, width, offset, FULL, CHUNK, SLAB)
        w = rows(right, first, length, w_t, w_n, width, offset, FULL, CHUNK, SLAB)
        if HAS_DECAY:
            q, k, x, w = q.to(tl.float32), k.to(tl.float32), x.to(tl.float32), w.to(tl.float32)
            log = logs(log_decay, first, length, g_t, g_n, width, offset, FULL, CHUNK, SLAB)
            a = power(log, EXACT)
            qk += tl.where(same, tl.sum(q * k, 1)[:, None], 0.0)
            qx += tl.where(same, tl.sum(q * x, 1)[:, None], 0.0)
            for level in tl.range(0, LEVELS):
                _, y, z, upto, before = halves(q, k, x, w, log, a, level, CHUNK, EXACT, SPAN)
                y, z = (y * upto).to(COMPUTE), (z * before).to(COMPUTE)
                near = parted(level, CHUNK)
                pairs = tl.dot(y, tl.trans(y), input_precision=PRECISION)
                qk += tl.where(near, pairs, 0.0)
                pairs = tl.dot(y, tl.trans(z), input_precision=PRECISION)
                qx += tl.where(near, pairs, 0.0)
                pairs = tl.dot(z, tl.trans(y), input_precision=PRECISION)
                wk += tl.where(near, pairs, 0.0)
                pairs = tl.dot(z, tl.trans(z), input_precision=PRECISION)
                wx += tl.where(near, pairs, 0.0)
        else:
            q, k, x, w = q.to(COMPUTE), k.to(COMPUTE), x.to(COMPUTE), w.to(COMPUTE)
            qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
            qx = tl.dot(q, tl.trans(x), qx, input_precision=PRECISION)
            wk = tl.dot(w, tl.trans(k), wk, input_precision=PRECISION)
            wx = tl.dot(w, tl.trans(x), wx, input_precision=PRECISION)
    solved = inverse(tl.where(later, wx, 0.0), CHUNK, LEVELS, SOLVE)
    wk = tl.dot(solved, tl.where(later, wk, 0.0), input_precision=SOLVE)
    qk = tl.where(later | same, qk, 0.0)
    qx = tl.where(later | same, qx, 0.0)
    qk = tl.dot(qx, wk, qk, input_precision=SOLVE)
    tl.store(score + square, (qk * scale).to(score.dtype.element_ty))
    tl.store(solve + square, solved.to(solve.dtype.element_ty))
    tl.store(mixed + square, wk.to(mixed.dtype.element_ty))
    tl.store(cross + square, qx.to(cross.dtype.element_ty))
    tl.debug_barrier()
    solved, across = tl.load(solve + square), tl.load(cross + square)
    back = tl.load(mixed + i[None, :] * CHUNK + i[:, None])
    for offset in tl.range(0, WIDTH, SLAB):
        q = rows(query, first, length, q_t, q_n, width, offset, FULL, CHUNK, SLAB).to(tl.float32)
        k = rows(key, first, length, k_t, k_n, width, offset, FULL, CHUNK, SLAB).to(tl.float32)
        x = rows(left, first, length, x_t, x_n, width, offset, FULL, CHUNK, SLAB).to(tl.float32)
        w = rows(right, first, length, w_t, w_n, width, offset, FULL, CHUNK, SLAB).to(tl.float32)
        column = offset + tl.arange(0, SLAB)
        if HAS_DECAY:
            log = logs(log_decay, first, length, g_t, g_n, width, offset, FULL, CHUNK, SLAB)
            before = power(summed(later, log, SPAN), EXACT)
            after = power(summed(i[:, None] < i[None, :], log, SPAN), EXACT)
            q, w, k, x = q * before * power(log, EXACT), w * before, k * after, x * after
            whole = power(tl.sum(log, 0), EXACT)
            tl.store(total + program * width + column, whole, column < width)
        place = i[:, None] * width + column[None, :]
        inside = (i[:, None] >= 0) & (column[None, :] < width)
        found = tl.dot(solved, w.to(COMPUTE), input_precision=PRECISION).to(COMPUTE)
        tl.store(find + place, found, inside)
        q = tl.dot(across, found, q, input_precision=PRECISION)
        tl.store(read + place, (q * scale).to(COMPUTE), inside)
        x = x.to(COMPUTE)
        tl.store(put + place, x, inside)
        k = tl.dot(back, x, k, input_precision=PRECISION)
        tl.store(write + place, k.to(COMPUTE), inside)
