"""The serial kernel of scalar_decay_scan: a program owns one head and one slab of channels."""

import triton
import triton.language as tl

from dsf_kernels.chunks import cells, chunk_decays, entering, pair_decay, rows


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def chunk_kernel(x, y, w, out, high, low, initial, final, table,
                 length, n_chunk, segment, n_head, width, channels, scale, initial_scale,
                 x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                 i_b, i_h, i_s, i_n, i_p,
                 X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr, W_SHARE: tl.constexpr,
                 REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, FIXED: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
                 FULL: tl.constexpr, EXACT: tl.constexpr,
                 COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                 WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The equations at the head of scalar_decay_scan.py, for a segment of so many chunks.

    table: None, or first token and first chunk of every sequence of a packed row, segment then
    n_chunk: a lane is a head of a sequence.
    """
    n_slab, n_segment = tl.cdiv(channels, SLAB), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    slab, program = program % n_slab, program // n_slab
    part, lane = (program % n_segment).to(tl.int32), program // n_segment
    begin = (part * segment * CHUNK).to(tl.int64)
    batch, head = lane // n_head, lane % n_head
    line = batch
    if table is not None:
        begin, line = tl.load(table + 2 * batch), 0
    offset = slab.to(tl.int32) * SLAB
    x += line * x_b + head // X_SHARE * x_h + begin * x_t
    y += line * y_b + head // Y_SHARE * y_h + begin * y_t
    w += line * w_b + head // W_SHARE * w_h + begin * w_t
    out += ((line * length + begin) * n_head + head) * channels
    if FIXED:
        high += head
    else:
        if table is None:
            steps = lane * n_chunk * CHUNK + begin
        else:
            steps = (head * n_chunk + tl.load(table + 2 * batch + 1)) * CHUNK
        high += steps
        low += steps
    final += (lane * n_segment + part) * width * channels
    if table is None:
        length = (length - begin).to(tl.int32)
        n_chunk = tl.minimum(n_chunk - part * segment, segment)
    else:
        length = (tl.load(table + 2 * batch + 2) - begin).to(tl.int32)
        n_chunk = tl.cdiv(length, CHUNK)
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    initial += batch * i_b + head * i_h + part * i_s
    h = entering(initial, row, column, inside, i_n, i_p, HAS_INITIAL)
    if HAS_INITIAL:
        h = h * initial_scale
    i = tl.arange(0, CHUNK)
    pair = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count if REVERSE else count
        first = chunk * CHUNK
        ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        if HAS_DECAY:
            g, g_low, to_end, from_start, whole = chunk_decays(
                high, low, first, length, CHUNK, EXACT, FIXED
            )
            inward = (from_start if REVERSE else to_end)[:, None]
            written = (ws.to(tl.float32) * inward).to(COMPUTE)
        else:
            written = ws
        if STORE:
            xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
            between = tl.dot(xs, h.to(COMPUTE), input_precision=PRECISION)
            score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
            if HAS_DECAY:
                score = score * pair_decay(g, g_low, pair, 1 if REVERSE else 0, EXACT)
                between = between * (to_end if REVERSE else from_start)[:, None]
            else:
                score = tl.where(pair, score, 0.0)
            result = tl.dot(score.to(COMPUTE), ws, between, input_precision=PRECISION)
            place = out + (first + i).to(tl.int64)[:, None] * (n_head * channels) + column
            result = (result * scale).to(out.dtype.element_ty)
            keep = (first + i[:, None] < length) & (column < channels)
            tl.store(place, result, None if FULL else keep)
        if HAS_DECAY:
            h = h * whole
        h = tl.dot(tl.trans(ys), written, h, input_precision=PRECISION)
    if FINAL:
        tl.store(final + row * channels + column, h * scale if REVERSE else h, inside)
