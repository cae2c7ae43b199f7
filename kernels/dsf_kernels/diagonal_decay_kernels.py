"""The kernels of diagonal_decay_scan: pairs inside a chunk, and states between chunks.

Tiles of states and tokens have axes (state, high, low), token = high LOW + low in the chunk. Their
loads do not tell the compiler that states lie side by side: it then gives each thread few states
with LOW tokens in its own registers, and products along time are chains of multiplications
without exchange between threads.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import entering, owned, rows
from dsf_kernels.combine import product
from dsf_kernels.exponentials import LOG2_E


@triton.jit
def grow(prefix, suffix, total, SUM: tl.constexpr):
    """From blocks of some length to blocks of twice that length.

    prefix, suffix (state, high, low): over the tokens of a block up to each one, and after it;
    total (state, high, block): over all of a block. Products, or sums.
    """
    N: tl.constexpr = prefix.shape[0]
    HIGH: tl.constexpr = prefix.shape[1]
    LOW: tl.constexpr = prefix.shape[2]
    BLOCKS: tl.constexpr = total.shape[2] // 2
    SIZE: tl.constexpr = LOW // BLOCKS
    first, second = tl.split(tl.reshape(total, [N, HIGH, BLOCKS, 2]))
    late = (tl.arange(0, SIZE) >= SIZE // 2)[None, None, None, :]
    prefix = tl.reshape(prefix, [N, HIGH, BLOCKS, SIZE])
    suffix = tl.reshape(suffix, [N, HIGH, BLOCKS, SIZE])
    if SUM:
        prefix = tl.where(late, prefix + first[:, :, :, None], prefix)
        suffix = tl.where(late, suffix, suffix + second[:, :, :, None])
        total = first + second
    else:
        prefix = tl.where(late, prefix * first[:, :, :, None], prefix)
        suffix = tl.where(late, suffix, suffix * second[:, :, :, None])
        total = first * second
    return tl.reshape(prefix, [N, HIGH, LOW]), tl.reshape(suffix, [N, HIGH, LOW]), total


@triton.jit
def outside(total, SUM: tl.constexpr, GROUP: tl.constexpr):
    """Of totals (state, high): over what comes before and after each in its group of GROUP."""
    HIGH: tl.constexpr = total.shape[1]
    this = tl.arange(0, HIGH)[None, :, None]
    other = tl.arange(0, HIGH)[None, None, :]
    near = this // GROUP == other // GROUP
    every = total[:, None, :]
    if SUM:
        before = tl.sum(tl.where(near & (other < this), every, 0.0), 2)
        after = tl.sum(tl.where(near & (other > this), every, 0.0), 2)
    else:
        before = tl.reduce(tl.where(near & (other < this), every, 1.0), 2, product)
        after = tl.reduce(tl.where(near & (other > this), every, 1.0), 2, product)
    return before[:, :, None], after[:, :, None]


@triton.jit
def decays(log, EXACT: tl.constexpr):
    """exp of a log decay; -inf gives 0. Exact: in float64, as products repeat its error."""
    if EXACT:
        a = tl.exp(log.to(tl.float64))
    else:
        a = tl.exp2(log * LOG2_E)
    return a


@triton.jit
def places(stride_n, stride_t, first, length, offset, width, PAIRED: tl.constexpr,
           N: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):  # fmt: skip
    """Offsets (state, high, low) of one chunk, and which exist; PAIRED: two states in a row."""
    column = offset + tl.arange(0, N)[:, None, None]
    time = tl.arange(0, HIGH)[None, :, None] * LOW + tl.arange(0, LOW)[None, None, :]
    place = time * stride_t + column * stride_n
    if PAIRED:
        place = tl.max_contiguous(tl.multiple_of(place, [2, 1, 1]), [2, 1, 1])
    return place, (time < length - first) & (column < width)


@triton.jit
def tile(pointer, stride_n, stride_t, first, length, offset, width, PAIRED: tl.constexpr,
         FULL: tl.constexpr, N: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):  # fmt: skip
    """(state, high, low) of one chunk as float32, 0 beyond the edges; PAIRED: by two states."""
    place, inside = places(stride_n, stride_t, first, length, offset, width, PAIRED, N, HIGH, LOW)
    if FULL:
        x = tl.load(pointer + place)
    else:
        x = tl.load(pointer + place, inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def put(pointer, x, stride_n, stride_t, first, length, offset, width, PAIRED: tl.constexpr,
        FULL: tl.constexpr, N: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):  # fmt: skip
    """Store (state, high, low) of one chunk: the counterpart of `tile`."""
    place, inside = places(stride_n, stride_t, first, length, offset, width, PAIRED, N, HIGH, LOW)
    x = x.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer + place, x)
    else:
        tl.store(pointer + place, x, inside)


@triton.jit
def beginning(table, chunk, CHUNK: tl.constexpr):
    """First token of a chunk, of a packed row where there is a table."""
    return chunk * CHUNK if table is None else tl.load(table + 2 * chunk)


@triton.jit(do_not_specialize=["length", "n_chunk", "q_n", "k_n", "g_n", "o_n"])
def pair_kernel(query, key, log_decay, score, q_out, k_out, total, table,
                length, n_chunk, n_head, width, scale,
                q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, g_b, g_t, g_h, g_n, o_n,
                EXACT: tl.constexpr, COMPUTE: tl.constexpr,
                PRECISION: tl.constexpr, PAIRED: tl.constexpr, FULL: tl.constexpr,
                CHUNK: tl.constexpr, HIGH: tl.constexpr, WIDTH: tl.constexpr,
                SLAB: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """Scores of the pairs inside one chunk, and the chunk's decayed queries and keys.

    table: None, or first token and tokens of every chunk of a packed row.
    """
    LOW: tl.constexpr = CHUNK // HIGH
    program = tl.program_id(0).to(tl.int64)
    chunk, lane = program % n_chunk, program // n_chunk
    batch, head = lane // n_head, lane % n_head
    query += batch * q_b + head * q_h + beginning(table, chunk, CHUNK) * q_t
    key += batch * k_b + head * k_h + beginning(table, chunk, CHUNK) * k_t
    log_decay += batch * g_b + head * g_h + beginning(table, chunk, CHUNK) * g_t
    q_out += program * CHUNK * width
    k_out += program * CHUNK * width
    first = beginning(table, chunk, CHUNK)
    if table is not None:
        length = first + tl.load(table + 2 * chunk + 1)
    time = tl.arange(0, HIGH)[None, :, None] * LOW + tl.arange(0, LOW)[None, None, :]
    i = tl.arange(0, CHUNK)
    span = i[:, None] ^ i[None, :]
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for offset in tl.range(0, WIDTH, SLAB):
        q = tile(query, q_n, q_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
        k = tile(key, k_n, k_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
        a = tile(log_decay, g_n, g_t, first, length, offset, width, PAIRED, FULL, SLAB, HIGH, LOW)
        a = decays(a, EXACT)
        x = tl.reshape(q.to(COMPUTE), [SLAB, CHUNK])
        y = tl.reshape(k.to(COMPUTE), [SLAB, CHUNK])
        pairs = tl.dot(tl.trans(x), y, input_precision=PRECISION)
        scores += tl.where(span == 0, pairs, 0.0)
        whole = a
        q = q * a
        for level in tl.static_range(0, LEVELS):
            second = (time & (2**level)) != 0
            if 2**level > LOW:
                before, after = outside(tl.reduce(whole, 2, product), False, 2**level // LOW)
                z = tl.where(second, q * before, k * after)
            else:
                z = tl.where(second, q, k)
            z = tl.reshape(z.to(COMPUTE), [SLAB, CHUNK])
            pairs = tl.dot(tl.trans(z), z, input_precision=PRECISION)
            scores += tl.where((span ^ 2**level) < 2**level, pairs, 0.0)
            if 2**level < LOW:
                q, k, whole = grow(q, k, whole, False)
        whole = tl.reduce(whole, 2, product)
        before, after = outside(whole, False, HIGH)
        put(q_out, q * (before * scale), o_n, width, 0, CHUNK, offset, width, PAIRED, FULL,
            SLAB, HIGH, LOW)  # fmt: skip
        put(k_out, k * after, o_n, width, 0, CHUNK, offset, width, PAIRED, FULL,
            SLAB, HIGH, LOW)  # fmt: skip
        column = offset + tl.arange(0, SLAB)
        tl.store(total + program * width + column, tl.reduce(whole, 1, product), column < width)
    place = score + program * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    scores = tl.where(i[:, None] >= i[None, :], scores * scale, 0.0)
    tl.store(place, scores.to(score.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "n_chunk"])
def walk_kernel(x, y, score, w, total, out, initial, final, saved, table,
                length, n_chunk, n_head, width, channels,
                w_b, w_t, w_h, w_p, i_b, i_h, i_n, i_p,
                REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE: tl.constexpr,
                FINAL: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
                PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """States from chunk to chunk, h = total h + y' w, and outputs x h + score w of each chunk.

    x, y, w: decayed queries, decayed keys, values; REVERSE walks back with keys, queries, output
    gradients, and the transposed score. A program owns one head and SLAB channels. `saved` gets
    the state that enters each chunk. table: None, or first token and first chunk of every
    sequence of a packed row; a lane is then a head of a sequence.
    """
    _, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    chunks, line = lane * n_chunk, batch
    if table is not None:
        table += 2 * batch
        chunks, line = head * n_chunk + tl.load(table + 1), 0
    x += chunks * CHUNK * width
    y += chunks * CHUNK * width
    score += chunks * CHUNK * CHUNK
    total += chunks * width
    w += line * w_b + head * w_h
    out += (line * length * n_head + head) * channels
    saved += chunks * width * channels
    if table is not None:
        begin = tl.load(table)
        length = (tl.load(table + 2) - begin).to(tl.int32)
        n_chunk = tl.cdiv(length, CHUNK)
        w += begin * w_t
        out += begin * n_head * channels
    state = tl.arange(0, WIDTH)
    column = offset + tl.arange(0, SLAB)
    inside = (state[None, :] < width) & (column[:, None] < channels)
    i = tl.arange(0, CHUNK)
    initial += batch * i_b + head * i_h
    h = entering(initial, state[None, :], column[:, None], inside, i_n, i_p, HAS_INITIAL)
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count if REVERSE else count
        first = chunk * CHUNK
        padded = n_chunk * CHUNK
        ws = rows(w, first, length, w_t, w_p, channels, offset, FULL, CHUNK, SLAB)
        ws = tl.trans(ws.to(y.dtype.element_ty))
        ys = rows(y, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
        if FULL:
            scale = tl.load(total + chunk.to(tl.int64) * width + state)
        else:
            scale = tl.load(total + chunk.to(tl.int64) * width + state, state < width, other=0.0)
        if SAVE:
            target = saved + chunk.to(tl.int64) * width * channels
            target += state[None, :] * channels + column[:, None]
            if FULL:
                tl.store(target, h.to(saved.dtype.element_ty))
            else:
                tl.store(target, h.to(saved.dtype.element_ty), inside)
        if STORE:
            xs = rows(x, first, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
            pairs = rows(score, first, padded, CHUNK, 1, CHUNK, 0, True, CHUNK, CHUNK)
            if not REVERSE:
                pairs = tl.trans(pairs)
            result = tl.dot(ws, pairs, input_precision=PRECISION)
            result = tl.dot(h.to(xs.dtype), tl.trans(xs), result, input_precision=PRECISION)
            target = out + (first + i).to(tl.int64)[None, :] * (n_head * channels)
            target += column[:, None]
            result = result.to(out.dtype.element_ty)
            if FULL:
                tl.store(target, result)
            else:
                tl.store(
                    target, result, (first + i[None, :] < length) & (column[:, None] < channels)
                )
        h = (h * scale[None, :]).to(tl.float32)
        h = tl.dot(ws, ys, h, input_precision=PRECISION)
    if FINAL:
        final += lane * width * channels
        tl.store(final + state[None, :] * channels + column[:, None], h, inside)
