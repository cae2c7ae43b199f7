"""Kernels of maps without decay or with one decay a head and token: tiles, and row statistics.

A program owns one head and ROWS rows, and walks over blocks of COLUMNS keys in a fixed order. The
cumulative log decay g, in units of log 2 from the start of the row, is a float64 sum held as two
float32: sums in float32 added from chunk to chunk miss by up to 185 units.
"""

import triton
import triton.language as tl

from dsf_kernels.chunks import exp2_gap, rows, two_floats
from dsf_kernels.exponentials import LOG2_E


@triton.jit(do_not_specialize=["length"])
def running_kernel(log_decay, high, low, length, n_head, stride_b, stride_t, stride_h,
                   CHUNK: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """g of every step of a row (batch, head, time), high and low."""
    n_block = tl.cdiv(n_head, HEADS)
    program = tl.program_id(0).to(tl.int64)
    block, batch = program % n_block, program // n_block
    head = (block * HEADS + tl.arange(0, HEADS))[None, :]
    source = log_decay + batch * stride_b + head * stride_h
    carry = tl.zeros([HEADS], tl.float64)
    for first in tl.range(0, length, CHUNK):
        time = (first + tl.arange(0, CHUNK)).to(tl.int64)[:, None]
        keep = (time < length) & (head < n_head)
        step = tl.load(source + time * stride_t, keep, other=0.0).to(tl.float32)
        step = tl.maximum(step, -110.0).to(tl.float64) * LOG2_E  # as cumulate_kernel
        top, rest = two_floats(carry[None, :] + tl.cumsum(step, 0))
        carry += tl.sum(step, 0)
        place = (batch * n_head + head) * length + time
        tl.store(high + place, top, keep)
        tl.store(low + place, rest, keep)


# -- what all kernels of maps share ------------------------------------------------------------


@triton.jit
def products(q, query, key, top, first, n_query, n_key, q_t, q_n, k_t, k_n, width,
             FULL: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """q_i . k_j for rows top.. and keys first..; q: the queries' first SLAB states."""
    first = tl.cast(first, tl.int32)  # a Python number in the interpreter
    if WIDTH == SLAB:
        k = rows(key, first, n_key, k_t, k_n, width, 0, FULL, COLUMNS, SLAB).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        s = tl.zeros([ROWS, COLUMNS], tl.float32)
        for offset in tl.range(0, WIDTH, SLAB):
            x = rows(query, top, n_query, q_t, q_n, width, offset, FULL, ROWS, SLAB).to(q.dtype)
            k = rows(key, first, n_key, k_t, k_n, width, offset, FULL, COLUMNS, SLAB).to(q.dtype)
            s = tl.dot(x, tl.trans(k), s, input_precision=PRECISION)
    return s


@triton.jit
def put_tile(out, w, top, first, n_row, n_col, pitch, FULL: tl.constexpr):
    """Store weights at rows top.. and columns first.. of the result of one head."""
    i, j = tl.arange(0, w.shape[0])[:, None], tl.arange(0, w.shape[1])[None, :]
    place = out + tl.cast(top, tl.int64) * pitch + first + (i * pitch + j)
    w = w.to(out.dtype.element_ty)
    if FULL:
        tl.store(place, w)
    else:
        inside = (i >= -top) & (i < n_row - top) & (j >= -first) & (j < n_col - first)
        tl.store(place, w, inside)


@triton.jit
def add_lags(lags, size, edges, top, first, n_bin, BINS: tl.constexpr):
    """lags (rows, BINS) with the |w| of the tile at (top, first) added, where it meets a bin."""
    between = top - first
    i, j = tl.arange(0, size.shape[0]), tl.arange(0, size.shape[1])
    lag = between + i[:, None] - j[None, :]
    least, most = between - (size.shape[1] - 1), between + (size.shape[0] - 1)
    place = tl.arange(0, BINS)[None, :]
    for bin in tl.range(0, n_bin):
        low, high = tl.load(edges + bin), tl.load(edges + bin + 1)
        if (low <= most) & (high > least):
            mass = tl.sum(tl.where((lag >= low) & (lag < high), size, 0.0), 1)
            lags = tl.where(place == bin, lags + mass[:, None].to(tl.float64), lags)
    return lags


@triton.jit
def gather(w, exists, total, squares, negative, absolute, moment, top):
    """The sums (float64) and the maximum of each row with one tile added; w is 0 if not exists."""
    size = tl.abs(w)
    total += tl.sum(w, 1).to(tl.float64)
    squares += tl.sum(w * w, 1).to(tl.float64)
    negative += tl.sum(tl.maximum(-w, 0.0), 1).to(tl.float64)
    absolute += tl.sum(size, 1).to(tl.float64)
    bits = tl.log2(tl.where(size > 0, size, 1.0))
    moment += tl.sum(size * bits, 1).to(tl.float64)
    top = tl.maximum(top, tl.max(tl.where(exists, w, float("-inf")), 1))
    return total, squares, negative, absolute, moment, top


@triton.jit
def put_sums(found, mass, total, squares, negative, absolute, moment, top, lags,
             row, n_row, rows_in_all, n_bin, BINS: tl.constexpr):  # fmt: skip
    """Store the six statistics of rows, (statistic, batch head row), and the mass by lag."""
    keep = (row >= 0) & (row < n_row)
    row, rows_in_all = row.to(tl.int64), tl.cast(rows_in_all, tl.int64)
    found += row
    tl.store(found, total, keep)
    tl.store(found + rows_in_all, squares, keep)
    tl.store(found + 2 * rows_in_all, negative, keep)
    tl.store(found + 3 * rows_in_all, absolute, keep)
    tl.store(found + 4 * rows_in_all, moment, keep)
    tl.store(found + 5 * rows_in_all, top.to(tl.float64), keep)
    if BINS > 1:
        bin = tl.arange(0, BINS)[None, :]
        place = mass + row[:, None] * n_bin + bin
        tl.store(place, lags, keep[:, None] & (bin < n_bin))


# -- without decay, and with one decay a head --------------------------------------------------


@triton.jit
def decayed(s, high, low, row, column, n_query, n_key, scale, DECAY: tl.constexpr):
    """scale s_ij 2^(g_i - g_j) for j <= i, else 0."""
    pair = (column[None, :] <= row[:, None]) & (row[:, None] < n_query)
    if DECAY:
        late = tl.load(high + row, row < n_query, other=0.0)
        late_low = tl.load(low + row, row < n_query, other=0.0)
        early = tl.load(high + column, column < n_key, other=0.0)
        early_low = tl.load(low + column, column < n_key, other=0.0)
        s = s * exp2_gap(
            late[:, None], late_low[:, None], early[None, :], early_low[None, :], pair
        )
    return tl.where(pair, s * scale, 0.0)


@triton.jit(do_not_specialize=["row_0", "n_row", "col_0", "n_col", "span", "length"])
def linear_tiles_kernel(query, key, high, low, out, row_0, n_row, col_0, n_col, pitch, span,
                        length, n_head, q_ratio, k_ratio, width, scale,
                        q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n,
                        DECAY: tl.constexpr, FULL: tl.constexpr, COMPUTE: tl.constexpr,
                        PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        WIDTH: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """Rows row_0.. and columns col_0.. of the map; a program walks over `span` blocks of keys."""
    n_block, n_span = tl.cdiv(n_row, ROWS), tl.cdiv(n_col, COLUMNS * span)
    program = tl.program_id(0).to(tl.int64)
    part, block = program % n_span, program // n_span % n_block
    lane = program // (n_span * n_block)
    batch, head = lane // n_head, lane % n_head
    query += batch * q_b + head // q_ratio * q_h
    key += batch * k_b + head // k_ratio * k_h
    high += lane * length
    low += lane * length
    out += lane * n_row * pitch
    block = block.to(tl.int32) * ROWS
    top = row_0 + block
    start = part.to(tl.int32) * span * COLUMNS
    stop = tl.minimum(start + span * COLUMNS, n_col)
    live = tl.maximum(start, tl.minimum(stop, top + ROWS - col_0))
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    q = rows(query, top, length, q_t, q_n, width, 0, FULL, ROWS, SLAB).to(COMPUTE)
    live = start + tl.cdiv(live - start, COLUMNS) * COLUMNS
    for first in tl.range(start, live, COLUMNS):
        s = products(q, query, key, top, col_0 + first, length, length, q_t, q_n, k_t, k_n, width,
                     FULL, PRECISION, ROWS, COLUMNS, WIDTH, SLAB)  # fmt: skip
        w = decayed(s, high, low, top + i, col_0 + first + j, length, length, scale, DECAY)
        put_tile(out, w, block, first, n_row, n_col, pitch, FULL)
    for first in tl.range(live, stop, COLUMNS):
        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        put_tile(out, zero, block, first, n_row, n_col, pitch, FULL)


@triton.jit(do_not_specialize=["row_0", "n_row", "length", "rows_in_all", "n_bin"])
def linear_statistics_kernel(query, key, high, low, edges, found, mass, row_0, n_row,
                             rows_in_all, n_bin, length, n_head, q_ratio, k_ratio, width, scale,
                             q_b, q_t, q_h, q_n, k_b, k_t, k_h, k_n,
                             DECAY: tl.constexpr, FULL: tl.constexpr, COMPUTE: tl.constexpr,
                             PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                             WIDTH: tl.constexpr, SLAB: tl.constexpr,
                             BINS: tl.constexpr):  # fmt: skip
    """Statistics of rows row_0.. of the map, over all keys."""
    n_block = tl.cdiv(n_row, ROWS)
    program = tl.program_id(0).to(tl.int64)
    lane, block = program // n_block, (program % n_block).to(tl.int32) * ROWS
    batch, head = lane // n_head, lane % n_head
    query += batch * q_b + head // q_ratio * q_h
    key += batch * k_b + head // k_ratio * k_h
    high += lane * length
    low += lane * length
    top_row = row_0 + block
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row = top_row + i
    q = rows(query, top_row, length, q_t, q_n, width, 0, FULL, ROWS, SLAB).to(COMPUTE)
    total = tl.zeros([ROWS], tl.float64)
    squares, negative, absolute, moment = total, total, total, total
    top = tl.full([ROWS], float("-inf"), tl.float32)
    lags = tl.zeros([ROWS, BINS], tl.float64)
    for first in tl.range(0, tl.minimum(top_row + ROWS, length), COLUMNS):
        s = products(q, query, key, top_row, first, length, length, q_t, q_n, k_t, k_n, width,
                     FULL, PRECISION, ROWS, COLUMNS, WIDTH, SLAB)  # fmt: skip
        column = first + j
        w = decayed(s, high, low, row, column, length, length, scale, DECAY)
        total, squares, negative, absolute, moment, top = gather(
            w, (column < length)[None, :], total, squares, negative, absolute, moment, top
        )
        if BINS > 1:
            lags = add_lags(lags, tl.abs(w), edges, top_row, first, n_bin, BINS)
    top = tl.where(row + 1 < length, tl.maximum(top, 0.0), top)
    put_sums(found + lane * n_row, mass + lane * n_row * n_bin, total, squares, negative, absolute,
             moment, top, lags, block + i, n_row, rows_in_all, n_bin, BINS)  # fmt: skip
