"""ZeroS before its walks: sums of the logits in float64, and a chunk's factors from them.

The walks read factors that were rounded once, from float64: differences such as fade/t_s - 1/t_i,
taken in float32 at every chunk, would put an error into the states that grows with the length.
"""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.chunks import two_floats
from dsf_kernels.combine import combine
from dsf_kernels.exponentials import LN_2, LOG2_E, exact_exp2, fast_exp2

GAIN = tl.constexpr(32.0)  # keeps weights near 1/t among the normal numbers of fp16
NEVER = tl.constexpr(-1e30)  # a logit that has no share

# Rows of a chunk's factors; the last four serve the gradients of the gates alone.
TOP, OF_D, SLOPE, OF_H, HIGH, FLAT = (tl.constexpr(n) for n in range(6))
LOGIT, OVER, INTO_D, INTO_G, ENDS = (tl.constexpr(n) for n in range(6, 11))
TOP_LOW, LOGIT_LOW, FADE, REST, PART, MEAN = (tl.constexpr(n) for n in range(11, 17))
WALK_ROWS, ALL_ROWS = 13, 17


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def place(lane, n_head, stride_batch, stride_head):
    """Offset of the row and head of a lane, in 64 bits."""
    return (lane // n_head) * stride_batch + (lane % n_head) * stride_head


@triton.jit(do_not_specialize=["length"])
def totals_kernel(logit, initial, log_total, mean, final, length, n_head, s_batch, s_time, s_head,
                  HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """log sum_{j<=t} e^{s_j} and the mean of s_1..t, (batch, head, time) in float64; the last."""
    lane = tl.program_id(0).to(tl.int64)
    logit += place(lane, n_head, s_batch, s_head)
    log_total += lane * length
    mean += lane * length
    top = tl.full([], -float("inf"), tl.float64)
    weight = tl.zeros([], tl.float64)
    total = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.float64)
    if HAS_INITIAL:
        top = tl.load(initial + lane * 3)
        count = tl.load(initial + lane * 3 + 2)
        total = tl.load(initial + lane * 3 + 1) * count
        weight = tl.where(count > 0, 1.0, 0.0).to(tl.float64)
    row = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(length, BLOCK)):
        step = tl.cast(block, tl.int64) * BLOCK + row
        inside = step < length
        s = tl.load(logit + step * s_time, inside, other=-float("inf")).to(tl.float64)
        earlier = (row > 0) & (step <= length)
        past = tl.load(logit + (step - 1) * s_time, earlier, other=-float("inf")).to(tl.float64)
        past = tl.associative_scan(tl.where(row == 0, top, past), 0, maximum)
        most = tl.maximum(past, s)
        fade, grown = tl.associative_scan((tl.exp(past - most), tl.exp(s - most)), 0, combine)
        grown += fade * weight
        summed = total + tl.cumsum(tl.where(inside, s, 0.0), 0)
        tl.store(log_total + step, most + tl.log(grown), inside)
        tl.store(mean + step, summed / (count + (row + 1).to(tl.float64)), inside)
        end = row == BLOCK - 1
        top = tl.max(most, 0)
        weight = tl.sum(tl.where(end, grown, 0.0), 0)
        total = tl.sum(tl.where(end, summed, 0.0), 0)
        count += tl.minimum(length - block * BLOCK, BLOCK).to(tl.float64)
    tl.store(final + lane * 3, top + tl.log(weight))
    tl.store(final + lane * 3 + 1, total / count)
    tl.store(final + lane * 3 + 2, count)


@triton.jit
def before(log_total, mean, initial, start, HAS_INITIAL: tl.constexpr):
    """Before token `start`: tokens, log sum and mean, or the first logit twice where none is."""
    count = start.to(tl.float64)
    level = tl.load(log_total + tl.maximum(start - 1, 0))
    centre = tl.load(mean + tl.maximum(start - 1, 0))
    if HAS_INITIAL:
        past = tl.load(initial + 2)
        level = tl.where(start == 0, tl.where(past > 0, tl.load(initial), level), level)
        centre = tl.where(start == 0, tl.where(past > 0, tl.load(initial + 1), centre), centre)
        count += past
    return count, level, centre


