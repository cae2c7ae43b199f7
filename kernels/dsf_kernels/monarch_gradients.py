"""The half-steps of monarch_attention backward, each tile computed again in both orders.

Every tile stands once as (query, key) and once as (key, query): a product with a transposed
product of 16 bits is what some assemblers get wrong, and a second small product costs less than
the exchange.
"""

import triton
import triton.language as tl

from dsf_kernels.exponentials import LOG2_E
from dsf_kernels.monarch_kernels import SIZES, gather, kept, lane, scatter, softmax, tokens


@triton.jit(do_not_specialize=SIZES)
def left_gradient(
    query, mask, means, entropy, mixed, abar, sums, grad, grad_abar,
    grad_query, grad_means, grad_entropy, grad_mixed,
    length, b, m, front, head, width, channels,
    q_b, q_t, q_h, q_d, g_b, g_t, g_h, g_d, m_b, m_t,
    LAST: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of query (LAST: written, else added to), means, entropy and, LAST, mixed.

    grad (batch, time, head, channel) of the outputs; grad_abar of the means of queries. By ROWS
    row blocks at once.
    """
    batch, h, both, j = lane(b, head)
    k = tl.arange(0, M)
    inside = k < m
    row = (both * b + j) * m + k
    a = gather(means, row, inside, width, 1, width, WIDTH, COMPUTE)
    c = tl.load(entropy + row, mask=inside, other=float("inf"))
    if LAST:
        y = gather(mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
    else:
        place = (both * m + k) * b + j
        da = gather(grad_abar, place, inside, width, 1, width, WIDTH, tl.float32)
        mean = gather(abar, place, inside, width, 1, width, WIDTH, tl.float32)
        own = tl.sum(da * mean, 1)
        da = da.to(COMPUTE)
        total = tl.load(sums + place, mask=inside, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
    lane_q = grad_query + (batch * length * head + h) * width
    for first in range(0, m, ROWS):  # (l, k)
        time, there = tokens(m - first, b, j - front + first * b, length, ROWS)
        q = gather(query + batch * q_b + h * q_h, time, there, q_t, q_d, width, WIDTH, COMPUTE)
        x = tl.dot(q, tl.trans(a), input_precision=PRECISION) - c[None, :]
        left, _ = softmax(x * LOG2_E, 1)
        if LAST:
            g = gather(grad + batch * g_b + h * g_h, time, there, g_t, g_d, channels, CHANNELS,
                       COMPUTE)  # fmt: skip
            d = left * tl.dot(g, tl.trans(y), input_precision=PRECISION)
        else:
            real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
            weights = tl.where(real[:, None], left / total[None, :], 0.0)
            d = tl.dot(q, tl.trans(da), input_precision=PRECISION) - own[None, :]
            d = tl.where(real[:, None], weights * d, 0.0)
        z = d - left * tl.sum(d, 1, keep_dims=True)
        dq = tl.dot(z.to(COMPUTE), a, input_precision=PRECISION)
        if not LAST:
            dq += tl.dot(weights.to(COMPUTE), da, input_precision=PRECISION)
            dq += gather(lane_q, time, there, head * width, 1, width, WIDTH, tl.float32)
        scatter(lane_q, dq, time, there, head * width, 1, width)
    dm = tl.zeros([M, WIDTH], tl.float32)
    dc = tl.zeros([M], tl.float32)
    if LAST:
        dy = tl.zeros([M, CHANNELS], tl.float32)
    for first in range(0, m, ROWS):  # (k, l)
        time, there = tokens(m - first, b, j - front + first * b, length, ROWS)
        q = gather(query + batch * q_b + h * q_h, time, there, q_t, q_d, width, WIDTH, COMPUTE)
        x = tl.dot(a, tl.trans(q), input_precision=PRECISION) - c[:, None]
        left, _ = softmax(x * LOG2_E, 0)
        if LAST:
            g = gather(grad + batch * g_b + h * g_h, time, there, g_t, g_d, channels, CHANNELS,
                       COMPUTE)  # fmt: skip
            d = left * tl.dot(y, tl.trans(g), input_precision=PRECISION)
            dy += tl.dot(left.to(COMPUTE), g, input_precision=PRECISION)
        else:
            real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
            weights = tl.where(real[None, :], left / total[:, None], 0.0)
            d = tl.dot(da, tl.trans(q), input_precision=PRECISION) - own[:, None]
            d = tl.where(real[None, :], weights * d, 0.0)
        z = d - left * tl.sum(d, 0, keep_dims=True)
        dc -= tl.sum(z, 1)
        dm += tl.dot(z.to(COMPUTE), q, input_precision=PRECISION)
    tl.store(grad_entropy + row, dc, mask=inside)
    scatter(grad_means, dm, row, inside, width, 1, width)
    if LAST:
        scatter(grad_mixed, dy, row, inside, channels, 1, channels)


@triton.jit
def upstream(grad_means, grad_entropy, a, row, inside, width, scale, WIDTH: tl.constexpr):
    """Gradients of the sums right k, and of those and the entropies as one product with the keys.

    As log right = scale a.k - a number a row, which the softmax takes away again: what one block
    gains in entropy and in its mean cancels here, before it is rounded.
    """
    da = gather(grad_means, row, inside, width, 1, width, WIDTH, tl.float32)
    dc = tl.load(grad_entropy + row, mask=inside, other=0.0)
    return da * scale, (da + dc[:, None] * a.to(tl.float32)) * scale


@triton.jit
def centred(d, right, AXIS: tl.constexpr, EXACT: tl.constexpr):
    """right (d - its mean under right): d moved to logits through the softmax.

    EXACT: twice, as the sum of right is 1 to rounding alone, and d may be large.
    """
    d -= tl.sum(right * d, AXIS, keep_dims=True)
    if EXACT:
        d -= tl.sum(right * d, AXIS, keep_dims=True)
    return right * d


@triton.jit(do_not_specialize=SIZES)
def right_gradient(
    query, key, value, mask, abar, grad_means, grad_entropy, grad_mixed, sum_query, sum_key,
    grad_query, grad_key, grad_value, grad_abar,
    length, b, m, front, head, share, width, channels, scale,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, m_b, m_t,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of key (sum_key of later steps added, unless LAST), LAST: value, and of abar:
    FIRST: of query, sum_query added.

    sum_*, grad_query, grad_key, grad_value (batch, time, head, ...) contiguous. By ROWS places at
    once.
    """
    batch, h, both, k = lane(m, head)
    time, there = tokens(b, 1, k * b - front, length, B)
    real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
    keys = gather(key + batch * k_b + h // share * k_h, time, real, k_t, k_d, width, WIDTH,
                  COMPUTE)  # fmt: skip
    if LAST:
        values = gather(value + batch * v_b + h * v_h, time, real, v_t, v_d, channels, CHANNELS,
                        COMPUTE)  # fmt: skip
    lane_k = (batch * length * head + h) * width
    step = head * width
    for first in range(0, b, ROWS):  # (j, i)
        j = first + tl.arange(0, ROWS)
        inside = j < b
        row = (both * b + j) * m + k
        if FIRST:
            at, near = tokens(b - first, 1, k * b + first - front, length, ROWS)
            asks = kept(mask, batch, at, near, m_b, m_t, HAS_MASK)
            a = gather(query + batch * q_b + h * q_h, at, asks, q_t, q_d, width, WIDTH, COMPUTE)
        else:
            a = gather(abar, (both * m + k) * b + j, inside, width, 1, width, WIDTH, COMPUTE)
        _, turn = upstream(grad_means, grad_entropy, a, row, inside, width, scale, WIDTH)
        x = tl.dot(a, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        right, _ = softmax(tl.where(real[None, :], x, float("-inf")), 1)
        d = tl.dot(turn.to(COMPUTE), tl.trans(keys), input_precision=PRECISION)
        if LAST:
            dy = gather(grad_mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
            d += tl.dot(dy, tl.trans(values), input_precision=PRECISION)
        d = centred(d, right, 1, keys.dtype == tl.float32)
        dx = tl.dot(d.to(COMPUTE), keys, input_precision=PRECISION) * scale
        if FIRST:
            dx = tl.where(asks[:, None], dx, 0.0)
            dx += gather(sum_query + lane_k, at, near, step, 1, width, WIDTH, tl.float32)
            scatter(grad_query + lane_k, dx, at, near, step, 1, width)
        else:
            scatter(grad_abar, dx, (both * m + k) * b + j, inside, width, 1, width)
    dk = tl.zeros([B, WIDTH], tl.float32)
    if LAST:
        dv = tl.zeros([B, CHANNELS], tl.float32)
    for first in range(0, b, ROWS):  # (i, j)
        j = first + tl.arange(0, ROWS)
        inside = j < b
        row = (both * b + j) * m + k
        if FIRST:
            at, near = tokens(b - first, 1, k * b + first - front, length, ROWS)
            asks = kept(mask, batch, at, near, m_b, m_t, HAS_MASK)
            a = gather(query + batch * q_b + h * q_h, at, asks, q_t, q_d, width, WIDTH, COMPUTE)
        else:
            a = gather(abar, (both * m + k) * b + j, inside, width, 1, width, WIDTH, COMPUTE)
        da, turn = upstream(grad_means, grad_entropy, a, row, inside, width, scale, WIDTH)
        x = tl.dot(keys, tl.trans(a), input_precision=PRECISION) * (scale * LOG2_E)
        right, _ = softmax(tl.where(real[:, None], x, float("-inf")), 0)
        d = tl.dot(keys, tl.trans(turn.to(COMPUTE)), input_precision=PRECISION)
        if LAST:
            dy = gather(grad_mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
            d += tl.dot(values, tl.trans(dy), input_precision=PRECISION)
            dv += tl.dot(right.to(COMPUTE), dy, input_precision=PRECISION)
        d = scale * centred(d, right, 0, keys.dtype == tl.float32)
        dk += tl.dot(right.to(COMPUTE), da.to(COMPUTE), input_precision=PRECISION)
        dk += tl.dot(d.to(COMPUTE), a, input_precision=PRECISION)
    if not LAST:
        dk += gather(sum_key + lane_k, time, there, step, 1, width, WIDTH, tl.float32)
    scatter(grad_key + lane_k, dk, time, there, step, 1, width)
    if LAST:
        scatter(grad_value + (batch * length * head + h) * channels, dv, time, there,
                head * channels, 1, channels)  # fmt: skip
