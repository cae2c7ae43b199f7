"""Device code of low_rank_scan's gradients by chunks: from the walks back to the tensors."""

import triton
import triton.language as tl

from dsf_kernels.chunks import rows
from dsf_kernels.low_rank_chunk_pairs import halves, logs, parted, power, summed, within_half


@triton.jit(do_not_specialize=["length", "n_chunk"])
def chunk_gradient_kernel(value, grad, found, felt, start, end, find, put, solve, mixed, cross,
                          d_read, d_find, d_put, d_write, d_qk, d_qx, d_wk, d_wx, d_total,
                          length, n_chunk, n_head, width, channels, scale,
                          v_b, v_t, v_h, v_p, y_b, y_t, y_h, y_p,
                          HAS_DECAY: tl.constexpr, FULL: tl.constexpr, COMPUTE: tl.constexpr,
                          PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                          CHANNELS: tl.constexpr, PART: tl.constexpr, SLAB: tl.constexpr,
                          STAGES: tl.constexpr):  # fmt: skip
    """Of one chunk: gradients of decayed rows and of pairs (names in low_rank_chunk_launch.py)."""
    program = tl.program_id(0).to(tl.int64)
    chunk, lane = program % n_chunk, program // n_chunk
    batch, head = lane // n_head, lane % n_head
    first = chunk * CHUNK
    value += batch * v_b + head * v_h
    grad += batch * y_b + head * y_h
    own, step = (batch * length * n_head + head) * channels, n_head * channels
    start += program * width * channels
    end += program * width * channels
    stream, squares = program * CHUNK * width, program * CHUNK * CHUNK
    find, put, d_read, d_find = find + stream, put + stream, d_read + stream, d_find + stream
    d_put, d_write = d_put + stream, d_write + stream
    solve, mixed, cross = solve + squares, mixed + squares, cross + squares
    d_qk, d_qx, d_wk, d_wx = d_qk + squares, d_qx + squares, d_wk + squares, d_wx + squares
    i = tl.arange(0, CHUNK)
    square, turned = i[:, None] * CHUNK + i[None, :], i[None, :] * CHUNK + i[:, None]
    later, same = i[:, None] > i[None, :], i[:, None] == i[None, :]
    # Transposed products are made anew: a transposed 16-bit dot result has been miscompiled.
    lower = tl.zeros([CHUNK, CHUNK], tl.float32)
    upper = lower
    for part in tl.range(0, CHANNELS, PART, num_stages=1):
        vs = rows(value, first, length, v_t, v_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        ys = rows(grad, first, length, y_t, y_p, channels, part, FULL, CHUNK, PART).to(COMPUTE)
        lower = tl.dot(ys, tl.trans(vs), lower, input_precision=PRECISION)
        upper = tl.dot(vs, tl.trans(ys), upper, input_precision=PRECISION)
    pairs = tl.where(later | same, lower * scale, 0.0).to(COMPUTE)
    tl.store(d_qk + square, pairs)
    gmixed = tl.dot(tl.load(cross + turned), pairs, input_precision=PRECISION)
    pairs = tl.where(later, 0.0, upper * scale).to(COMPUTE)
    gcross = tl.dot(tl.load(mixed + square), pairs, input_precision=PRECISION)  # transposed
    gsolve = tl.zeros([CHUNK, CHUNK], tl.float32)  # transposed
    for offset in tl.range(0, WIDTH, SLAB, num_stages=STAGES):
        column = offset + tl.arange(0, SLAB)
        start_row = tl.cast(offset, tl.int64)
        if HAS_DECAY:
            through = tl.zeros([SLAB], tl.float32)
            for part in tl.range(0, CHANNELS, PART, num_stages=1):
                ss = rows(start, start_row, width, channels, 1, channels, part, FULL, SLAB, PART)
                es = rows(end, start_row, width, channels, 1, channels, part, FULL, SLAB, PART)
                through += tl.sum(ss.to(tl.float32) * es.to(tl.float32), 1)
            tl.store(d_total + program * width + column, through, column < width)
        ss = rows(start, start_row, width, channels, 1, channels, 0, FULL, SLAB, CHANNELS)
        es = rows(end, start_row, width, channels, 1, channels, 0, FULL, SLAB, CHANNELS)
        place = i[None, :] * width + column[:, None]
        inside = (i[None, :] >= 0) & (column[:, None] < width)
        vs = rows(value, first, length, v_t, v_p, channels, 0, FULL, CHUNK, CHANNELS).to(COMPUTE)
        gwrite = tl.dot(es, tl.trans(vs), input_precision=PRECISION).to(COMPUTE)
        tl.store(d_write + place, gwrite, inside)
        puts = rows(put, start_row * 0, CHUNK, width, 1, width, offset, FULL, CHUNK, SLAB)
        gmixed = tl.dot(puts, gwrite, gmixed, input_precision=PRECISION)
        rs = rows(found + own, first, length, step, 1, channels, 0, FULL, CHUNK, CHANNELS)
        gput = tl.dot(es, tl.trans(rs), input_precision=PRECISION)
        gput = tl.dot(gwrite, tl.load(mixed + turned), gput, input_precision=PRECISION)
        tl.store(d_put + place, gput.to(COMPUTE), inside)
        ys = rows(grad, first, length, y_t, y_p, channels, 0, FULL, CHUNK, CHANNELS).to(COMPUTE)
        gread = (tl.dot(ss, tl.trans(ys), input_precision=PRECISION) * scale).to(COMPUTE)
        tl.store(d_read + place, gread, inside)
        looks = rows(find, start_row * 0, CHUNK, width, 1, width, offset, FULL, CHUNK, SLAB)
        gcross = tl.dot(looks, gread, gcross, input_precision=PRECISION)
        fs = rows(felt + own, first, length, step, 1, channels, 0, FULL, CHUNK, CHANNELS)
        gfind = tl.dot(ss, tl.trans(fs), input_precision=PRECISION)
        gfind = tl.dot(gread, tl.load(cross + square), gfind, input_precision=PRECISION)
        gfind = gfind.to(COMPUTE)
        gfind = tl.dot(gfind, tl.load(solve + square), input_precision=PRECISION).to(COMPUTE)
        tl.store(d_find + place, gfind, inside)
        gsolve = tl.dot(looks, gfind, gsolve, input_precision=PRECISION)
    tl.store(d_qx + turned, tl.where(later, 0.0, gcross).to(COMPUTE))
    gmixed = tl.dot(tl.load(solve + turned), gmixed.to(COMPUTE), input_precision=PRECISION)
    tl.store(d_wk + square, tl.where(later, gmixed, 0.0).to(COMPUTE))
    tl.debug_barrier()
    gmixed = tl.load(d_wk + turned)
    gsolve = tl.dot(tl.load(mixed + square), gmixed, gsolve, input_precision=PRECISION)
    tl.store(d_wx + turned, tl.where(later | same, 0.0, gsolve).to(COMPUTE))


@triton.jit(do_not_specialize=["length", "n_chunk"])
def pair_gradient_kernel(query, key, left, right, log_decay, d_read, d_find, d_put, d_write,
                         d_qk, d_qx, d_wk, d_wx, d_total,
                         d_query, d_key, d_left, d_right, d_decay,
                         length, n_chunk, n_head, width,
                         q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, x_b, x_t, x_h, x_n,
                         w_b, w_t, w_h, w_n, g_b, g_t, g_h, g_n,
                         Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
                         W_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr, FULL: tl.constexpr,
                         EXACT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                         SPAN: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
                         SLAB: tl.constexpr):  # fmt: skip
    """Gradients of queries, keys, left, right and log decays, of one chunk and SLAB states."""
    n_slab = tl.cdiv(width, SLAB)
    slab, program = tl.program_id(0).to(tl.int64) % n_slab, tl.program_id(0).to(tl.int64) // n_slab
    chunk, lane = program % n_chunk, program // n_chunk
    batch, head = lane // n_head, lane % n_head
    first, offset = chunk * CHUNK, slab.to(tl.int32) * SLAB
    query += batch * q_b + head // Q_SHARE * q_h
    key += batch * k_b + head // K_SHARE * k_h
    left += batch * x_b + head // X_SHARE * x_h
    right += batch * w_b + head // W_SHARE * w_h
    log_decay += batch * g_b + head * g_h
    i = tl.arange(0, CHUNK)
    column = offset + tl.arange(0, SLAB)
    stream, squares = program * CHUNK * width, program * CHUNK * CHUNK
    d_read, d_find = d_read + stream, d_find + stream
    d_put, d_write = d_put + stream, d_write + stream
    d_qk, d_qx, d_wk, d_wx = d_qk + squares, d_qx + squares, d_wk + squares, d_wx + squares
    place = i[:, None] * width + column[None, :]
    inside = (i[:, None] >= 0) & (column[None, :] < width)
    q = rows(query, first, length, q_t, q_n, width, offset, FULL, CHUNK, SLAB)
    k = rows(key, first, length, k_t, k_n, width, offset, FULL, CHUNK, SLAB)
    x = rows(left, first, length, x_t, x_n, width, offset, FULL, CHUNK, SLAB)
    w = rows(right, first, length, w_t, w_n, width, offset, FULL, CHUNK, SLAB)
    gq = tl.load(d_read + place, inside, other=0.0).to(tl.float32)
    gk = tl.load(d_write + place, inside, other=0.0).to(tl.float32)
    gx = tl.load(d_put + place, inside, other=0.0).to(tl.float32)
    gw = tl.load(d_find + place, inside, other=0.0).to(tl.float32)
    own = ((batch * length + first) * n_head + head) * width
    spot = i[:, None] * (n_head * width) + column[None, :]
    real = (first + i[:, None] < length) & (column[None, :] < width)
    if HAS_DECAY:
        q, k, x, w = q.to(tl.float32), k.to(tl.float32), x.to(tl.float32), w.to(tl.float32)
        log = logs(log_decay, first, length, g_t, g_n, width, offset, FULL, CHUNK, SLAB)
        a = power(log, EXACT)
        later = i[:, None] > i[None, :]
        before = power(summed(later, log, SPAN), EXACT)
        gq, gw = gq * before * a, gw * before
        through = tl.load(d_total + program * width + column, column < width, other=0.0)
        dl = gq * q + (through * power(tl.sum(log, 0), EXACT))[None, :]
        dl += summed(i[:, None] < i[None, :], gq * q + gw * w, SPAN)
        after = power(summed(i[:, None] < i[None, :], log, SPAN), EXACT)
        gk, gx = gk * after, gx * after
        dl += summed(later, gk * k + gx * x, SPAN)
        one = tl.load(d_qk + i * (CHUNK + 1)).to(tl.float32)[:, None]
        two = tl.load(d_qx + i * (CHUNK + 1)).to(tl.float32)[:, None]
        gq += one * k + two * x
        gk += one * q
        gx += two * q
        square = tl.maximum(i[:, None], i[None, :]) * CHUNK + tl.minimum(i[:, None], i[None, :])
        qk, wx = tl.load(d_qk + square), tl.load(d_wx + square)
        qx, wk = tl.load(d_qx + square), tl.load(d_wk + square)
        early, late = tl.where(later, qx, wk), tl.where(later, wk, qx)
        for level in tl.range(0, LEVELS):
            second, y, z, upto, before = halves(q, k, x, w, log, a, level, CHUNK, EXACT, SPAN)
            near = parted(level, CHUNK)
            ys, zs = (y * upto).to(COMPUTE), (z * before).to(COMPUTE)
            dy = tl.dot(tl.where(near, qk, 0.0).to(COMPUTE), ys, input_precision=PRECISION)
            dy = tl.dot(tl.where(near, early, 0.0).to(COMPUTE), zs, dy, input_precision=PRECISION)
            dz = tl.dot(tl.where(near, wx, 0.0).to(COMPUTE), zs, input_precision=PRECISION)
            dz = tl.dot(tl.where(near, late, 0.0).to(COMPUTE), ys, dz, input_precision=PRECISION)
            dy, dz = dy * upto, dz * before
            gq += tl.where(second, dy, 0.0)
            gk += tl.where(second, 0.0, dy)
            gw += tl.where(second, dz, 0.0)
            gx += tl.where(second, 0.0, dz)
            y, z = dy * y, dz * z
            dl += tl.where(second, y, 0.0)
            dl += summed(within_half(level, CHUNK, True), y + z, SPAN)
        tl.store(d_decay + own + spot, dl.to(d_decay.dtype.element_ty), real)
    else:
        q, k, x, w = q.to(COMPUTE), k.to(COMPUTE), x.to(COMPUTE), w.to(COMPUTE)
        upright, turned = i[:, None] * CHUNK + i[None, :], i[None, :] * CHUNK + i[:, None]
        gq = tl.dot(tl.load(d_qk + upright), k, gq, input_precision=PRECISION)
        gq = tl.dot(tl.load(d_qx + upright), x, gq, input_precision=PRECISION)
        gw = tl.dot(tl.load(d_wk + upright), k, gw, input_precision=PRECISION)
        gw = tl.dot(tl.load(d_wx + upright), x, gw, input_precision=PRECISION)
        gk = tl.dot(tl.load(d_qk + turned), q, gk, input_precision=PRECISION)
        gk = tl.dot(tl.load(d_wk + turned), w, gk, input_precision=PRECISION)
        gx = tl.dot(tl.load(d_qx + turned), q, gx, input_precision=PRECISION)
        gx = tl.dot(tl.load(d_wx + turned), w, gx, input_precision=PRECISION)
    tl.store(d_query + own + spot, gq.to(d_query.dtype.element_ty), real)
    tl.store(d_key + own + spot, gk.to(d_key.dtype.element_ty), real)
    tl.store(d_left + own + spot, gx.to(d_left.dtype.element_ty), real)
    tl.store(d_right + own + spot, gw.to(d_right.dtype.element_ty), real)
