"""The serial kernel of scalar_decay_scan: a program owns one head and one slab of channels."""

import triton
import triton.language as tl

from dsf_kernels.combine import exp2, exp2_gap, rows


@triton.jit
def chunk_decays(high, low, first, length, CHUNK: tl.constexpr, EXACT: tl.constexpr,
                 FIXED: tl.constexpr):  # fmt: skip
    """g in the chunk and its low part; decays to the end, from the start, of the whole chunk.

    FIXED: `high` points to the log decay of every step.
    """
    i = tl.arange(0, CHUNK)
    g_low, low_end = 0.0, 0.0
    if FIXED:
        step = tl.maximum(tl.load(high).to(tl.float32), -110.0)  # as cumulate_kernel
        past = tl.minimum(i + 1, length - first)
        most = tl.minimum(length - first, CHUNK)
        if EXACT:
            exact = step.to(tl.float64) * 1.4426950408889634
            g_exact, end_exact = exact * past, exact * most
            g, g_end = g_exact.to(tl.float32), end_exact.to(tl.float32)
            g_low = (g_exact - g.to(tl.float64)).to(tl.float32)
            low_end = (end_exact - g_end.to(tl.float64)).to(tl.float32)
        else:
            g, g_end = step * 1.4426950408889634 * past, step * 1.4426950408889634 * most
    else:
        g, g_end = tl.load(high + first + i), tl.load(high + first + CHUNK - 1)
        if EXACT:
            g_low, low_end = tl.load(low + first + i), tl.load(low + first + CHUNK - 1)
    if EXACT:
        to_end = exp2_gap(g_end, low_end, g, g_low, i >= 0)
        from_start = exp2_gap(g, g_low, 0.0, 0.0, i >= 0)
        whole = exp2_gap(g_end, low_end, 0.0, 0.0, g_end == g_end)
    else:
        to_end, from_start, whole = exp2(g_end - g), exp2(g), tl.exp2(g_end)
        g_low = g
    return g, g_low, to_end, from_start, whole


@triton.jit
def pair_decay(g, g_low, pair, LATER: tl.constexpr, EXACT: tl.constexpr):
    """Decay between the tokens of each pair, 0 outside `pair`; LATER: the axis of the later."""
    late, early = tl.expand_dims(g, 1 - LATER), tl.expand_dims(g, LATER)
    if EXACT:
        late_low, early_low = tl.expand_dims(g_low, 1 - LATER), tl.expand_dims(g_low, LATER)
        decay = exp2_gap(late, late_low, early, early_low, pair)
    else:
        decay = exp2(tl.where(pair, late - early, float("-inf")))
    return decay


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def chunk_kernel(x, y, w, out, high, low, initial, final,
                 length, n_chunk, segment, n_head, width, channels, scale, initial_scale,
                 x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                 i_b, i_h, i_s, i_n, i_p,
                 X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr, W_SHARE: tl.constexpr,
                 REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, FIXED: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, FINAL: tl.constexpr,
                 FULL: tl.constexpr, EXACT: tl.constexpr,
                 COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                 WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The equations at the head of scalar_decay_scan.py, for a segment of so many chunks."""
    n_slab, n_segment = tl.cdiv(channels, SLAB), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    slab, program = program % n_slab, program // n_slab
    part, lane = (program % n_segment).to(tl.int32), program // n_segment
    begin = (part * segment * CHUNK).to(tl.int64)
    batch, head = lane // n_head, lane % n_head
    offset = slab.to(tl.int32) * SLAB
    x += batch * x_b + head // X_SHARE * x_h + begin * x_t
    y += batch * y_b + head // Y_SHARE * y_h + begin * y_t
    w += batch * w_b + head // W_SHARE * w_h + begin * w_t
    out += ((batch * length + begin) * n_head + head) * channels
    if FIXED:
        high += head
    else:
        high += lane * n_chunk * CHUNK + begin
        low += lane * n_chunk * CHUNK + begin
    final += (lane * n_segment + part) * width * channels
    length = (length - begin).to(tl.int32)
    n_chunk = tl.minimum(n_chunk - part * segment, segment)
    row = tl.arange(0, WIDTH)[:, None]
    column = offset + tl.arange(0, SLAB)[None, :]
    inside = (row >= 0) & (column >= 0) if FULL else (row < width) & (column < channels)
    if HAS_INITIAL:
        initial += batch * i_b + head * i_h + part * i_s
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
            if FULL:
                tl.store(place, result)
            else:
                tl.store(place, result, (first + i[:, None] < length) & (column < channels))
        if HAS_DECAY:
            h = h * whole
        h = tl.dot(tl.trans(ys), written, h, input_precision=PRECISION)
    if FINAL:
        tl.store(final + row * channels + column, h * scale if REVERSE else h, inside)
