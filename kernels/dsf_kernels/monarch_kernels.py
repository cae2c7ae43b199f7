"""The half-steps of monarch_attention: one program a tile of the right or of the left factor.

Token (block l, place j) stands at time l b + j - front. The right factor's tile of block k is
(place j, key i); the left factor's tile of place j is (row block l, block k). What one half-step
hands to the next is stored in the order in which the next reads it.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import LN_2, LOG2_E, fast_exp2, fast_log2

NONE = tl.constexpr(-1e30)
"""A logit of nothing: finite, so that 0 times it is 0."""
SIZES = ("length", "b", "m", "front", "head", "share", "parts")
"""Arguments that no compilation depends on."""


@triton.jit
def lane(programs, head, LAST_FIRST: tl.constexpr = False):
    """This program's batch, head, lane (both in one) and tile, all int64.

    LAST_FIRST: in falling order, so that what the launch before wrote last is still in the cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    if LAST_FIRST:
        pid = tl.num_programs(0) - 1 - pid
    both = pid // programs
    return both // head, both % head, both, pid % programs


@triton.jit
def tokens(count, step, offset, length, SIZE: tl.constexpr):
    """Times of `count` tokens from `offset`, `step` apart (int64), and which of them exist."""
    n = tl.arange(0, SIZE)
    time = offset + n.to(tl.int64) * step
    return time, (n < count) & (time >= 0) & (time < length)


@triton.jit
def kept(mask, batch, time, there, m_b, m_t, HAS_MASK: tl.constexpr):
    """Which of the tokens that are there the key mask keeps."""
    real = there
    if HAS_MASK:
        real = there & (tl.load(mask + batch * m_b + time * m_t, mask=there, other=0) != 0)
    return real


