"""Device functions of ZeroS: sums of logits, factors of a chunk, and the walk along time."""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.combine import combine
from dsf_kernels.exponentials import fast_exp2

LOG2_E = tl.constexpr(1.4426950408889634)
GAIN = tl.constexpr(32.0)  # keeps weights near 1/t among the normal numbers of fp16
NEVER = tl.constexpr(-1e30)


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
def edges(log_total, mean, initial, start, end, HAS_INITIAL: tl.constexpr):
    """Before a chunk: tokens, centre, log sum; at its last token the same; whether any before."""
    count = start.to(tl.float32)
    if HAS_INITIAL:
        count += tl.load(initial + 2).to(tl.float32)
    known = count > 0
    centre = tl.load(mean + tl.maximum(start - 1, 0))  # with no past: the first logit itself
    level = tl.load(log_total + tl.maximum(start - 1, 0))
    if HAS_INITIAL:
        fresh = (start == 0) & known
        centre = tl.where(fresh, tl.load(initial + 1), centre)
        level = tl.where(fresh, tl.load(initial), level)
    e_log = (tl.load(log_total + end) - level) * LOG2_E
    e_mean = (tl.load(mean + end) - centre).to(tl.float32)
    e_count = count + (end + 1 - start).to(tl.float32)
    return count, known, centre, level, e_log, e_mean, e_count


@triton.jit
def rows(log_total, mean, logit, s_time, start, row, inside, centre, level):
    """Of a chunk's tokens: log sum and logit over level in base 2, mean and logit over centre."""
    sums = (tl.load(log_total + start + row, inside, other=0.0) - level) * LOG2_E
    means = (tl.load(mean + start + row, inside, other=0.0) - centre).to(tl.float32)
    s = tl.load(logit + start * s_time + row * s_time, inside, other=0.0).to(tl.float64)
    return sums, means, (s - level) * LOG2_E, (s - centre).to(tl.float32)


@triton.jit
def share(upper, lower, keep, EXACT: tl.constexpr):
    """2^(upper - lower) where `keep`, else 0; EXACT: to all digits of the float64 difference."""
    high_u, high_l = upper.to(tl.float32), lower.to(tl.float32)
    power = high_u - high_l
    if EXACT:
        power += (upper - high_u).to(tl.float32) - (lower - high_l).to(tl.float32)
    return fast_exp2(tl.where(keep, power, NEVER))


@triton.jit
def gates_of(first, higher, zero, start, row, inside, g1_t, gh_t, g0_t, HAS_ZERO: tl.constexpr):
    """The gates of the higher order, first less higher, and zero order (0 without)."""
    high = tl.load(higher + start * gh_t + row * gh_t, inside, other=0.0).to(tl.float32)
    slope = tl.load(first + start * g1_t + row * g1_t, inside, other=0.0).to(tl.float32) - high
    none = tl.zeros_like(high)
    if HAS_ZERO:
        none = tl.load(zero + start * g0_t + row * g0_t, inside, other=0.0).to(tl.float32)
    return high, slope, none


@triton.jit
def tile(pointer, start, row, inside, s_time, column, width, s_column):
    """(time, column) of a tensor, 0 outside; 64-bit to its first row, 32-bit within."""
    keep = inside[:, None] & (column < width)[None, :]
    offset = row[:, None] * s_time + column[None, :] * s_column
    return tl.load(pointer + start * s_time + offset, keep, other=0.0)
