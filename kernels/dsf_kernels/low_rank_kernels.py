"""Device code of low_rank_scan: step by step in float32, a program a slab of channels."""

import triton
import triton.language as tl


@triton.jit
def _row(base, t, step, index, stride, inside):
    return tl.load(base + tl.cast(t, tl.int64) * step + index * stride, inside, other=0).to(
        tl.float32
    )


@triton.jit
def _decay(base, t, step, n, stride, inside, HAS_DECAY: tl.constexpr):
    """exp(l) as a sum of 1, or 0, and what is left: near 1 a rounded decay would lose as many
    units as there are steps."""
    one = (n >= 0).to(tl.float32)
    rest = 0.0 * one
    if HAS_DECAY:
        log = _row(base, t, step, n, stride, inside)
        series = 1.0 + log * (1.0 / 5) * (1.0 + log * (1.0 / 6) * (1.0 + log * (1.0 / 7)))
        series = 1.0 + log * (1.0 / 3) * (1.0 + log * (1.0 / 4) * series)
        series = log * (1.0 + log * (1.0 / 2) * series)
        near = tl.abs(log) < 0.25
        one, rest = tl.where(near, 1.0, 0.0), tl.where(near, series, tl.exp(log))
    return one, rest


@triton.jit
def _decayed(h, one, rest):
    return one[:, None] * h + rest[:, None] * h


@triton.jit
def _next(h, one, rest, x, w, b, u):
    read = tl.sum(w[:, None] * h, 0)
    return _decayed(h, one, rest) + x[:, None] * read[None, :] + b[:, None] * u[None, :]


