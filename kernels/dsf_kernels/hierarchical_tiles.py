"""Device code of hierarchical attention: tiles of whole subtrees, up, down and back.

Items are the tokens, or the roots of subtrees handled before (their mean q, k, v, their count
and g). A tile is SUBS subtrees of items; see `hierarchical_levels` for its slots.
"""

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_reciprocal
from dsf_kernels.hierarchical_levels import (
    NONE,
    adjoint,
    diagonal,
    pooled,
    slots,
    spread,
    weigh,
)


@triton.jit
def locate(n_tile, n_head):
    """Batch, head and tile of this program; heads vary fastest, as they lie in memory."""
    program = tl.program_id(0).to(tl.int64)
    return program // (n_tile * n_head), program % n_head, program // n_head % n_tile


@triton.jit
def take(pointer, item, inside, stride_t, stride_w, width, WIDTH: tl.constexpr):
    """Rows (item, WIDTH) of a tensor, zero where not inside and beyond the width."""
    column = tl.arange(0, WIDTH)[None, :]
    keep = inside[:, None] & (column < width)
    return tl.load(pointer + item[:, None] * stride_t + column * stride_w, keep, other=0.0)


@triton.jit
def put(pointer, rows, item, inside, stride_t, width, WIDTH: tl.constexpr):
    """Store rows (item, WIDTH) whose numbers lie next to each other."""
    column = tl.arange(0, WIDTH)[None, :]
    keep = inside[:, None] & (column < width)
    tl.store(pointer + item[:, None] * stride_t + column, rows, keep)


@triton.jit
def with_diagonal(x, entries, M: tl.constexpr):
    """A matrix (M, M) with these entries in its diagonal."""
    i = tl.arange(0, M)
    return tl.where(i[:, None] == i[None, :], entries[:, None], x)


@triton.jit
def counted(count, level_g, item, inside, stride_t, LEAF: tl.constexpr, MASKED: tl.constexpr):
    """Count and g of the items; tokens count 1 where their mask says so, and have no g yet."""
    if LEAF:
        n = inside.to(tl.float32)
        if MASKED:
            real = tl.load(count + item * stride_t, inside, other=0)
            n = tl.where(real != 0, n, 0.0)
        g = tl.full(item.shape, NONE, tl.float32)
    else:
        n = tl.load(count + item * stride_t, inside, other=0.0)
        g = tl.load(level_g + item * stride_t, inside, other=NONE)
    return n, g