@triton.jit
def gap(level, later, count, tokens):
    """How D and H before enter D after: fade = exp(level - later), fade/count - 1/tokens."""
    known = count > 0
    fade = tl.where(known, tl.exp(tl.where(known, tl.minimum(level - later, 0.0), 0.0)), 0.0)
    return fade, fade / tl.maximum(count, 1.0) - 1.0 / tokens


@triton.jit(do_not_specialize=["length", "n_chunk"])
def factors_kernel(logit, first, higher, zero, log_total, mean, initial, factors, length, n_chunk,
                   n_head, s_b, s_t, s_h, g1_b, g1_t, g1_h, gh_b, gh_t, gh_h, g0_b, g0_t, g0_h,
                   HAS_INITIAL: tl.constexpr, HAS_ZERO: tl.constexpr, EXACT: tl.constexpr,
                   ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """factors (lane, chunk, ROWS, CHUNK): what walks multiply with, of token i of each chunk.

    With s and e the chunk's start and end, l and c the log sum and mean of the logits so far,
    t tokens so far, fade_i = exp(l_s - l_i), rest_i = fade_i/t_s - 1/t_i, slope = first - higher:

        TOP, LOGIT    (l_i - l_s), (s_i - l_s) in base 2     OVER    s_i - c_s
        OF_D          higher fade          SLOPE    slope/t      HIGH    higher
        OF_H          higher rest - slope (c_i - c_s)/t + zero/t
        FLAT          (zero - higher - slope (c_i - c_s - b))/t
        INTO_D        exp(s_i - l_e) - 1/t_e                 INTO_G  s_i - c_e
        ENDS          fade_e - 1, rest_e, c_e - c_s, t_s, 1/t_e, b

    b: what is to be added to what `pair` takes for s_j - c_s: 0 where EXACT, else l_s - c_s.

    SLOPE, OF_H, HIGH, FLAT, INTO_D and rest_e times GAIN, FADE divided by it.
    """
    n_block = tl.cdiv(n_chunk * CHUNK, BLOCK)
    lane = (tl.program_id(0) // n_block).to(tl.int64)
    block = tl.program_id(0) % n_block
    log_total += lane * length
    mean += lane * length
    initial += lane * 3
    step = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = step < length
    within = step % CHUNK
    start = step - within
    stored = step // CHUNK < n_chunk
    start = tl.where(stored, start, 0)
    count, level, centre = before(log_total, mean, initial, start, HAS_INITIAL)
    end = tl.minimum(start + CHUNK, length) - 1
    tokens = count + (step - start + 1).to(tl.float64)
    last = count + (end - start + 1).to(tl.float64)
    s = tl.load(logit + place(lane, n_head, s_b, s_h) + step * s_t, inside, other=0.0)
    s = s.to(tl.float64)
    later = tl.load(log_total + step, inside, other=0.0)
    drift = tl.load(mean + step, inside, other=0.0) - centre
    high = tl.load(higher + place(lane, n_head, gh_b, gh_h) + step * gh_t, inside, other=0.0)
    high = high.to(tl.float64)
    slope = tl.load(first + place(lane, n_head, g1_b, g1_h) + step * g1_t, inside, other=0.0)
    part = 1.0 / tokens
    slope = (slope.to(tl.float64) - high) * part
    plain = -slope * drift
    if HAS_ZERO:
        none = tl.load(zero + place(lane, n_head, g0_b, g0_h) + step * g0_t, inside, other=0.0)
        plain += none.to(tl.float64) * part
    fade, rest = gap(level, later, count, tokens)
    end_log, end_drift = tl.load(log_total + end), tl.load(mean + end) - centre
    end_fade, end_rest = gap(level, end_log, count, last)
    over = s - centre
    into_d = tl.exp(tl.where(inside, tl.minimum(s - end_log, 0.0), 0.0)) - 1.0 / last
    top, top_low = two_floats((later - level) * LOG2_E)
    own, own_low = two_floats((s - level) * LOG2_E)
    ends = tl.where(within == 0, end_fade - 1.0, tl.where(within == 1, end_rest * GAIN, end_drift))
    ends = tl.where(within == 3, tl.maximum(count, 1.0), ends)
    ends = tl.where(within == 4, 1.0 / last, ends)
    base = 0.0 if EXACT else level - centre
    ends = tl.where(within == 5, base, ends)
    factors += (lane * n_chunk + step // CHUNK) * (ROWS * CHUNK) + within
    put(factors, TOP, top, inside, stored, 0.0, CHUNK)
    put(factors, OF_D, high * fade, inside, stored, 0.0, CHUNK)
    put(factors, SLOPE, slope * GAIN, inside, stored, 0.0, CHUNK)
    put(factors, OF_H, (high * rest + plain) * GAIN, inside, stored, 0.0, CHUNK)
    put(factors, HIGH, high * GAIN, inside, stored, 0.0, CHUNK)
    put(factors, FLAT, (plain - high * part + slope * base) * GAIN, inside, stored, 0.0, CHUNK)
    put(factors, LOGIT, own, inside, stored, NEVER, CHUNK)
    put(factors, OVER, over, inside, stored, 0.0, CHUNK)
    put(factors, INTO_D, into_d * GAIN, inside, stored, 0.0, CHUNK)
    put(factors, INTO_G, over - end_drift, inside, stored, 0.0, CHUNK)
    put(factors, ENDS, ends, stored, stored, 0.0, CHUNK)
    put(factors, TOP_LOW, top_low, inside, stored, 0.0, CHUNK)
    put(factors, LOGIT_LOW, own_low, inside, stored, 0.0, CHUNK)
    if ROWS > FADE:
        put(factors, FADE, fade * (1.0 / GAIN), inside, stored, 0.0, CHUNK)
        put(factors, REST, rest, inside, stored, 0.0, CHUNK)
        put(factors, PART, part, inside, stored, 0.0, CHUNK)
        put(factors, MEAN, drift, inside, stored, 0.0, CHUNK)


@triton.jit
def put(factors, row: tl.constexpr, value, inside, stored, other, CHUNK: tl.constexpr):
    value = tl.where(inside, value.to(tl.float32), other)
    tl.store(factors + row * CHUNK, value, stored)


@triton.jit
def take(chunk, row: tl.constexpr, first: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    """Of a row of a chunk's factors, those of SIZE tokens."""
    return tl.load(chunk + row * CHUNK + first + tl.arange(0, SIZE))


@triton.jit
def pair(top, own, chunk, keep, top_at: tl.constexpr, own_at: tl.constexpr, TOKEN: tl.constexpr,
         EXACT: tl.constexpr, CHUNK: tl.constexpr, TOPS: tl.constexpr,
         OWNS: tl.constexpr):  # fmt: skip
    """2^(LOGIT_j - TOP_i) where `keep`, else 0; s_j - c_s less b, in units of those of `unit`.

    TOKEN: the axis of j; top, own: the rows TOP and LOGIT of TOPS and OWNS tokens.
    """
    own, top = tl.expand_dims(own, 1 - TOKEN), tl.expand_dims(top, TOKEN)
    power = own - top
    if EXACT:  # as the sum of two float32 that it is
        own_low = tl.expand_dims(take(chunk, LOGIT_LOW, own_at, CHUNK, OWNS), 1 - TOKEN)
        top_low = tl.expand_dims(take(chunk, TOP_LOW, top_at, CHUNK, TOPS), TOKEN)
        back = power - own
        low = (own - (power - back)) - (top + back) + (own_low - top_low)
        share = exact_exp2(tl.where(keep, power, NEVER), tl.where(keep, low, 0.0))
        over = tl.expand_dims(take(chunk, OVER, own_at, CHUNK, OWNS), 1 - TOKEN)
    else:
        share, over = fast_exp2(tl.where(keep, power, NEVER)), own
    return share, over


@triton.jit
def unit(EXACT: tl.constexpr):
    """What `pair` counts logits in."""
    return 1.0 if EXACT else LN_2


@triton.jit
def added(state, low, more):
    """state + more, and what rounding lost, kept in `low` for the next addition."""
    more += low
    grown = state + more
    return grown, more - (grown - state)