@triton.jit
def gather(tensor, time, there, step, step_d, width, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Rows (token, width) at any times; 0 where there are none."""
    column = tl.arange(0, WIDTH)
    place = tensor + time[:, None] * step + column[None, :] * step_d
    return tl.load(place, mask=there[:, None] & (column < width)[None, :], other=0.0).to(TYPE)


@triton.jit
def scatter(tensor, x, time, there, step, step_d, width):
    """Store rows (token, width) at any times."""
    column = tl.arange(0, x.shape[1])
    place = tensor + time[:, None] * step + column[None, :] * step_d
    there = there[:, None] & (column < width)[None, :]
    tl.store(place, x.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def softmax(x, AXIS: tl.constexpr):
    """Softmax along an axis of logits to the base 2, and its log2; all -inf gives 0 and -inf."""
    top = tl.max(x, AXIS, keep_dims=True)
    x = x - tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp2(x)
    total = tl.sum(e, AXIS, keep_dims=True)
    total = tl.where(total == 0.0, 1.0, total)
    return e / total, x - tl.log2(total)


@triton.jit
def weigh(x, EXACT: tl.constexpr):
    """2^(x - top) of each row, 1 over its sum, x - top, and top.

    The weights are not divided by their sum: the rows of what they multiply are, which are fewer.
    """
    top = tl.max(x, 1)
    x = x - tl.where(top == float("-inf"), 0.0, top)[:, None]
    e = tl.exp2(x) if EXACT else fast_exp2(x)
    total = tl.sum(e, 1)
    return e, 1.0 / tl.where(total == 0.0, 1.0, total), x, top


@triton.jit
def negative_entropy(e, part, x, top, EXACT: tl.constexpr):
    """sum w log w of the weights w = part e, given what `weigh` gives; +inf without any."""
    log = tl.log2(part) if EXACT else fast_log2(part)
    return tl.where(top > NONE, (tl.sum(e * x, 1) * part + log) * LN_2, float("inf"))


@triton.jit(do_not_specialize=SIZES)
def right_kernel(
    query, key, value, mask, abar, means, entropy, mixed,
    length, b, m, front, head, share, width, channels, scale,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, m_b, m_t,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """right = softmax_i(scale abar.k) of block k; means, entropy and, last, mixed = right v.

    FIRST: abar is the query. means (lane, place, block, width) = scale right key, entropy (lane,
    place, block) = sum right log right, +inf without a real key, mixed (lane, place, block,
    channel).
    """
    batch, h, both, k = lane(m, head)
    time, there = tokens(b, 1, k * b - front, length, B)
    real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
    keys = gather(key + batch * k_b + h // share * k_h, time, real, k_t, k_d, width, WIDTH,
                  COMPUTE)  # fmt: skip
    EXACT: tl.constexpr = keys.dtype == tl.float32
    if LAST:
        values = gather(value + batch * v_b + h * v_h, time, real, v_t, v_d, channels, CHANNELS,
                        COMPUTE)  # fmt: skip
    for first in range(0, b, ROWS):
        j = first + tl.arange(0, ROWS)
        inside = j < b
        if FIRST:
            at, near = tokens(b - first, 1, k * b + first - front, length, ROWS)
            asks = kept(mask, batch, at, near, m_b, m_t, HAS_MASK)
            a = gather(query + batch * q_b + h * q_h, at, asks, q_t, q_d, width, WIDTH, COMPUTE)
        else:
            a = gather(abar, (both * m + k) * b + j, inside, width, 1, width, WIDTH, COMPUTE)
        x = tl.dot(a, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        right, part, x, top = weigh(tl.where(real[None, :], x, NONE), EXACT)
        row = (both * b + j) * m + k
        tl.store(entropy + row, negative_entropy(right, part, x, top, EXACT), mask=inside)
        right = right.to(COMPUTE)
        mean = tl.dot(right, keys, input_precision=PRECISION) * (scale * part)[:, None]
        scatter(means, mean, row, inside, width, 1, width)
        if LAST:
            y = tl.dot(right, values, input_precision=PRECISION) * part[:, None]
            scatter(mixed, y, row, inside, channels, 1, channels)


@triton.jit(do_not_specialize=SIZES)
def left_kernel(
    query, mask, means, entropy, mixed, abar, sums, out,
    length, b, m, front, head, width, channels,
    q_b, q_t, q_h, q_d, o_b, o_t, o_h, o_d, m_b, m_t,
    LAST: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """left = softmax_k(q.means - entropy) of place j; out = left mixed, or the next abar.

    abar (lane, block k, place j, width): the mean of the real queries under left, 0 without any;
    sums (lane, block k, place j) the sum of left over them.
    """
    batch, h, both, j = lane(b, head, True)
    k = tl.arange(0, M)
    inside = k < m
    row = (both * b + j) * m + k
    a = gather(means, row, inside, width, 1, width, WIDTH, COMPUTE)
    c = tl.load(entropy + row, mask=inside, other=float("inf"))
    if LAST:
        y = gather(mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
    else:
        found = tl.zeros([M, WIDTH], tl.float32)
        total = tl.zeros([M], tl.float32)
        weight, best = total, total
    for first in range(0, m, ROWS):
        time, there = tokens(m - first, b, j - front + first * b, length, ROWS)
        q = gather(query + batch * q_b + h * q_h, time, there, q_t, q_d, width, WIDTH, COMPUTE)
        if LAST:
            x = tl.dot(q, tl.trans(a), input_precision=PRECISION) * LOG2_E
            left, part, x, top = weigh(x - (c * LOG2_E)[None, :], q.dtype == tl.float32)
            o = tl.dot(left.to(COMPUTE), y, input_precision=PRECISION) * part[:, None]
            scatter(out + batch * o_b + h * o_h, o, time, there, o_t, o_d, channels)
        else:
            real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
            q = tl.where(real[:, None], q, 0.0).to(COMPUTE)
            x = tl.dot(a, tl.trans(q), input_precision=PRECISION) - c[:, None]  # (k, l)
            left, _ = softmax(x * LOG2_E, 0)
            left = tl.where(real[None, :], left, 0.0)
            total += tl.sum(left, 1)
            # weights over their largest so far: small ones keep their digits in 16 bits
            top = tl.maximum(best, tl.max(left, 1))
            over = tl.where(top == 0.0, 1.0, top)
            shrink, best = best / over, top
            left = (left / over[:, None]).to(COMPUTE)
            weight = weight * shrink + tl.sum(left.to(tl.float32), 1)
            found = found * shrink[:, None] + tl.dot(left, q, input_precision=PRECISION)
    if not LAST:
        place = (both * m + k) * b + j
        tl.store(sums + place, total, mask=inside)
        found /= tl.where(weight == 0.0, 1.0, weight)[:, None]
        scatter(abar, found, place, inside, width, 1, width)


@triton.jit(do_not_specialize=SIZES)
def short_kernel(
    query, key, value, mask, means, entropy, mixed, out,
    length, b, m, front, head, share, width, channels, scale, parts,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d, o_b, o_t, o_h, o_d, m_b, m_t,
    RIGHT: tl.constexpr, LEFT: tl.constexpr, HAS_MASK: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The factors of the only step where blocks and places are at most SIDE.

    ROWS / SIDE tiles at once are blocks in the diagonal of one. RIGHT and LEFT: a program has the
    whole lane (parts 1), and reads again, in the other order, what its right factor left.
    """
    batch, h, both, part_of_lane = lane(parts, head)
    start = part_of_lane.to(tl.int32) * (ROWS // SIDE)
    step = parts * (ROWS // SIDE)
    n = tl.arange(0, ROWS)
    outer, inner = n // SIDE, n % SIDE
    alike = outer[:, None] == outer[None, :]
    query += batch * q_b + h * q_h
    key += batch * k_b + h // share * k_h
    value += batch * v_b + h * v_h
    if RIGHT:
        for first in range(start, m, step):
            k = first + outer
            inside = (k < m) & (inner < b)
            time = (k * b + inner - front).to(tl.int64)
            there = inside & (time >= 0) & (time < length)
            real = kept(mask, batch, time, there, m_b, m_t, HAS_MASK)
            q = gather(query, time, real, q_t, q_d, width, WIDTH, COMPUTE)
            keys = gather(key, time, real, k_t, k_d, width, WIDTH, COMPUTE)
            values = gather(value, time, real, v_t, v_d, channels, CHANNELS, COMPUTE)
            x = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
            EXACT: tl.constexpr = q.dtype == tl.float32
            right, part, x, top = weigh(tl.where(alike & real[None, :], x, NONE), EXACT)
            row = (both * b + inner) * m + k
            tl.store(entropy + row, negative_entropy(right, part, x, top, EXACT), mask=inside)
            right = right.to(COMPUTE)
            mean = tl.dot(right, keys, input_precision=PRECISION) * (scale * part)[:, None]
            scatter(means, mean, row, inside, width, 1, width)
            y = tl.dot(right, values, input_precision=PRECISION) * part[:, None]
            scatter(mixed, y, row, inside, channels, 1, channels)
    if RIGHT and LEFT:
        tl.debug_barrier()
    if LEFT:
        for first in range(start, b, step):
            j = first + outer
            inside = (j < b) & (inner < m)
            row = (both * b + j) * m + inner
            a = gather(means, row, inside, width, 1, width, WIDTH, COMPUTE)
            y = gather(mixed, row, inside, channels, 1, channels, CHANNELS, COMPUTE)
            c = tl.load(entropy + row, mask=inside, other=float("inf"))
            time = (inner * b + j - front).to(tl.int64)
            there = inside & (time >= 0) & (time < length)
            q = gather(query, time, there, q_t, q_d, width, WIDTH, COMPUTE)
            x = tl.dot(q, tl.trans(a), input_precision=PRECISION) * LOG2_E - (c * LOG2_E)[None, :]
            left, part, x, top = weigh(tl.where(alike, x, float("-inf")), q.dtype == tl.float32)
            o = tl.dot(left.to(COMPUTE), y, input_precision=PRECISION) * part[:, None]
            scatter(out + batch * o_b + h * o_h, o, time, there, o_t, o_d, channels)
