"""The same sums as chunk_kernel with chunks in parallel and no state: for short rows, few heads.

A program owns a chunk of one head and walks over the chunks whose tokens it sees, all by masked
products: length / 128 times the work of the serial kernel, but no chunk waits for another.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import cells, chunk_decays, entering, pair_decay, rows


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def short_kernel(x, y, w, out, high, low, initial, final, table,
                 length, n_chunk, segment, n_head, width, channels, scale, initial_scale,
                 x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                 i_b, i_h, i_s, i_n, i_p,
                 X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr, W_SHARE: tl.constexpr,
                 REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, FIXED: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
                 FULL: tl.constexpr, EXACT: tl.constexpr,
                 COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                 WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Arguments as chunk_kernel, segment and table unused; FINAL: one program more, the last."""
    n_task = n_chunk + 1 if FINAL else n_chunk
    n_slab = tl.cdiv(channels, SLAB)
    program = tl.program_id(0).to(tl.int64)
    task, program = n_task - 1 - (program % n_task).to(tl.int32), program // n_task
    slab, lane = program % n_slab, program // n_slab
    batch, head = lane // n_head, lane % n_head
    offset = slab.to(tl.int32) * SLAB
    x += batch * x_b + head // X_SHARE * x_h
    y += batch * y_b + head // Y_SHARE * y_h
    w += batch * w_b + head // W_SHARE * w_h
    out += (batch * length * n_head + head) * channels
    if FIXED:
        high += head
    else:
        high += lane * n_chunk * CHUNK
        low += lane * n_chunk * CHUNK
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    i = tl.arange(0, CHUNK)
    pair = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
    own = n_chunk - 1 - task if REVERSE else task  # n_chunk or -1: the last state
    own_first = own * CHUNK
    seen = task  # the chunks before it, or after it when REVERSE
    fade = 1.0
    if task < n_chunk:
        xs = rows(x, own_first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        result = tl.zeros([CHUNK, SLAB], tl.float32)
        for count in tl.range(0, seen, num_stages=STAGES):
            chunk = own + 1 + count if REVERSE else own - 1 - count
            first = chunk * CHUNK
            ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
            ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB)
            score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
            if HAS_DECAY:
                _, _, to_end, from_start, whole = chunk_decays(
                    high, low, first, length, CHUNK, EXACT, FIXED
                )
                score = score * ((from_start if REVERSE else to_end) * fade)[None, :]
                fade = fade * whole
            result = tl.dot(score.to(COMPUTE), ws.to(COMPUTE), result, input_precision=PRECISION)
        if HAS_INITIAL:
            initial += batch * i_b + head * i_h
            h = entering(initial, row, column, inside, i_n, i_p, True)
            faded = (h * (initial_scale * fade)).to(COMPUTE)
            result = tl.dot(xs, faded, result, input_precision=PRECISION)
        ys = rows(y, own_first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, own_first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB)
        score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
        if HAS_DECAY:
            g, g_low, to_end, from_start, _ = chunk_decays(
                high, low, own_first, length, CHUNK, EXACT, FIXED
            )
            score = score * pair_decay(g, g_low, pair, 1 if REVERSE else 0, EXACT)
            result = result * (to_end if REVERSE else from_start)[:, None]
        else:
            score = tl.where(pair, score, 0.0)
        result = tl.dot(score.to(COMPUTE), ws.to(COMPUTE), result, input_precision=PRECISION)
        place = out + (own_first + i).to(tl.int64)[:, None] * (n_head * channels) + column
        keep = (own_first + i[:, None] < length) & (column < channels)
        tl.store(place, (result * scale).to(out.dtype.element_ty), None if FULL else keep)
    elif FINAL:
        state = tl.zeros([WIDTH, SLAB], tl.float32)
        for count in tl.range(0, seen, num_stages=STAGES):
            first = (count if REVERSE else n_chunk - 1 - count) * CHUNK
            ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
            ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB)
            if HAS_DECAY:
                _, _, to_end, from_start, whole = chunk_decays(
                    high, low, first, length, CHUNK, EXACT, FIXED
                )
                ws = ws.to(tl.float32) * ((from_start if REVERSE else to_end) * fade)[:, None]
                fade = fade * whole
            state = tl.dot(tl.trans(ys), ws.to(COMPUTE), state, input_precision=PRECISION)
        if HAS_INITIAL:
            initial += batch * i_b + head * i_h
            h = entering(initial, row, column, inside, i_n, i_p, True)
            state += h * (initial_scale * fade)
        final += lane * width * channels
        tl.store(final + row * channels + column, state * scale if REVERSE else state, inside)
