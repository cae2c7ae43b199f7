"""Kernels of maps with one decay a state: tiles, and row statistics, from the parts of chunks.

diagonal_decay_launch.Chunks gives the scores inside each chunk, exact pair by pair, queries
decayed from its start, keys decayed to its end, and the product of its decays. A program owns the
rows of one chunk r and walks back over earlier ones,

    W_rc = (queries_r between) keys_c',    between_n = product of the decays of chunks c+1 .. r-1,

so every factor is at most 1, nothing is divided, and exact zeros stay exact. The product is kept
in float64, as its error would grow with the number of chunks.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import rows
from dsf_kernels.map_kernels import add_lags, gather, put_sums, put_tile


@triton.jit
def whole_decay(total, chunk, width, WIDTH: tl.constexpr):
    """The product of a chunk's decays, by state, in float64."""
    state = tl.arange(0, WIDTH)
    place = total + tl.cast(chunk, tl.int64) * width + state
    return tl.load(place, state < width, other=0.0).to(tl.float64)


@triton.jit
def earlier(queries, keys, between, chunk, padded, width, FULL: tl.constexpr,
            PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Weights of one chunk's queries on the keys of an earlier one."""
    k = rows(keys, chunk * CHUNK, padded, width, 1, width, 0, FULL, CHUNK, WIDTH)
    q = (queries.to(tl.float32) * between.to(tl.float32)[None, :]).to(k.dtype)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit(do_not_specialize=["row_0", "n_row", "col_0", "n_col", "span", "n_chunk", "n_block"])
def diagonal_tiles_kernel(score, queries, keys, total, out, row_0, n_row, col_0, n_col, pitch,
                          span, n_block, n_chunk, width,
                          FULL: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
                          CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Rows row_0.. and columns col_0.. of the map; a program walks back over `span` chunks.

    n_block: chunks that hold the rows. FULL: tiles lie inside the result; WHOLE: width is WIDTH.
    """
    low_chunk, high_chunk = col_0 // CHUNK, tl.cdiv(col_0 + n_col, CHUNK)
    n_span = tl.cdiv(high_chunk - low_chunk, span)
    program = tl.program_id(0).to(tl.int64)
    part, block = (program % n_span).to(tl.int32), program // n_span % n_block
    lane = program // (n_span * n_block)
    r = row_0 // CHUNK + block.to(tl.int32)
    start = low_chunk + part * span
    stop = tl.minimum(start + span, high_chunk)
    score += lane * n_chunk * CHUNK * CHUNK
    queries += lane * n_chunk * CHUNK * width
    keys += lane * n_chunk * CHUNK * width
    total += lane * n_chunk * width
    out += lane * n_row * pitch
    padded = n_chunk * CHUNK
    q = rows(queries, r * CHUNK, padded, width, 1, width, 0, WHOLE, CHUNK, WIDTH)
    for c in tl.range(tl.maximum(start, r + 1), stop):
        zero = tl.zeros([CHUNK, CHUNK], tl.float32)
        put_tile(out, zero, r * CHUNK - row_0, c * CHUNK - col_0, n_row, n_col, pitch, FULL)
    if (start <= r) & (r < stop):
        w = rows(score, r * CHUNK, padded, CHUNK, 1, CHUNK, 0, True, CHUNK, CHUNK)
        put_tile(out, w, r * CHUNK - row_0, r * CHUNK - col_0, n_row, n_col, pitch, FULL)
    between = tl.full([WIDTH], 1.0, tl.float64)
    for c in tl.range(stop, r):
        between *= whole_decay(total, c, width, WIDTH)
    last = tl.minimum(stop, r) - 1
    for step in tl.range(0, last + 1 - start):
        c = last - step
        w = earlier(q, keys, between, c, padded, width, WHOLE, PRECISION, CHUNK, WIDTH)
        put_tile(out, w, r * CHUNK - row_0, c * CHUNK - col_0, n_row, n_col, pitch, FULL)
        between *= whole_decay(total, c, width, WIDTH)


@triton.jit(do_not_specialize=["row_0", "n_row", "length", "n_chunk", "n_block", "rows_in_all",
                               "n_bin"])  # fmt: skip
def diagonal_statistics_kernel(score, queries, keys, total, edges, found, mass, row_0, n_row,
                               rows_in_all, n_bin, length, n_block, n_chunk, width,
                               WHOLE: tl.constexpr, PRECISION: tl.constexpr,
                               CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                               BINS: tl.constexpr):  # fmt: skip
    """Statistics of rows row_0.. of the map, over all keys, from the latest chunk back."""
    program = tl.program_id(0).to(tl.int64)
    lane, r = program // n_block, row_0 // CHUNK + (program % n_block).to(tl.int32)
    score += lane * n_chunk * CHUNK * CHUNK
    queries += lane * n_chunk * CHUNK * width
    keys += lane * n_chunk * CHUNK * width
    total += lane * n_chunk * width
    i = tl.arange(0, CHUNK)
    row = r * CHUNK + i
    padded = n_chunk * CHUNK
    q = rows(queries, r * CHUNK, padded, width, 1, width, 0, WHOLE, CHUNK, WIDTH)
    w = rows(score, r * CHUNK, padded, CHUNK, 1, CHUNK, 0, True, CHUNK, CHUNK).to(tl.float32)
    sums = tl.zeros([CHUNK], tl.float64)
    top = tl.full([CHUNK], float("-inf"), tl.float32)
    sums, squares, negative, absolute, moment, top = gather(
        w, (row < length)[None, :], sums, sums, sums, sums, sums, top
    )
    lags = tl.zeros([CHUNK, BINS], tl.float64)
    if BINS > 1:
        lags = add_lags(lags, tl.abs(w), edges, 0, 0, n_bin, BINS)
    between = tl.full([WIDTH], 1.0, tl.float64)
    for step in tl.range(0, r):
        c = r - 1 - step
        w = earlier(q, keys, between, c, padded, width, WHOLE, PRECISION, CHUNK, WIDTH)
        sums, squares, negative, absolute, moment, top = gather(
            w, (i >= 0)[None, :], sums, squares, negative, absolute, moment, top
        )
        if BINS > 1:
            lags = add_lags(lags, tl.abs(w), edges, r * CHUNK, c * CHUNK, n_bin, BINS)
        between *= whole_decay(total, c, width, WIDTH)
    top = tl.where(row + 1 < length, tl.maximum(top, 0.0), top)
    put_sums(found + lane * n_row, mass + lane * n_row * n_bin, sums, squares, negative, absolute,
             moment, top, lags, row - row_0, n_row, rows_in_all, n_bin, BINS)  # fmt: skip
