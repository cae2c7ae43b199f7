"""Device code of streaming hierarchical attention: causal, rows free, columns tied by group.

A tile is a run of tokens that ends where a group ends. Inside it, scores of tokens are averaged
over the columns of each group that a row sees whole; groups before the tile are read from their
means, level by level: nodes of one level whose family began before the tile and goes on in it.
All levels' nodes lie in one array, the lowest level first. Scores are logarithms to base 2.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_exp2, fast_log2, fast_reciprocal
from dsf_kernels.hierarchical_levels import LIVE, NONE, pooled, slots
from dsf_kernels.hierarchical_root import DEAD
from dsf_kernels.hierarchical_tiles import counted, locate, put, take


@triton.jit
def means_kernel(key, value, count, mean_k, mean_v, sub_count, n_item, n_tile, n_sub, n_head,
                 width, channels, first_sub, n_node, first_item,
                 k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, n_b, n_t, n_h,
                 LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr,
                 N: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr,
                 MASKED: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Means of k and v, and counts, of the nodes of a level, from tokens or the level below."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * SUBS * PLACES[N]
    inside = inside & (slot < n_item - first)
    place = first + first_item
    key += batch * k_b + head * k_h + place * k_t
    value += batch * v_b + head * v_h + place * v_t
    count += batch * n_b + head * n_h + place * n_t
    n, _ = counted(count, count, slot, inside, n_t, LEAF, MASKED)
    total = pooled(n, ROWS, ROWS // SUBS)
    sub = tl.arange(0, SUBS)
    live = sub < n_sub - tile * SUBS
    line = (batch * n_node + first_sub + tile * SUBS) * n_head + head
    part = fast_reciprocal(tl.maximum(total, 1.0))[:, None]
    k = take(key, slot, n > 0, k_t, k_w, width, WIDTH).to(tl.float32) * n[:, None]
    k = tl.sum(tl.reshape(k, [SUBS, ROWS // SUBS, WIDTH]), 1) * part
    put(mean_k + line * width, k, sub, live, n_head * width, width, WIDTH)
    v = take(value, slot, n > 0, v_t, v_w, channels, CHANNELS).to(tl.float32) * n[:, None]
    v = tl.sum(tl.reshape(v, [SUBS, ROWS // SUBS, CHANNELS]), 1) * part
    put(mean_v + line * channels, v, sub, live, n_head * channels, channels, CHANNELS)
    tl.store(sub_count + line + sub * n_head, total, live)


@triton.jit
def left_siblings(M: tl.constexpr, K: tl.constexpr, B: tl.constexpr):
    """Which of K nodes are left siblings of those that hold the M rows."""
    row = tl.arange(0, M)[:, None] // (M // K)
    column = tl.arange(0, K)[None, :]
    return ((row ^ column) < B) & (row > column)


@triton.jit
def tied(T, n, M: tl.constexpr, K: tl.constexpr, PADS: tl.constexpr, U: tl.constexpr,
         N: tl.constexpr):  # fmt: skip
    """Mean scores (M, K) of the group that each row sees in each column; T their sums."""
    if U == N:
        z = tl.zeros([M, K], tl.float32)
    else:
        B: tl.constexpr = PADS[U]
        up = tl.sum(tl.reshape(T, [M, K // B, B]), 2)
        z_up = tied(up, pooled(n, K, B), M, K // B, PADS, U + 1, N)
        wide = tl.reshape(tl.broadcast_to(z_up[:, :, None], [M, K // B, B]), [M, K])
        mean = T * fast_reciprocal(tl.maximum(n, 1.0))[None, :]
        z = tl.where(left_siblings(M, K, B), mean, wide)
    return z


@triton.jit
def untied(dz, n, M: tl.constexpr, K: tl.constexpr, PADS: tl.constexpr, U: tl.constexpr,
           N: tl.constexpr):  # fmt: skip
    """Gradient of T, given that of the mean scores."""
    if U == N:
        dT = tl.zeros([M, K], tl.float32)
    else:
        B: tl.constexpr = PADS[U]
        up = tl.sum(tl.reshape(dz, [M, K // B, B]), 2)
        dT_up = untied(up, pooled(n, K, B), M, K // B, PADS, U + 1, N)
        wide = tl.reshape(tl.broadcast_to(dT_up[:, :, None], [M, K // B, B]), [M, K])
        mean = dz * fast_reciprocal(tl.maximum(n, 1.0))[None, :]
        dT = tl.where(left_siblings(M, K, B), mean, 0.0) + wide
    return dT


@triton.jit
def inner_scores(q, k, n, scale, PADS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Scores of each row with what it sees inside the tile, by token; NONE for the rest."""
    T = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    i = tl.arange(0, ROWS)
    row, column = i[:, None], i[None, :]
    z = tl.where(row == column, T, tied(T, n, ROWS, ROWS, PADS, 0, N))
    return tl.where((row >= column) & (n[None, :] > 0), z, NONE)