@triton.jit
def mean_rows(x, n, total, LEAF: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Means (SUBS, WIDTH) of rows, zero where they do not count, over their subtrees."""
    x = x.to(tl.float32)
    if not LEAF:
        x = x * n[:, None]
    x = tl.sum(tl.reshape(x, [SUBS, ROWS // SUBS, WIDTH]), 1)
    return x * fast_reciprocal(tl.maximum(total, 1.0))[:, None]


@triton.jit(do_not_specialize=["n_item", "n_tile", "n_sub"])
def tile_kernel(query, key, value, count, level_g, out, own, mean_q, mean_k, mean_v, sub_count,
                sub_g, n_item, n_tile, n_sub, n_head, width, channels, scale,
                q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, n_b, n_t, n_h,
                LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr, N: tl.constexpr,
                SUBS: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr,
                MASKED: tl.constexpr, SELF: tl.constexpr, TOP: tl.constexpr,
                COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
                CHANNELS: tl.constexpr):  # fmt: skip
    """Up: what each subtree is to the level above, and its own part of the outputs."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * SUBS * PLACES[N]
    inside = inside & (slot < n_item - first)
    query += batch * q_b + head * q_h + first * q_t
    key += batch * k_b + head * k_h + first * k_t
    value += batch * v_b + head * v_h + first * v_t
    start = batch * n_b + head * n_h + first * n_t
    n, g = counted(count + start, level_g + start, slot, inside, n_t, LEAF, MASKED)
    q = take(query, slot, n > 0, q_t, q_w, width, WIDTH).to(COMPUTE)
    k = take(key, slot, n > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
    v = take(value, slot, n > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
    T = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if LEAF and SELF:
        g = tl.where(n > 0, diagonal(T, ROWS), NONE)
    if not LEAF:
        T = T * (n[:, None] * n[None, :])
    Y, a, total, value_g = weigh(T, n, g, ROWS, PADS, 0, N, LEAF)
    if not LEAF:
        Y = Y * n[None, :]
    elif SELF:
        Y = with_diagonal(Y, a, ROWS)
    rows = tl.dot(Y.to(COMPUTE), v, input_precision=PRECISION)
    line = (batch * n_item + first) * n_head + head
    put(out + line * channels, rows, slot, inside, n_head * channels, channels, CHANNELS)
    if not LEAF:
        tl.store(own + line + slot * n_head, a, inside)
    if not TOP:
        sub = tl.arange(0, SUBS)
        live = sub < n_sub - tile * SUBS
        line = (batch * n_sub + tile * SUBS) * n_head + head
        q_up = mean_rows(q, n, total, LEAF, ROWS, SUBS, WIDTH)
        k_up = mean_rows(k, n, total, LEAF, ROWS, SUBS, WIDTH)
        v_up = mean_rows(v, n, total, LEAF, ROWS, SUBS, CHANNELS)
        put(mean_q + line * width, q_up, sub, live, n_head * width, width, WIDTH)
        put(mean_k + line * width, k_up, sub, live, n_head * width, width, WIDTH)
        put(mean_v + line * channels, v_up, sub, live, n_head * channels, channels, CHANNELS)
        tl.store(sub_count + line + sub * n_head, total, live)
        tl.store(sub_g + line + sub * n_head, value_g, live)


@triton.jit(do_not_specialize=["n_item", "n_block", "n_sub"])
def descend_kernel(part, own, above, mass, out, out_own, n_item, n_block, n_sub, n_head,
                   channels, span, LEAF: tl.constexpr, ROWS: tl.constexpr,
                   CHANNELS: tl.constexpr):  # fmt: skip
    """Down: outputs above + mass part, own masses mass own; above and mass of the subtree."""
    batch, head, block = locate(n_block, n_head)
    row = tl.arange(0, ROWS)
    inside = row < n_item - block * ROWS
    sub = (block * ROWS + row) // span
    line = (batch * n_item + block * ROWS) * n_head + head
    up = (batch * n_sub + sub) * n_head + head
    a = tl.load(mass + up, inside, other=0.0)
    zero = tl.zeros([ROWS], tl.int64)
    high = take(above, zero + up, inside, channels, 1, channels, CHANNELS)
    step = n_head * channels
    low = take(part + line * channels, row, inside, step, 1, channels, CHANNELS)
    rows = high + a[:, None] * low.to(tl.float32)
    put(out + line * channels, rows, row, inside, step, channels, CHANNELS)
    if not LEAF:
        kept = tl.load(own + line + row * n_head, inside, other=0.0)
        tl.store(out_own + line + row * n_head, a * kept, inside)


@triton.jit(do_not_specialize=["n_item", "n_tile", "n_sub"])
def gather_kernel(grad, grad_own, part, own, grad_out, grad_mass, n_item, n_tile, n_sub, n_head,
                  channels, g_b, g_t, g_h, g_w,
                  LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr,
                  N: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr, LEAF: tl.constexpr,
                  CHANNELS: tl.constexpr):  # fmt: skip
    """Back, up: gradients of what a subtree gets from above, out = above + mass part."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * SUBS * PLACES[N]
    inside = inside & (slot < n_item - first)
    line = (batch * n_item + first) * n_head + head
    grad += batch * g_b + head * g_h + first * g_t
    upstream = take(grad, slot, inside, g_t, g_w, channels, CHANNELS).to(tl.float32)
    step = n_head * channels
    low = take(part + line * channels, slot, inside, step, 1, channels, CHANNELS)
    mass = tl.sum(upstream * low.to(tl.float32), 1)
    if not LEAF:
        kept = tl.load(own + line + slot * n_head, inside, other=0.0)
        mass += kept * tl.load(grad_own + line + slot * n_head, inside, other=0.0)
    sub = tl.arange(0, SUBS)
    live = sub < n_sub - tile * SUBS
    line = (batch * n_sub + tile * SUBS) * n_head + head
    rows = tl.sum(tl.reshape(upstream, [SUBS, ROWS // SUBS, CHANNELS]), 1)
    put(grad_out + line * channels, rows, sub, live, step, channels, CHANNELS)
    tl.store(grad_mass + line + sub * n_head, pooled(mass, ROWS, ROWS // SUBS), live)


@triton.jit
def share_down(pointer, line, share, step, width, ROWS: tl.constexpr, SUBS: tl.constexpr,
               WIDTH: tl.constexpr, n_live):  # fmt: skip
    """Every item's share of the gradient of its subtree's mean."""
    sub = tl.arange(0, ROWS) // (ROWS // SUBS)
    rows = take(pointer + line * width, sub, sub < n_live, step * width, 1, width, WIDTH)
    return share[:, None] * rows


@triton.jit(do_not_specialize=["n_item", "n_tile", "n_sub"])
def tile_gradient_kernel(query, key, value, count, level_g, grad, grad_own, mass, up_q, up_k,
                         up_v, up_g, grad_q, grad_k, grad_v, grad_g, n_item, n_tile, n_sub,
                         n_head, width, channels, scale, log_scale,
                         q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w,
                         n_b, n_t, n_h, g_b, g_t, g_h, g_w,
                         LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr,
                         N: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr,
                         LEAF: tl.constexpr, MASKED: tl.constexpr, SELF: tl.constexpr,
                         TOP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                         WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Back, down: gradients of the items, with what comes through their subtrees' means and g."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * SUBS * PLACES[N]
    inside = inside & (slot < n_item - first)
    start = batch * n_b + head * n_h + first * n_t
    n, g = counted(count + start, level_g + start, slot, inside, n_t, LEAF, MASKED)
    query += batch * q_b + head * q_h + first * q_t
    key += batch * k_b + head * k_h + first * k_t
    value += batch * v_b + head * v_h + first * v_t
    grad += batch * g_b + head * g_h + first * g_t
    q = take(query, slot, n > 0, q_t, q_w, width, WIDTH).to(COMPUTE)
    k = take(key, slot, n > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
    v = take(value, slot, n > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
    upstream = take(grad, slot, inside, g_t, g_w, channels, CHANNELS).to(COMPUTE)
    line = (batch * n_item + first) * n_head + head
    up = (batch * n_sub + tile * SUBS) * n_head + head
    n_live = n_sub - tile * SUBS
    T = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log_scale
    D = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
    if LEAF and SELF:
        g = tl.where(n > 0, diagonal(T, ROWS), NONE)
    sub = tl.arange(0, SUBS)
    factor = tl.full([ROWS], 1.0, tl.float32)  # what of an item's outputs reaches it from above
    dg_root = tl.zeros([SUBS], tl.float32)
    if not TOP:
        factor = spread(tl.load(mass + up + sub * n_head, sub < n_live, other=0.0), ROWS,
                        ROWS // SUBS)  # fmt: skip
        dg_root = tl.load(up_g + up + sub * n_head, sub < n_live, other=0.0)
    D = D * factor[:, None]
    da = tl.zeros([ROWS], tl.float32)
    if LEAF:
        if SELF:
            da = diagonal(D, ROWS)
    else:
        da = tl.load(grad_own + line + slot * n_head, inside, other=0.0) * factor
        T = T * (n[:, None] * n[None, :])
        D = D * n[None, :]
    dS, Y, a, dg, total = adjoint(T, n, g, D, da, dg_root, ROWS, PADS, 0, N, LEAF)
    if not LEAF:
        dS = dS * (n[:, None] * n[None, :])
        Y = Y * n[None, :]
    elif SELF:
        dS = with_diagonal(dS, dg, ROWS)
        Y = with_diagonal(Y, a, ROWS)
    Y = (Y * factor[:, None]).to(COMPUTE)
    dS = dS.to(COMPUTE)
    dq = tl.dot(dS, k, input_precision=PRECISION)
    dk = tl.trans(tl.dot(tl.trans(q), dS, input_precision=PRECISION))
    dv = tl.trans(tl.dot(tl.trans(upstream), Y, input_precision=PRECISION))
    here = tl.where(n > 0, 1.0, 0.0)[:, None]  # what does not count has no gradient
    dq, dk, dv = dq * (here * scale), dk * (here * scale), dv * here
    if not TOP:
        share = n * fast_reciprocal(tl.maximum(spread(total, ROWS, ROWS // SUBS), 1.0))
        dq += share_down(up_q, up, share, n_head, width, ROWS, SUBS, WIDTH, n_live)
        dk += share_down(up_k, up, share, n_head, width, ROWS, SUBS, WIDTH, n_live)
        dv += share_down(up_v, up, share, n_head, channels, ROWS, SUBS, CHANNELS, n_live)
    put(grad_q + line * width, dq, slot, inside, n_head * width, width, WIDTH)
    put(grad_k + line * width, dk, slot, inside, n_head * width, width, WIDTH)
    put(grad_v + line * channels, dv, slot, inside, n_head * channels, channels, CHANNELS)
    if not LEAF:
        tl.store(grad_g + line + slot * n_head, dg, inside)
