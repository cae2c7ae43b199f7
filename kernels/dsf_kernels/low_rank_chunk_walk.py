"""Device code of low_rank_scan by chunks: the walk over the chunks of a head, either way."""

import triton
import triton.language as tl

from dsf_kernels.chunks import entering, owned, rows


@triton.jit(do_not_specialize=["length", "n_chunk"])
def walk_kernel(read, find, put, write, score, value, total, out, initial, final, saved, found,
                length, n_chunk, n_head, width, channels,
                v_b, v_t, v_h, v_p, i_b, i_h, i_n, i_p,
                REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr,
                STORE: tl.constexpr, FINAL: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
                PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """h <- total h + put' (find h) + write' value, and outputs read h + score value.

    REVERSE walks back, with `score` transposed. A program owns one head and SLAB channels. SAVE:
    the state that enters each chunk, and `found` = find h. h has axes (channel, state).
    """
    _, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    stream = lane * n_chunk * CHUNK * width
    read += stream
    find += stream
    put += stream
    write += stream
    score += lane * n_chunk * CHUNK * CHUNK
    total += lane * n_chunk * width
    value += batch * v_b + head * v_h
    rowed = (batch * length * n_head + head) * channels
    saved += lane * n_chunk * width * channels
    state = tl.arange(0, WIDTH)
    column = offset + tl.arange(0, SLAB)
    inside = (state[None, :] < width) & (column[:, None] < channels)
    i = tl.arange(0, CHUNK)
    initial += batch * i_b + head * i_h
    h = entering(initial, state[None, :], column[:, None], inside, i_n, i_p, HAS_INITIAL)
    padded = n_chunk * CHUNK
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count if REVERSE else count
        first = chunk * CHUNK
        fs = rows(find, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
        held = h.to(fs.dtype)
        reply = tl.dot(held, tl.trans(fs), input_precision=PRECISION).to(fs.dtype)
        vs = rows(value, first, length, v_t, v_p, channels, offset, FULL, CHUNK, SLAB)
        vs = tl.trans(vs.to(fs.dtype))
        token = rowed + first.to(tl.int64) * (n_head * channels)
        place = i[None, :] * (n_head * channels) + column[:, None]
        keep = (first + i[None, :] < length) & (column[:, None] < channels)
        if SAVE:
            target = saved + chunk.to(tl.int64) * width * channels
            target += state[None, :] * channels + column[:, None]
            tl.store(target, held, inside)
            tl.store(found + token + place, reply, keep)
        if STORE:
            qs = rows(read, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
            pairs = rows(score, first, padded, CHUNK, 1, CHUNK, 0, True, CHUNK, CHUNK)
            if not REVERSE:
                pairs = tl.trans(pairs)
            result = tl.dot(vs, pairs, input_precision=PRECISION)
            result = tl.dot(held, tl.trans(qs), result, input_precision=PRECISION)
            tl.store(out + token + place, result.to(out.dtype.element_ty), keep)
        if HAS_DECAY:
            step = total + chunk.to(tl.int64) * width + state
            h = h * tl.load(step, state < width, other=0.0)[None, :]
        ks = rows(write, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
        h = tl.dot(vs, ks, h, input_precision=PRECISION)
        xs = rows(put, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
        h = tl.dot(reply, xs, h, input_precision=PRECISION)
    if FINAL:
        final += lane * width * channels
        tl.store(final + state[None, :] * channels + column[:, None], h, inside)
