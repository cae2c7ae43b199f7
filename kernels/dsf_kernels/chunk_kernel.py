"""The kernel of scalar_decay_scan: a program owns one head and one slab of channels."""

import triton
import triton.language as tl

from dsf_kernels.combine import exp2, exp2_gap, rows


@triton.jit(do_not_specialize=["length", "n_chunk"])
def chunk_kernel(x, y, w, extra, out, high, low, initial, final, saved, decay_grad,  # noqa: C901
                 length, n_chunk, n_head, width, channels, scale, initial_scale,
                 x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                 e_b, e_t, e_h, e_w, i_b, i_h, i_n, i_p,
                 X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr, W_SHARE: tl.constexpr,
                 E_SHARE: tl.constexpr, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
                 DECAY_GRAD: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                 COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                 WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """See the file's head. `extra` is what dots with `out` to give the decay's gradient."""
    n_slab = tl.cdiv(channels, SLAB)
    program = tl.program_id(0).to(tl.int64)
    slab, lane = program % n_slab, program // n_slab
    batch, head = lane // n_head, lane % n_head
    offset = slab.to(tl.int32) * SLAB
    x += batch * x_b + head // X_SHARE * x_h
    y += batch * y_b + head // Y_SHARE * y_h
    w += batch * w_b + head // W_SHARE * w_h
    extra += batch * e_b + head // E_SHARE * e_h
    out += (batch * length * n_head + head) * channels
    high += lane * n_chunk * CHUNK
    low += lane * n_chunk * CHUNK
    decay_grad += (slab * (tl.num_programs(0) // n_slab) + lane) * n_chunk * CHUNK
    saved += lane * n_chunk * width * channels
    row = tl.arange(0, WIDTH)[:, None]
    column = offset + tl.arange(0, SLAB)[None, :]
    inside = (row >= 0) & (column >= 0) if FULL else (row < width) & (column < channels)
    if HAS_INITIAL:
        initial += batch * i_b + head * i_h
        h = tl.load(initial + row * i_n + column * i_p, inside, other=0.0).to(tl.float32)
        h = h * initial_scale
    else:
        h = tl.zeros([WIDTH, SLAB], tl.float32)
    i = tl.arange(0, CHUNK)
    if REVERSE:
        pair = i[:, None] <= i[None, :]
    else:
        pair = i[:, None] >= i[None, :]
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count if REVERSE else count
        first = chunk * CHUNK
        ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        if HAS_DECAY:
            g = tl.load(high + first + i)
            g_end = tl.load(high + first + CHUNK - 1)
            if EXACT:
                g_low = tl.load(low + first + i)
                low_end = tl.load(low + first + CHUNK - 1)
                to_end = exp2_gap(g_end, low_end, g, g_low, i >= 0)
                from_start = exp2_gap(g, g_low, 0.0, 0.0, i >= 0)
                whole = exp2_gap(g_end, low_end, 0.0, 0.0, g_end == g_end)
            else:
                to_end, from_start, whole = exp2(g_end - g), exp2(g), tl.exp2(g_end)
            inward = (from_start if REVERSE else to_end)[:, None]
            written = (ws.to(tl.float32) * inward).to(COMPUTE)
        else:
            written = ws
        if STORE:
            xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
            between = tl.dot(xs, h.to(COMPUTE), input_precision=PRECISION)
            score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
            if HAS_DECAY:
                if EXACT:
                    if REVERSE:
                        gap = exp2_gap(
                            g[None, :], g_low[None, :], g[:, None], g_low[:, None], pair
                        )
                    else:
                        gap = exp2_gap(
                            g[:, None], g_low[:, None], g[None, :], g_low[None, :], pair
                        )
                    score = score * gap
                else:
                    gap = g[None, :] - g[:, None] if REVERSE else g[:, None] - g[None, :]
                    score = score * exp2(tl.where(pair, gap, float("-inf")))
                between = between * (to_end if REVERSE else from_start)[:, None]
            else:
                score = tl.where(pair, score, 0.0)
            if DECAY_GRAD:
                es = rows(extra, first, length, e_t, e_w, channels, offset, FULL, CHUNK, SLAB)
                spanning = tl.sum(es.to(tl.float32) * between, 1)[:, None]
                place = saved + (chunk.to(tl.int64) * width + row) * channels + column
                if REVERSE:  # pairs (later chunk, j < t), and (later chunk, earlier chunk)
                    earlier = tl.load(place, inside, other=0.0).to(tl.float32)
                    share = tl.sum(tl.sum(earlier * h, 1), 0) * whole
                    share += tl.sum(tl.where(i[:, None] < i[None, :], spanning, 0.0), 0)
                else:  # pairs (i >= t, earlier chunk), and (i >= t, j < t)
                    tl.store(place, h.to(saved.dtype.element_ty), inside)
                    product = tl.dot(es.to(COMPUTE), tl.trans(ws), input_precision=PRECISION)
                    product = (score * product).to(COMPUTE)
                    before = (i[:, None] < i[None, :]).to(COMPUTE)
                    prefix = tl.dot(product, before, input_precision=PRECISION)
                    share = tl.sum(tl.where(pair, prefix + spanning, 0.0), 0)
                tl.store(decay_grad + first + i, share * scale)
            result = tl.dot(score.to(COMPUTE), ws, between, input_precision=PRECISION)
            place = out + (first + i).to(tl.int64)[:, None] * (n_head * channels) + column
            result = (result * scale).to(out.dtype.element_ty)
            if FULL:
                tl.store(place, result)
            else:
                tl.store(place, result, (first + i[:, None] < length) & (column < channels))
        if HAS_DECAY:
            h = h * whole
        h = tl.dot(tl.trans(ys), written, h, input_precision=PRECISION)
    if FINAL:
        final += lane * width * channels
        tl.store(final + row * channels + column, h * scale if REVERSE else h, inside)
