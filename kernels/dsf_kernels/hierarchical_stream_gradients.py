"""Device code of streaming hierarchical attention: gradients; see its forward kernel.

`delta_kernel` first, then the gradients of the groups' means, each by the rows that see it, and
last the tokens, a tile at a time, with their shares of those.
"""

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_exp2, fast_reciprocal
from dsf_kernels.hierarchical_levels import slots
from dsf_kernels.hierarchical_root import DEAD
from dsf_kernels.hierarchical_stream_kernels import groups, inner_scores, outer_scores, untied
from dsf_kernels.hierarchical_tiles import counted, locate, put, take


@triton.jit(do_not_specialize=["length", "n_block"])
def delta_kernel(out, grad, delta, length, n_block, n_head, channels, g_b, g_t, g_h, g_w,
                 ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """delta_t = grad_t.out_t."""
    batch, head, block = locate(n_block, n_head)
    row = tl.arange(0, ROWS)
    first = block * ROWS
    inside = row < length - first
    line = (batch * length + first) * n_head + head
    grad += batch * g_b + head * g_h + first * g_t
    upstream = take(grad, row, inside, g_t, g_w, channels, CHANNELS).to(tl.float32)
    given = take(out + line * channels, row, inside, n_head * channels, 1, channels, CHANNELS)
    total = tl.sum(upstream * given.to(tl.float32), 1)
    tl.store(delta + line + row * n_head, total, inside)


@triton.jit(do_not_specialize=["length", "n_block", "n_node", "first_node", "n_live"])
def group_gradient_kernel(query, mean_k, mean_v, count, grad, norm, delta, grad_k, grad_v,
                          length, n_block, n_node, first_node, n_live, family, n_part, part_rows,
                          n_batch, n_head, width, channels, scale, log_scale, q_b, q_t, q_h, q_w,
                          g_b, g_t, g_h, g_w, SPAN: tl.constexpr, TILE: tl.constexpr,
                          ROWS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                          BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                          CHANNELS: tl.constexpr):  # fmt: skip
    """Gradients of the means of a block of siblings, from one part of the rows after them.

    family: nodes in a family of this level; n_block: blocks of siblings at this level; n_part:
    parts, of part_rows rows each, of the rows of a family.
    """
    batch, head, place = locate(n_block * n_part, n_head)
    part, block = place % n_part, place // n_part
    in_family = tl.cdiv(family, BLOCK)
    begin = block // in_family * family
    node = begin + block % in_family * BLOCK
    end = tl.minimum(begin + family, n_live)
    line = batch * n_node * n_head + head
    k, v, n = groups(mean_k + line * width, mean_v + line * channels, count + line,
                     first_node + node, first_node + end, n_head, width, channels, COMPUTE, BLOCK,
                     WIDTH, CHANNELS)  # fmt: skip
    low = begin * SPAN + part * part_rows
    high = tl.minimum(tl.minimum(low + part_rows, (begin + family) * SPAN), length)
    skip = tl.maximum((node + 1) * SPAN - low, 0) // ROWS * ROWS
    query += batch * q_b + head * q_h
    grad += batch * g_b + head * g_h
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for first in tl.range(low + skip, high, ROWS):
        at = low * 0 + first
        inside = row < high - at
        q = take(query + at * q_t, row, inside, q_t, q_w, width, WIDTH).to(COMPUTE)
        upstream = take(grad + at * g_t, row, inside, g_t, g_w, channels, CHANNELS).to(COMPUTE)
        line = (batch * length + at) * n_head + head
        lse = tl.load(norm + line + row * n_head, inside, other=DEAD)
        total = tl.load(delta + line + row * n_head, inside, other=0.0)
        z = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log_scale
        before = (at + row) // TILE * TILE // SPAN - node  # the nodes that a row's tile reads
        seen = (column[:, None] < before[None, :]) & (n[:, None] > 0)
        p = fast_exp2(tl.where(seen, z - lse[None, :], -DEAD))
        p = p * n[:, None]
        dv += tl.dot(p.to(COMPUTE), upstream, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        dz = (p * (dp - total[None, :])).to(COMPUTE)
        dk += tl.dot(dz, q, input_precision=PRECISION)
    line = ((part * n_batch + batch) * n_node + first_node + node) * n_head + head
    live = column < end - node
    put(grad_k + line * width, dk * scale, column, live, n_head * width, width, WIDTH)
    put(grad_v + line * channels, dv, column, live, n_head * channels, channels, CHANNELS)


@triton.jit
def outer_gradients(q, upstream, lse, total, mean_k, mean_v, count, first, length, n_head, width,
                    channels, log_scale, SPANS: tl.constexpr, FAMILIES: tl.constexpr,
                    UPPER: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                    CHANNELS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Sums over the groups before the tile: of dz k; EXACT: of p k, of p and of dz."""
    dq = tl.zeros([q.shape[0], WIDTH], tl.float32)
    seen_k, mass, over = dq, total * 0.0, total * 0.0
    base = first * 0
    for level in tl.static_range(UPPER):
        start = base
        if FAMILIES[level] > 0:
            start += first // FAMILIES[level] * (FAMILIES[level] // SPANS[level])
        end = base + first // SPANS[level]
        for node in tl.range(start, end, BLOCK):
            k, v, n = groups(mean_k, mean_v, count, base * 0 + node, end, n_head, width,
                             channels, COMPUTE, BLOCK, WIDTH, CHANNELS)  # fmt: skip
            p = fast_exp2(outer_scores(q, k, n, log_scale, PRECISION) - lse[:, None])
            dz = tl.dot(upstream, tl.trans(v), input_precision=PRECISION) - total[:, None]
            dz = p * dz
            dq += tl.dot(dz.to(COMPUTE), k, input_precision=PRECISION)
            if EXACT:
                seen_k += tl.dot(p, k, input_precision=PRECISION)
                mass += tl.sum(p, 1)
                over += tl.sum(dz, 1)
        base += tl.cdiv(length, SPANS[level])
    return dq, seen_k, mass, over


@triton.jit(do_not_specialize=["length", "n_tile", "n_node"])
def stream_gradient_kernel(query, key, value, mask, mean_k, mean_v, count, grad, norm, delta,
                           up_k, up_v, grad_q, grad_k, grad_v, length, n_tile, n_node, n_head,
                           width, channels, scale, log_scale, q_b, q_t, q_h, q_w,
                           k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, m_b, m_t, g_b, g_t, g_h, g_w,
                           LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr,
                           N: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr,
                           FAMILIES: tl.constexpr, UPPER: tl.constexpr, MASKED: tl.constexpr,
                           COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
                           WIDTH: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Gradients of a tile's tokens; up_k, up_v are those of all groups' means."""
    batch, head, tile = locate(n_tile, n_head)
    slot, inside = slots(LEVELS, PADS, PLACES, N, ROWS)
    first = tile * PLACES[N]
    inside = inside & (slot < PLACES[N]) & (slot < length - first)
    query += batch * q_b + head * q_h + first * q_t
    key += batch * k_b + head * k_h + first * k_t
    value += batch * v_b + head * v_h + first * v_t
    grad += batch * g_b + head * g_h + first * g_t
    mask += batch * m_b + first * m_t
    n, _ = counted(mask, mask, slot, inside, m_t, True, MASKED)
    q = take(query, slot, inside, q_t, q_w, width, WIDTH).to(COMPUTE)
    k = take(key, slot, n > 0, k_t, k_w, width, WIDTH).to(COMPUTE)
    v = take(value, slot, n > 0, v_t, v_w, channels, CHANNELS).to(COMPUTE)
    upstream = take(grad, slot, inside, g_t, g_w, channels, CHANNELS).to(COMPUTE)
    line = (batch * length + first) * n_head + head
    lse = tl.load(norm + line + slot * n_head, inside, other=DEAD)
    total = tl.load(delta + line + slot * n_head, inside, other=0.0)
    root = batch * n_node * n_head + head
    mean_k += root * width
    mean_v += root * channels
    count += root
    EXACT: tl.constexpr = q.dtype == tl.float32
    z = inner_scores(q, k, n, log_scale, PADS, N, ROWS, PRECISION)
    p = fast_exp2(z - lse[:, None])
    dp = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
    dz = p * (dp - total[:, None])
    if EXACT:  # a row's dz sum to 0: what is over is the rounding of delta
        dq, seen_k, mass, over = outer_gradients(
            q, upstream, lse, total, mean_k, mean_v, count, first, length, n_head, width,
            channels, log_scale, SPANS, FAMILIES, UPPER, COMPUTE, PRECISION, BLOCK, WIDTH,
            CHANNELS, EXACT,
        )  # fmt: skip
        mass += tl.sum(p, 1)
        over = (over + tl.sum(dz, 1)) / tl.where(mass > 0, mass, 1.0)
        dz -= p * over[:, None]
        dq -= seen_k * over[:, None]
    i = tl.arange(0, ROWS)
    own = i[:, None] == i[None, :]
    dT = tl.where(own, dz, untied(dz, n, ROWS, ROWS, PADS, 0, N)).to(COMPUTE)
    inner_dq = tl.dot(dT, k, input_precision=PRECISION)
    dk = tl.trans(tl.dot(tl.trans(q), dT, input_precision=PRECISION)) * scale
    dv = tl.trans(tl.dot(tl.trans(upstream), p.to(COMPUTE), input_precision=PRECISION))
    base = first * 0
    for level in tl.static_range(UPPER):
        at = base + (first + slot) // SPANS[level]
        held = tl.load(count + at * n_head, inside, other=1.0)
        share = fast_reciprocal(tl.maximum(held, 1.0))[:, None]
        dk += share * take(up_k + root * width, at, inside, n_head * width, 1, width, WIDTH)
        dv += share * take(up_v + root * channels, at, inside, n_head * channels, 1, channels,
                           CHANNELS)  # fmt: skip
        base += tl.cdiv(length, SPANS[level])
    here = tl.where(n > 0, 1.0, 0.0)[:, None]
    put(grad_k + line * width, dk * here, slot, inside, n_head * width, width, WIDTH)
    put(grad_v + line * channels, dv * here, slot, inside, n_head * channels, channels, CHANNELS)
    if not EXACT:
        dq, _, _, _ = outer_gradients(
            q, upstream, lse, total, mean_k, mean_v, count, first, length, n_head, width,
            channels, log_scale, SPANS, FAMILIES, UPPER, COMPUTE, PRECISION, BLOCK, WIDTH,
            CHANNELS, EXACT,
        )  # fmt: skip
    dq = (dq + inner_dq) * scale
    put(grad_q + line * width, dq, slot, inside, n_head * width, width, WIDTH)