@triton.jit(do_not_specialize=["length", "n_chunk"])
def forward_kernel(query, key, value, left, right, decay, initial, out, final, states,
                   length, n_chunk, n_head, width, channels, scale,
                   q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, v_b, v_t, v_h, v_p,
                   x_b, x_t, x_h, x_n, w_b, w_t, w_h, w_n, d_b, d_t, d_h, d_n,
                   i_b, i_h, i_n, i_p,
                   Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
                   W_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr,
                   SAVE: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                   SLAB: tl.constexpr):  # fmt: skip
    """Outputs and the last state, or with SAVE the state before each chunk."""
    n_slab = tl.cdiv(channels, SLAB)
    lane = tl.program_id(0).to(tl.int64) // n_slab
    batch, head = lane // n_head, lane % n_head
    n = tl.arange(0, WIDTH).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) % n_slab * SLAB + tl.arange(0, SLAB)
    here, across = n < width, p < channels
    inside = here[:, None] & across[None, :]
    cell = n[:, None] * channels + p[None, :]
    query += batch * q_b + head // Q_SHARE * q_h
    key += batch * k_b + head // K_SHARE * k_h
    value += batch * v_b + head * v_h
    left += batch * x_b + head // X_SHARE * x_h
    right += batch * w_b + head // W_SHARE * w_h
    decay += batch * d_b + head * d_h
    h = tl.zeros((WIDTH, SLAB), tl.float32)
    if HAS_INITIAL:
        first = initial + batch * i_b + head * i_h
        h = tl.load(first + n[:, None] * i_n + p[None, :] * i_p, inside, other=0).to(tl.float32)
    for chunk in tl.range(0, n_chunk):
        if SAVE:
            tl.store(states + (lane * n_chunk + chunk) * width * channels + cell, h, inside)
        for t in tl.range(chunk * CHUNK, tl.minimum(length, chunk * CHUNK + CHUNK)):
            one, rest = _decay(decay, t, d_t, n, d_n, here, HAS_DECAY)
            x, w = _row(left, t, x_t, n, x_n, here), _row(right, t, w_t, n, w_n, here)
            b, u = _row(key, t, k_t, n, k_n, here), _row(value, t, v_t, p, v_p, across)
            h = _next(h, one, rest, x, w, b, u)
            if not SAVE:
                y = tl.sum(_row(query, t, q_t, n, q_n, here)[:, None] * h, 0) * scale
                place = ((batch * length + t) * n_head + head) * channels + p
                tl.store(out + place, y.to(out.dtype.element_ty), across)
    if not SAVE:
        tl.store(final + lane * width * channels + cell, h, inside)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def gradient_kernel(query, key, value, left, right, decay, grad, grad_final, states, scratch,
                    d_query, d_key, d_value, d_left, d_right, d_decay, d_initial,
                    length, n_chunk, n_batch, n_head, width, channels, scale,
                    q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, v_b, v_t, v_h, v_p,
                    x_b, x_t, x_h, x_n, w_b, w_t, w_h, w_n, d_b, d_t, d_h, d_n,
                    g_b, g_t, g_h, g_p, i_b, i_h, i_n, i_p,
                    Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
                    W_SHARE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr,
                    CHUNK: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """Right to left: the states of a chunk again, into scratch, then every gradient.

    Sums over channels are of one slab; the slabs are added outside, in order.
    """
    n_slab = tl.cdiv(channels, SLAB)
    program = tl.program_id(0).to(tl.int64)
    lane, slab = program // n_slab, program % n_slab
    batch, head = lane // n_head, lane % n_head
    n = tl.arange(0, WIDTH).to(tl.int64)
    p = slab * SLAB + tl.arange(0, SLAB)
    here, across = n < width, p < channels
    inside = here[:, None] & across[None, :]
    cell = n[:, None] * channels + p[None, :]
    tile = n[:, None] * SLAB + tl.arange(0, SLAB)[None, :]
    scratch += program * CHUNK * WIDTH * SLAB
    query += batch * q_b + head // Q_SHARE * q_h
    key += batch * k_b + head // K_SHARE * k_h
    value += batch * v_b + head * v_h
    left += batch * x_b + head // X_SHARE * x_h
    right += batch * w_b + head // W_SHARE * w_h
    decay += batch * d_b + head * d_h
    grad += batch * g_b + head * g_h
    pull = tl.zeros((WIDTH, SLAB), tl.float32)
    if HAS_INITIAL:
        last = grad_final + batch * i_b + head * i_h
        pull = tl.load(last + n[:, None] * i_n + p[None, :] * i_p, inside, other=0).to(tl.float32)
    for back in tl.range(0, n_chunk):
        chunk = n_chunk - 1 - back
        first = chunk * CHUNK
        steps = tl.minimum(length - first, CHUNK)
        h = tl.load(states + (lane * n_chunk + chunk) * width * channels + cell, inside, other=0)
        for i in tl.range(0, steps):
            t = first + i
            tl.store(scratch + i * WIDTH * SLAB + tile, h)
            one, rest = _decay(decay, t, d_t, n, d_n, here, HAS_DECAY)
            x, w = _row(left, t, x_t, n, x_n, here), _row(right, t, w_t, n, w_n, here)
            b, u = _row(key, t, k_t, n, k_n, here), _row(value, t, v_t, p, v_p, across)
            h = _next(h, one, rest, x, w, b, u)
        tl.debug_barrier()
        for i in tl.range(0, steps):
            t = first + steps - 1 - i
            before = tl.load(scratch + (steps - 1 - i) * WIDTH * SLAB + tile)
            one, rest = _decay(decay, t, d_t, n, d_n, here, HAS_DECAY)
            x, w = _row(left, t, x_t, n, x_n, here), _row(right, t, w_t, n, w_n, here)
            b, u = _row(key, t, k_t, n, k_n, here), _row(value, t, v_t, p, v_p, across)
            c, dy = _row(query, t, q_t, n, q_n, here), _row(grad, t, g_t, p, g_p, across) * scale
            pull += c[:, None] * dy[None, :]
            read = tl.sum(w[:, None] * before, 0)
            felt = tl.sum(x[:, None] * pull, 0)
            place = (((slab * n_batch + batch) * length + t) * n_head + head) * width + n
            tl.store(d_query + place, tl.sum(h * dy[None, :], 1), here)
            tl.store(d_key + place, tl.sum(pull * u[None, :], 1), here)
            tl.store(d_left + place, tl.sum(pull * read[None, :], 1), here)
            tl.store(d_right + place, tl.sum(before * felt[None, :], 1), here)
            if HAS_DECAY:
                tl.store(d_decay + place, (one + rest) * tl.sum(pull * before, 1), here)
            du = tl.sum(b[:, None] * pull, 0)
            spot = ((batch * length + t) * n_head + head) * channels + p
            tl.store(d_value + spot, du.to(d_value.dtype.element_ty), across)
            pull = _decayed(pull, one, rest) + w[:, None] * felt[None, :]
            h = before
        tl.debug_barrier()
    tl.store(d_initial + lane * width * channels + cell, pull, inside)
