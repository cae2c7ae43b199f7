"""Device code of hierarchical attention: one large family, the root's, over blocks of its items.

Every item attends to its siblings with key bias log n, and to what it holds itself by g; there
is no matrix of all pairs. Scores and g are logarithms to base 2. DIAGONAL: the items are tokens,
whose own key is a key like the others (then there is no g).
"""

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_exp2, fast_log2
from dsf_kernels.hierarchical_levels import LIVE, NONE
from dsf_kernels.hierarchical_tiles import counted, locate, put, take

DEAD = tl.constexpr(1e30)  # the log normaliser of rows that attend to nothing


@triton.jit
def scores(rows, columns, bias, n_row, n_column, gap, scale, DIAGONAL: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Scaled products of rows and columns + bias, NONE where a pair does not count."""
    S = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * scale + bias
    seen = (n_row[:, None] > 0) & (n_column[None, :] > 0)
    if not DIAGONAL:
        place = tl.arange(0, rows.shape[0])[:, None] - tl.arange(0, columns.shape[0])[None, :]
        seen = seen & (place != gap)
    return tl.where(seen, S, NONE)


@triton.jit(do_not_specialize=["n_item", "n_block"])
def root_kernel(query, key, value, count, level_g, out, own, norm, n_item, n_block, n_head,
                width, channels, scale,
                q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, n_b, n_t, n_h,
                LEAF: tl.constexpr, MASKED: tl.constexpr, DIAGONAL: tl.constexpr,
                ROWS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Outputs, own masses and log normalisers of a block of items."""
    batch, head, block = locate(n_block, n_head)
    row = tl.arange(0, ROWS)
    query += batch * q_b + head * q_h
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    count += batch * n_b + head * n_h
    level_g += batch * n_b + head * n_h
    start = block * ROWS
    inside = row < n_item - start
    n, g = counted(count + start * n_t, level_g + start * n_t, row, inside, n_t, LEAF, MASKED)
    q = take(query + start * q_t, row, n > 0, q_t, q_w, width, WIDTH).to(COMPUTE)
    high = g
    total = tl.where(g > LIVE, 1.0, 0.0)
    rows = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in tl.range(0, n_item, ROWS):
        at = start * 0 + first  # in 64 bits
        seen = row < n_item - first
        m, _ = counted(count + at * n_t, level_g + at * n_t, row, seen, n_t, LEAF, MASKED)
        k = take(key + at * k_t, row, m > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
        v = take(value + at * v_t, row, m > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
        bias = fast_log2(tl.maximum(m, 1.0))[None, :]
        S = scores(q, k, bias, n, m, at - start, scale, DIAGONAL, PRECISION)
        new = tl.maximum(high, tl.max(S, 1))
        p = tl.where(S > LIVE, fast_exp2(S - new[:, None]), 0.0)
        factor = fast_exp2(high - new)
        total = total * factor + tl.sum(p, 1)
        rows = rows * factor[:, None]
        rows += tl.dot(p.to(COMPUTE), v, input_precision=PRECISION)
        high = new
    alone = total == 0.0
    total = tl.where(alone, 1.0, total)
    rows = rows / total[:, None]
    line = (batch * n_item + start) * n_head + head
    put(out + line * channels, rows, row, inside, n_head * channels, channels, CHANNELS)
    tl.store(norm + line + row * n_head, tl.where(alone, DEAD, high + fast_log2(total)), inside)
    if not LEAF:
        a = tl.where(alone, 1.0, fast_exp2(g - high) / total)
        tl.store(own + line + row * n_head, a, inside)


@triton.jit(do_not_specialize=["n_item", "n_block"])
def root_rows_kernel(query, key, value, count, out, own, norm, grad, grad_own, grad_q, grad_g,
                     delta, n_item, n_block, n_head, width, channels, scale, log_scale,
                     q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, n_b, n_t, n_h,
                     g_b, g_t, g_h, g_w, LEAF: tl.constexpr, MASKED: tl.constexpr,
                     DIAGONAL: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr,
                     PRECISION: tl.constexpr, WIDTH: tl.constexpr,
                     CHANNELS: tl.constexpr):  # fmt: skip
    """Gradients of q and g, and delta_i = grad_i.out_i + grad_own_i own_i."""
    batch, head, block = locate(n_block, n_head)
    row = tl.arange(0, ROWS)
    query += batch * q_b + head * q_h
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    count += batch * n_b + head * n_h
    start = block * ROWS
    inside = row < n_item - start
    here = count + start * n_t
    n, _ = counted(here, here, row, inside, n_t, LEAF, MASKED)
    q = take(query + start * q_t, row, n > 0, q_t, q_w, width, WIDTH).to(COMPUTE)
    grad += batch * g_b + head * g_h + start * g_t
    upstream = take(grad, row, inside, g_t, g_w, channels, CHANNELS).to(COMPUTE)
    line = (batch * n_item + start) * n_head + head
    step = n_head * channels
    given = take(out + line * channels, row, inside, step, 1, channels, CHANNELS)
    total = tl.sum(upstream.to(tl.float32) * given.to(tl.float32), 1)
    lse = tl.load(norm + line + row * n_head, inside, other=DEAD)
    if not LEAF:
        a = tl.load(own + line + row * n_head, inside, other=0.0)
        da = tl.load(grad_own + line + row * n_head, inside, other=0.0)
        total += a * da
        tl.store(grad_g + line + row * n_head, a * (da - total), inside)
    tl.store(delta + line + row * n_head, total, inside)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, n_item, ROWS):
        at = start * 0 + first  # in 64 bits
        there = count + at * n_t
        m, _ = counted(there, there, row, row < n_item - first, n_t, LEAF, MASKED)
        k = take(key + at * k_t, row, m > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
        v = take(value + at * v_t, row, m > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
        bias = fast_log2(tl.maximum(m, 1.0))[None, :]
        S = scores(q, k, bias, n, m, at - start, log_scale, DIAGONAL, PRECISION)
        p = fast_exp2(S - lse[:, None])
        dp = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
        dS = p * (dp - total[:, None])
        dq += tl.dot(dS.to(COMPUTE), k, input_precision=PRECISION)
    put(grad_q + line * width, dq * scale, row, inside, n_head * width, width, WIDTH)


@triton.jit(do_not_specialize=["n_item", "n_block"])
def root_columns_kernel(query, key, value, count, norm, delta, grad, grad_k, grad_v, n_item,
                        n_block, n_head, width, channels, scale, log_scale,
                        q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w,
                        n_b, n_t, n_h, g_b, g_t, g_h, g_w, LEAF: tl.constexpr,
                        MASKED: tl.constexpr, DIAGONAL: tl.constexpr, ROWS: tl.constexpr,
                        COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
                        CHANNELS: tl.constexpr):  # fmt: skip
    """Gradients of k and v; products are formed keys first, so that none is transposed."""
    batch, head, block = locate(n_block, n_head)
    row = tl.arange(0, ROWS)
    query += batch * q_b + head * q_h
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    count += batch * n_b + head * n_h
    grad += batch * g_b + head * g_h
    start = block * ROWS
    inside = row < n_item - start
    here = count + start * n_t
    n, _ = counted(here, here, row, inside, n_t, LEAF, MASKED)
    k = take(key + start * k_t, row, n > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
    v = take(value + start * v_t, row, n > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
    bias = fast_log2(tl.maximum(n, 1.0))[:, None]
    dk = tl.zeros([ROWS, WIDTH], tl.float32)
    dv = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in tl.range(0, n_item, ROWS):
        at = start * 0 + first  # in 64 bits
        seen = row < n_item - first
        there = count + at * n_t
        m, _ = counted(there, there, row, seen, n_t, LEAF, MASKED)
        q = take(query + at * q_t, row, m > 0, q_t, q_w, width, WIDTH).to(COMPUTE)
        upstream = take(grad + at * g_t, row, seen, g_t, g_w, channels, CHANNELS).to(COMPUTE)
        line = (batch * n_item + at) * n_head + head
        lse = tl.load(norm + line + row * n_head, seen, other=DEAD)
        total = tl.load(delta + line + row * n_head, seen, other=0.0)
        S = scores(k, q, bias, n, m, at - start, log_scale, DIAGONAL, PRECISION)
        p = fast_exp2(S - lse[None, :])
        dv += tl.dot(p.to(COMPUTE), upstream, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        dS = p * (dp - total[None, :])
        dk += tl.dot(dS.to(COMPUTE), q, input_precision=PRECISION)
    line = (batch * n_item + start) * n_head + head
    put(grad_k + line * width, dk * scale, row, inside, n_head * width, width, WIDTH)
    put(grad_v + line * channels, dv, row, inside, n_head * channels, channels, CHANNELS)
