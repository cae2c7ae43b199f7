"""Device code of delta_scan's gradients: one program owns one chunk of one head."""

import triton
import triton.language as tl

from dsf_kernels.chunks import chunk_decays, pair_decay, rows


@triton.jit
def _spanning_pairs(pairs, i, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """For each step t the sum of pairs (i, j) with j < t <= i: masked terms, no differences."""
    before = (i[:, None] < i[None, :]).to(COMPUTE)
    prefix = tl.dot(pairs.to(COMPUTE), before, input_precision=PRECISION)
    return tl.sum(tl.where(i[:, None] >= i[None, :], prefix, 0.0), 0)


@triton.jit
def _spanning_rows(ending, leaving, i):
    """For each step t the sum of `ending` at i >= t and of `leaving` at j < t."""
    spanning = tl.where(i[:, None] >= i[None, :], ending[:, None], leaving[:, None])
    return tl.sum(spanning, 0)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def gradient_kernel(query, key, value, upstream, strength, high, low, states, adjoints,  # noqa: C901
                    written, pulled, grad_query, grad_key, grad_value, grad_strength, grad_decay,
                    table, length, n_chunk, n_head, width, channels, scale,
                    q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w,
                    y_b, y_t, y_h, y_w, s_b, s_t, s_h,
                    Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr,
                    DECAY_GRAD: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SLAB: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """See delta_scan.py for the equations: `written` is delta there, `pulled` r.

    table: see solve_kernel.
    """
    program = tl.program_id(0).to(tl.int64)
    head, chunk = program % n_head, program // n_head % n_chunk
    batch = program // (n_head * n_chunk)
    lane, first = batch * n_head + head, chunk * CHUNK
    if table is not None:
        first = tl.load(table + 2 * chunk)
    query += batch * q_b + head // Q_SHARE * q_h
    key += batch * k_b + head // K_SHARE * k_h
    value += batch * v_b + head * v_h
    upstream += batch * y_b + head * y_h
    strength += batch * s_b + head * s_h + first * s_t
    vector = (lane * n_chunk + chunk) * CHUNK
    high += vector
    low += vector
    states += (lane * n_chunk + chunk) * width * channels
    adjoints += (lane * n_chunk + chunk) * width * channels
    own, step = (batch * length * n_head + head) * channels, n_head * channels
    line = batch * length
    if table is not None:
        line, length = 0, first + tl.load(table + 2 * chunk + 1)
    i = tl.arange(0, CHUNK)
    valid = i < length - first
    beta = tl.load(strength + i * s_t, valid, other=0.0).to(tl.float32)
    column = tl.arange(0, CHANNELS)[None, :]
    rs = rows(pulled + own, first, length, step, 1, channels, 0, FULL, CHUNK, CHANNELS)
    vs = rows(value, first, length, v_t, v_w, channels, 0, FULL, CHUNK, CHANNELS)
    wide = rs.to(tl.float32)
    strength_grad = tl.sum(wide * vs.to(tl.float32), 1)
    place = grad_value + own + (first + i)[:, None] * step + column
    if FULL:
        tl.store(place, (beta[:, None] * wide).to(grad_value.dtype.element_ty))
    else:
        keep = valid[:, None] & (column < channels)
        tl.store(place, (beta[:, None] * wide).to(grad_value.dtype.element_ty), keep)
    ds = rows(written + own, first, length, step, 1, channels, 0, FULL, CHUNK, CHANNELS)
    ys = rows(upstream, first, length, y_t, y_w, channels, 0, FULL, CHUNK, CHANNELS).to(COMPUTE)
    ks = rows(key, first, length, k_t, k_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
    later, below = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    solves = tl.dot(rs, tl.trans(ds), input_precision=PRECISION)
    alike = tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
    if HAS_DECAY:
        g, g_low, to_end, from_start, whole = chunk_decays(
            high, low, 0, length, CHUNK, EXACT, False
        )
        solves = solves * pair_decay(g, g_low, below, 0, EXACT)
    else:
        solves = tl.where(below, solves, 0.0)
    strength_grad -= tl.sum(solves * alike, 1)  # type: ignore[operator]
    solves = solves * -beta[:, None]
    if DECAY_GRAD:
        pairs = solves * alike
    # Transposed products are made anew: a transposed 16-bit dot result has been miscompiled.
    other = tl.dot(ds, tl.trans(rs), input_precision=PRECISION) * -beta[None, :]
    if HAS_DECAY:
        other = other * pair_decay(g, g_low, i[:, None] < i[None, :], 1, EXACT)
    symmetric = tl.where(below, solves, tl.where(later, 0.0, other)).to(COMPUTE)
    scores = tl.dot(ys, tl.trans(ds), input_precision=PRECISION) * scale
    if HAS_DECAY:
        scores = scores * pair_decay(g, g_low, later, 0, EXACT)
    else:
        scores = tl.where(later, scores, 0.0)
    share = tl.zeros([CHUNK], tl.float32)
    if DECAY_GRAD:
        qs = rows(query, first, length, q_t, q_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        pairs += scores * tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        share = _spanning_pairs(pairs, i, COMPUTE, PRECISION)
    scores = scores.to(COMPUTE)
    other = tl.dot(ds, tl.trans(ys), input_precision=PRECISION) * scale
    if HAS_DECAY:
        other = other * pair_decay(g, g_low, i[:, None] <= i[None, :], 1, EXACT)
    else:
        other = tl.where(i[:, None] <= i[None, :], other, 0.0)
    scores_back = other.to(COMPUTE)
    ending, leaving = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    total = 0.0
    for offset in tl.range(0, WIDTH, SLAB, num_stages=STAGES):
        row = offset + tl.arange(0, SLAB)[:, None]
        if FULL:
            start = tl.load(states + row * channels + column)
            end = tl.load(adjoints + row * channels + column)
        else:
            inside = (row < width) & (column < channels)
            start = tl.load(states + row * channels + column, inside, other=0.0)
            end = tl.load(adjoints + row * channels + column, inside, other=0.0)
        kp = rows(key, first, length, k_t, k_w, width, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        qp = rows(query, first, length, q_t, q_w, width, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        narrow = kp.to(tl.float32)
        grad = tl.dot(ds, tl.trans(end), input_precision=PRECISION)
        if HAS_DECAY:
            grad = grad * to_end[:, None]
        if DECAY_GRAD:
            leaving += tl.sum(grad * narrow, 1)
            total += tl.sum(  # type: ignore[operator]
                tl.sum(start.to(tl.float32) * end.to(tl.float32), 1), 0
            )
        read = tl.dot(rs, tl.trans(start), input_precision=PRECISION)
        if HAS_DECAY:
            read = read * from_start[:, None]
        held = tl.sum(read * narrow, 1)
        strength_grad -= held
        grad -= beta[:, None] * read
        grad = tl.dot(scores_back, qp, grad, input_precision=PRECISION)
        grad = tl.dot(symmetric, kp, grad, input_precision=PRECISION)
        cell = offset + tl.arange(0, SLAB)[None, :]
        spot = ((line + first + i[:, None]) * n_head + head) * width + cell
        real = valid[:, None] & (cell < width)
        if FULL:
            tl.store(grad_key + spot, grad.to(grad_key.dtype.element_ty))
        else:
            tl.store(grad_key + spot, grad.to(grad_key.dtype.element_ty), real)
        grad = tl.dot(ys, tl.trans(start), input_precision=PRECISION) * scale
        if HAS_DECAY:
            grad = grad * from_start[:, None]
        if DECAY_GRAD:
            ending += tl.sum(grad * qp.to(tl.float32), 1) - beta * held
        grad = tl.dot(scores, kp, grad, input_precision=PRECISION)
        if FULL:
            tl.store(grad_query + spot, grad.to(grad_query.dtype.element_ty))
        else:
            tl.store(grad_query + spot, grad.to(grad_query.dtype.element_ty), real)
    tl.store(grad_strength + vector + i, strength_grad)
    if DECAY_GRAD:
        share += _spanning_rows(ending, leaving, i) + total * whole
        tl.store(grad_decay + vector + i, share)
