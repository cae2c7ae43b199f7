"""Device code of delta_scan: the walk over the chunks of a head, and the walk back."""

import triton
import triton.language as tl

from dsf_kernels.chunks import cells, chunk_decays, entering, owned, pair_decay, rows


@triton.jit(do_not_specialize=["length", "n_chunk"])
def forward_kernel(query, key, value, strength, solved, out, high, low, initial, final, states,
                   written, table, length, n_chunk, n_head, width, channels, scale,
                   q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, s_b, s_t, s_h,
                   i_b, i_h, i_n, i_p,
                   Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr,
                   HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, SAVE: tl.constexpr,
                   FINAL: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                   COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                   WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Left to right: outputs (STORE), or each chunk's first state and what it writes (SAVE).

    table: None, or first token and first chunk of every sequence of a packed row; a lane is then
    a head of a sequence.
    """
    _, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    line = batch
    if table is not None:
        table += 2 * batch
        line, begin = 0, tl.load(table)
        query += begin * q_t
        key += begin * k_t
        value += begin * v_t
        strength += begin * s_t
        out += begin * n_head * channels
        written += begin * n_head * channels
    query += line * q_b + head // Q_SHARE * q_h
    key += line * k_b + head // K_SHARE * k_h
    value += line * v_b + head * v_h
    strength += line * s_b + head * s_h
    out += (line * length * n_head + head) * channels
    written += (line * length * n_head + head) * channels
    chunks = lane * n_chunk if table is None else head * n_chunk + tl.load(table + 1)
    states += chunks * width * channels
    solved += chunks * CHUNK * CHUNK
    high += chunks * CHUNK
    low += chunks * CHUNK
    if table is not None:
        length = (tl.load(table + 2) - begin).to(tl.int32)
        n_chunk = tl.cdiv(length, CHUNK)
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    initial += batch * i_b + head * i_h
    h = entering(initial, row, column, inside, i_n, i_p, HAS_INITIAL)
    i = tl.arange(0, CHUNK)
    square = i[:, None] * CHUNK + i[None, :]
    pair = i[:, None] >= i[None, :]
    for chunk in tl.range(0, n_chunk, num_stages=STAGES):
        first = chunk * CHUNK
        ks = rows(key, first, length, k_t, k_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        vs = rows(value, first, length, v_t, v_w, channels, offset, FULL, CHUNK, SLAB)
        solve = tl.load(solved + first.to(tl.int64) * CHUNK + square)
        ahead = strength + first.to(tl.int64) * s_t
        beta = tl.load(ahead + i * s_t, i < length - first, other=0.0).to(tl.float32)[:, None]
        held = h.to(COMPUTE)
        read = tl.dot(ks, held, input_precision=PRECISION)
        if HAS_DECAY:
            g, g_low, to_end, from_start, whole = chunk_decays(
                high, low, first, length, CHUNK, EXACT, False
            )
            read = read * from_start[:, None]
        error = (beta * (vs.to(tl.float32) - read)).to(COMPUTE)
        delta = tl.dot(solve, error, input_precision=PRECISION)
        place = (first + i).to(tl.int64)[:, None] * (n_head * channels) + column
        keep = (first + i[:, None] < length) & (column < channels)
        if SAVE:
            state = (first.to(tl.int64) // CHUNK * width + row) * channels + column
            tl.store(states + state, held, inside)
            if FULL:
                tl.store(written + place, delta.to(COMPUTE))
            else:
                tl.store(written + place, delta.to(COMPUTE), keep)
        kept = delta
        if HAS_DECAY:
            kept = delta * to_end[:, None]
            h = h * whole
        h = tl.dot(tl.trans(ks), kept.to(COMPUTE), h, input_precision=PRECISION)
        if STORE:  # last, when most registers are free
            least = delta.to(COMPUTE)
            qs = rows(query, first, length, q_t, q_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
            result = tl.dot(qs, held, input_precision=PRECISION)
            score = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
            if HAS_DECAY:
                score = score * pair_decay(g, g_low, pair, 0, EXACT)
                result = result * from_start[:, None]
            else:
                score = tl.where(pair, score, 0.0)
            result = tl.dot(score.to(COMPUTE), least, result, input_precision=PRECISION)
            result = (result * scale).to(out.dtype.element_ty)
            if FULL:
                tl.store(out + place, result)
            else:
                tl.store(out + place, result, keep)
    if FINAL:
        final += lane * width * channels
        tl.store(final + row * channels + column, h, inside)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def reverse_kernel(query, key, upstream, strength, solved, high, low, initial, final, states,
                   residual, table, length, n_chunk, n_head, width, channels, scale,
                   q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, y_b, y_t, y_h, y_w, s_b, s_t, s_h,
                   i_b, i_h, i_n, i_p,
                   Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr,
                   HAS_INITIAL: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                   COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                   WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Right to left: the state's gradient at each chunk's end, and r (see delta_scan.py).

    table: see forward_kernel.
    """
    _, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    line = batch
    if table is not None:
        table += 2 * batch
        line, begin = 0, tl.load(table)
        query += begin * q_t
        key += begin * k_t
        upstream += begin * y_t
        strength += begin * s_t
        residual += begin * n_head * channels
    query += line * q_b + head // Q_SHARE * q_h
    key += line * k_b + head // K_SHARE * k_h
    upstream += line * y_b + head * y_h
    strength += line * s_b + head * s_h
    residual += (line * length * n_head + head) * channels
    chunks = lane * n_chunk if table is None else head * n_chunk + tl.load(table + 1)
    states += chunks * width * channels
    solved += chunks * CHUNK * CHUNK
    high += chunks * CHUNK
    low += chunks * CHUNK
    if table is not None:
        length = (tl.load(table + 2) - begin).to(tl.int32)
        n_chunk = tl.cdiv(length, CHUNK)
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    initial += batch * i_b + head * i_h
    h = entering(initial, row, column, inside, i_n, i_p, HAS_INITIAL)
    i = tl.arange(0, CHUNK)
    square = i[:, None] * CHUNK + i[None, :]
    pair = i[:, None] <= i[None, :]
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count
        first = chunk * CHUNK
        ks = rows(key, first, length, k_t, k_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        qs = rows(query, first, length, q_t, q_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ys = rows(upstream, first, length, y_t, y_w, channels, offset, FULL, CHUNK, SLAB)
        solve = tl.load(solved + first.to(tl.int64) * CHUNK + square)
        ahead = strength + first.to(tl.int64) * s_t
        beta = tl.load(ahead + i * s_t, i < length - first, other=0.0).to(tl.float32)[:, None]
        ys = ys.to(COMPUTE)
        score = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * scale
        if HAS_DECAY:
            g, g_low, to_end, from_start, whole = chunk_decays(
                high, low, first, length, CHUNK, EXACT, False
            )
            score = score * pair_decay(g, g_low, pair, 1, EXACT)
        else:
            score = tl.where(pair, score, 0.0)
        score = score.to(COMPUTE)
        held = h.to(COMPUTE)
        state = (first.to(tl.int64) // CHUNK * width + row) * channels + column
        tl.store(states + state, held, inside)
        grad = tl.dot(ks, held, input_precision=PRECISION)
        if HAS_DECAY:
            grad = grad * to_end[:, None]
        grad = tl.dot(score, ys, grad, input_precision=PRECISION)
        least = tl.dot(tl.trans(solve), grad.to(COMPUTE), input_precision=PRECISION)
        place = (first + i).to(tl.int64)[:, None] * (n_head * channels) + column
        if FULL:
            tl.store(residual + place, least.to(COMPUTE))
        else:
            keep = (first + i[:, None] < length) & (column < channels)
            tl.store(residual + place, least.to(COMPUTE), keep)
        back = -beta * least
        if HAS_DECAY:
            back = back * from_start[:, None]
            h = h * whole
        h = tl.dot(tl.trans(ks), back.to(COMPUTE), h, input_precision=PRECISION)
        read = ys.to(tl.float32) * scale + 0.0 * least  # in least's layout: fewer copies of g
        if HAS_DECAY:
            read = read * from_start[:, None]
        h = tl.dot(tl.trans(qs), read.to(COMPUTE), h, input_precision=PRECISION)
    final += lane * width * channels
    tl.store(final + row * channels + column, h, inside)
