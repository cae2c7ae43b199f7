"""Kernels of softmax maps: the maximum and the sums of each row in one pass, then the weights.

z = scale q_i . k_j + bias_ij in units of log 2, -inf where a pair is not. A row keeps its running
maximum m, and sums of 2^(z - m) that a new maximum rescales.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import rows
from dsf_kernels.exponentials import LOG2_E
from dsf_kernels.map_kernels import add_lags, products, put_sums, put_tile


@triton.jit
def logits(s, bias, top, first, n_query, n_key, scale, b_q, b_k, BIAS: tl.constexpr,
           CAUSAL: tl.constexpr):  # fmt: skip
    """z of rows top.. and keys first.. from their products s."""
    i, j = tl.arange(0, s.shape[0])[:, None], tl.arange(0, s.shape[1])[None, :]
    pair = (i < n_query - top) & (j < n_key - first)
    if CAUSAL:
        pair = pair & (j + first <= i + top)
    z = s * scale
    if BIAS:
        bias += tl.cast(top, tl.int64) * b_q + tl.cast(first, tl.int64) * b_k
        z += tl.load(bias + (i * b_q + j * b_k), pair, other=0.0).to(tl.float32)
    return tl.where(pair, z * LOG2_E, float("-inf"))


@triton.jit(do_not_specialize=["row_0", "n_row", "n_query", "n_key", "rows_in_all", "n_bin"])
def softmax_rows_kernel(query, key, bias, edges, peak, found, mass, row_0, n_row, rows_in_all,
                        n_bin, n_query, n_key, n_head, k_ratio, width, scale,
                        q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, b_b, b_h, b_q, b_k,
                        CAUSAL: tl.constexpr, BIAS: tl.constexpr, STATISTICS: tl.constexpr,
                        FULL: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                        SLAB: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """m and sum 2^(z - m) of rows row_0.. into `peak` (2, ...); STATISTICS into `found`, `mass`.

    `found` as put_sums has it, of the weights; the mass by lag likewise.
    """
    n_block = tl.cdiv(n_row, ROWS)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // n_block, (program % n_block).to(tl.int32) * ROWS
    batch, head = lane // n_head, lane % n_head
    query += batch * q_b + head * q_h
    key += batch * k_b + head // k_ratio * k_h
    bias += batch * b_b + head * b_h
    first_row = row_0 + block
    i = tl.arange(0, ROWS)
    q = rows(query, first_row, n_query, q_t, q_n, width, 0, FULL, ROWS, SLAB).to(COMPUTE)
    total = tl.zeros([ROWS], tl.float64)
    squares, moment = total, total
    m = tl.full([ROWS], float("-inf"), tl.float32)
    lags = tl.zeros([ROWS, BINS], tl.float64)
    stop = tl.minimum(first_row + ROWS, n_key) if CAUSAL else n_key
    for first in tl.range(0, stop, COLUMNS):
        s = products(q, query, key, first_row, first, n_query, n_key, q_t, q_n, k_t, k_n, width,
                     FULL, PRECISION, ROWS, COLUMNS, WIDTH, SLAB)  # fmt: skip
        z = logits(s, bias, first_row, first, n_query, n_key, scale, b_q, b_k, BIAS, CAUSAL)
        higher = tl.maximum(m, tl.max(z, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - level[:, None])
        drop = tl.where(m == float("-inf"), 0.0, m - level)
        keep = tl.exp2(drop).to(tl.float64)
        m = higher
        if STATISTICS:
            below = tl.where(p > 0, z - level[:, None], 0.0)
            moment = keep * (moment + drop.to(tl.float64) * total)
            moment += tl.sum(p * below, 1).to(tl.float64)
            squares = keep * keep * squares + tl.sum(p * p, 1).to(tl.float64)
            if BINS > 1:
                lags = add_lags(lags * keep[:, None], p, edges, first_row, first, n_bin, BINS)
        total = keep * total + tl.sum(p, 1).to(tl.float64)
    if STATISTICS:
        alive = total > 0
        over = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
        one = tl.where(alive, total * over, 0.0)
        bits = moment * over - tl.log2(tl.where(alive, total, 1.0))
        put_sums(found + lane * n_row, mass + lane * n_row * n_bin, one, squares * over * over,
                 tl.zeros([ROWS], tl.float64), one, bits, over, lags * over[:, None], block + i,
                 n_row, rows_in_all, n_bin, BINS)  # fmt: skip
    else:
        keep_row = block + i < n_row
        place = peak + lane * n_row + block + i
        tl.store(place, m, keep_row)
        tl.store(place + rows_in_all, total.to(tl.float32), keep_row)


@triton.jit(do_not_specialize=["row_0", "n_row", "col_0", "n_col", "span", "n_query", "n_key",
                               "rows_in_all"])  # fmt: skip
def softmax_tiles_kernel(query, key, bias, peak, out, row_0, n_row, col_0, n_col, pitch, span,
                         rows_in_all, n_query, n_key, n_head, k_ratio, width, scale,
                         q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n, b_b, b_h, b_q, b_k,
                         CAUSAL: tl.constexpr, BIAS: tl.constexpr, FULL: tl.constexpr,
                         COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                         SLAB: tl.constexpr):  # fmt: skip
    """2^(z - m) / sum for rows row_0.. and columns col_0.., `span` blocks of keys a program."""
    n_block, n_span = tl.cdiv(n_row, ROWS), tl.cdiv(n_col, COLUMNS * span)
    program = tl.program_id(0).to(tl.int64)
    part, block = program % n_span, program // n_span % n_block
    lane = program // (n_span * n_block)
    batch, head = lane // n_head, lane % n_head
    query += batch * q_b + head * q_h
    key += batch * k_b + head // k_ratio * k_h
    bias += batch * b_b + head * b_h
    out += lane * n_row * pitch
    block = block.to(tl.int32) * ROWS
    first_row = row_0 + block
    start = part.to(tl.int32) * span * COLUMNS
    stop = tl.minimum(start + span * COLUMNS, n_col)
    live = tl.minimum(stop, first_row + ROWS - col_0) if CAUSAL else stop
    live = start + tl.cdiv(tl.maximum(live, start) - start, COLUMNS) * COLUMNS
    i = tl.arange(0, ROWS)
    q = rows(query, first_row, n_query, q_t, q_n, width, 0, FULL, ROWS, SLAB).to(COMPUTE)
    place = peak + lane * n_row + block + i
    m = tl.load(place, block + i < n_row, other=0.0)
    total = tl.load(place + rows_in_all, block + i < n_row, other=0.0)
    m = tl.where(m == float("-inf"), 0.0, m)
    over = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    for first in tl.range(start, live, COLUMNS):
        s = products(q, query, key, first_row, col_0 + first, n_query, n_key, q_t, q_n, k_t, k_n,
                     width, FULL, PRECISION, ROWS, COLUMNS, WIDTH, SLAB)  # fmt: skip
        z = logits(
            s, bias, first_row, col_0 + first, n_query, n_key, scale, b_q, b_k, BIAS, CAUSAL
        )
        w = tl.exp2(z - m[:, None]) * over[:, None]
        put_tile(out, w, block, first, n_row, n_col, pitch, FULL)
    for first in tl.range(live, stop, COLUMNS):
        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        put_tile(out, zero, block, first, n_row, n_col, pitch, FULL)