@triton.jit
def groups(mean_k, mean_v, count, node, end, n_head, width, channels, COMPUTE: tl.constexpr,
           BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Means of k and v, and counts, of nodes node.. before end."""
    at = tl.arange(0, BLOCK)
    live = at < end - node
    line = node * n_head
    n = tl.load(count + line + at * n_head, live, other=0.0)
    k = take(mean_k + line * width, at, live, n_head * width, 1, width, WIDTH)
    v = take(mean_v + line * channels, at, live, n_head * channels, 1, channels, CHANNELS)
    return k.to(COMPUTE), v.to(COMPUTE), n


@triton.jit
def outer_scores(q, k, n, scale, PRECISION: tl.constexpr):
    """Scores of rows and groups + log n, NONE for empty groups."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    bias = tl.where(n > 0, fast_log2(tl.maximum(n, 1.0)), NONE)
    return z + bias[None, :]


@triton.jit(do_not_specialize=["length", "n_tile", "n_node"])
def stream_kernel(query, key, value, mask, mean_k, mean_v, count, out, norm, length, n_tile,
                  n_node, n_head, width, channels, scale, q_b, q_t, q_h, q_w,
                  k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, m_b, m_t,
                  LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr,
                  N: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr,
                  FAMILIES: tl.constexpr, UPPER: tl.constexpr, MASKED: tl.constexpr,
                  COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
                  WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Outputs and log normalisers of a tile of tokens."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * PLACES[N]
    inside = inside & (slot < PLACES[N]) & (slot < length - first)
    query += batch * q_b + head * q_h + first * q_t
    key += batch * k_b + head * k_h + first * k_t
    value += batch * v_b + head * v_h + first * v_t
    mask += batch * m_b + first * m_t
    n, _ = counted(mask, mask, slot, inside, m_t, True, MASKED)
    q = take(query, slot, inside, q_t, q_w, width, WIDTH).to(COMPUTE)
    k = take(key, slot, n > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
    v = take(value, slot, n > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
    z = inner_scores(q, k, n, scale, PADS, N, ROWS, PRECISION)
    high = tl.max(z, 1)
    p = tl.where(z > LIVE, fast_exp2(z - high[:, None]), 0.0)
    total = tl.sum(p, 1)
    rows = tl.dot(p.to(COMPUTE), v, input_precision=PRECISION)
    mean_k += (batch * n_node * n_head + head) * width
    mean_v += (batch * n_node * n_head + head) * channels
    count += batch * n_node * n_head + head
    base = first * 0
    for level in tl.static_range(UPPER):
        start = base
        if FAMILIES[level] > 0:
            start += first // FAMILIES[level] * (FAMILIES[level] // SPANS[level])
        end = base + first // SPANS[level]
        for node in tl.range(start, end, BLOCK):
            mk, mv, m = groups(mean_k, mean_v, count, base * 0 + node, end, n_head, width,
                               channels, COMPUTE, BLOCK, WIDTH, CHANNELS)  # fmt: skip
            score = outer_scores(q, mk, m, scale, PRECISION)
            new = tl.maximum(high, tl.max(score, 1))
            part = tl.where(score > LIVE, fast_exp2(score - new[:, None]), 0.0)
            factor = fast_exp2(high - new)
            total = total * factor + tl.sum(part, 1)
            rows = rows * factor[:, None]
            rows += tl.dot(part.to(COMPUTE), mv, input_precision=PRECISION)
            high = new
        base += tl.cdiv(length, SPANS[level])
    alone = total == 0.0
    total = tl.where(alone, 1.0, total)
    rows = rows * fast_reciprocal(total)[:, None]
    line = (batch * length + first) * n_head + head
    put(out + line * channels, rows, slot, inside, n_head * channels, channels, CHANNELS)
    high = tl.where(alone, DEAD, high + fast_log2(total))
    tl.store(norm + line + slot * n_head, high, inside)
