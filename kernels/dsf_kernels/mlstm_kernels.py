"""Kernels of mlstm_scan around its two matrix scans: running maximum, write weights, division.

All numbers of a token and head are float32. Decays and weights are local differences,
l_t + (m_{t-1} - m_t) and i_t - m_t with m as stored: they are right whatever m was rounded to,
at any length, so m itself need not be. A decay may come out above 0 by the rounding of m; that
is kept, as it is what makes the products right.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import exponential, sigmoid, softplus

LEAST = tl.constexpr(-1e30)  # stands for -inf, whose differences are not numbers
TINY = tl.constexpr(2.0**-120)  # least divisor: what no query reads is 0, not 0 / 0


@triton.jit
def not_below(x, least):
    """max(x, least) that keeps NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def exp_of(x):
    """e^x to an ulp; 0 below e^-88, inf above e^89."""
    return exponential(not_below(tl.where(x > 120.0, 120.0, x), -120.0), True)


@triton.jit
def weight_of(i, m):
    """exp(i - m), the difference not rounded; 0 where i is -inf, whatever m is."""
    i = not_below(i, LEAST)
    gap = i - m
    back = gap - i
    weight = exp_of(gap) * (1.0 + ((i - (gap - back)) - (m + back)))
    return tl.where(i <= LEAST, 0.0, weight)


@triton.jit
def log_forget(f, EXPONENTIAL: tl.constexpr):
    """Log decay of a forget gate: f, or log sigmoid(f)."""
    if EXPONENTIAL:
        log = f
    else:
        near = not_below(tl.where(f > 100.0, 100.0, f), -100.0)
        log = tl.where(tl.abs(f) > 100.0, tl.minimum(f, 0.0), -softplus(-near, True))
    return not_below(log, LEAST)


@triton.jit
def later(a, b, a_2, b_2):
    """m -> max(m + a, b), and then the same with a_2, b_2."""
    return a + a_2, tl.maximum(b + a_2, b_2)


@triton.jit(do_not_specialize=["length"])
def maximum_kernel(input_gate, forget_gate, initial, top, length, n_head,
                   i_b, i_t, i_h, f_b, f_t, f_h, m_b, m_h,
                   HAS_INITIAL: tl.constexpr, EXPONENTIAL: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """m_t = max(m_{t-1} + l_t, i_t) of one head: a scan in each tile, tiles in turn."""
    lane = tl.program_id(0).to(tl.int64)
    batch, head = lane // n_head, lane % n_head
    input_gate += batch * i_b + head * i_h
    forget_gate += batch * f_b + head * f_h
    top += batch * length * n_head + head
    m = 0.0
    if HAS_INITIAL:
        m = not_below(tl.load(initial + batch * m_b + head * m_h).to(tl.float32), LEAST)
    step = tl.arange(0, TILE)
    for tile in tl.range(0, tl.cdiv(length, TILE)):
        time = (tile * TILE + step).to(tl.int64)
        inside = time < length
        i = tl.load(input_gate + time * i_t, inside, other=LEAST).to(tl.float32)
        f = tl.load(forget_gate + time * f_t, inside, other=0.0).to(tl.float32)
        decay = log_forget(f, EXPONENTIAL)
        a, b = tl.associative_scan((decay, not_below(i, LEAST)), 0, later)
        running = tl.maximum(m + a, b)
        tl.store(top + time * n_head, running, inside)
        last = tl.minimum(length - tile * TILE, TILE) - 1
        m = tl.sum(tl.where(step == last, running, 0.0), 0)


@triton.jit
def block_of(length, n_head, ROWS: tl.constexpr):
    """Rows (batch, time, head) of this program, all of one batch, which exist, their indices.

    The only divisions of vectors are of 32 bits: those of 64 cost more than all else here.
    """
    size = length.to(tl.int64) * n_head
    program, n_block = tl.program_id(0).to(tl.int64), tl.cdiv(size, ROWS)
    batch, first = program // n_block, program % n_block * ROWS
    step = tl.arange(0, ROWS)
    past = (first % n_head).to(tl.int32) + step
    row = batch * size + first + step
    return row, first + step < size, batch, first // n_head + past // n_head, past % n_head


@triton.jit
def gate_at(gate, batch, time, head, s_b, s_t, s_h, inside):
    """One number a row, in float32."""
    return tl.load(gate + batch * s_b + time * s_t + head * s_h, inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def weights_kernel(value, input_gate, forget_gate, top, initial, weighted, weights, log_decay,
                   length, n_head, channels, v_b, v_t, v_h, v_p,
                   i_b, i_t, i_h, f_b, f_t, f_h, m_b, m_h,
                   HAS_INITIAL: tl.constexpr, EXPONENTIAL: tl.constexpr,
                   ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Values times exp(i_t - m_t), that weight, and the log decay l_t + m_{t-1} - m_t."""
    row, inside, batch, time, head = block_of(length, n_head, ROWS)
    i = gate_at(input_gate, batch, time, head, i_b, i_t, i_h, inside)
    f = gate_at(forget_gate, batch, time, head, f_b, f_t, f_h, inside)
    m = tl.load(top + row, inside, other=0.0)
    before = tl.load(top + row - n_head, inside & (time > 0), other=0.0)
    if HAS_INITIAL:
        first = gate_at(initial, batch, 0, head, m_b, 0, m_h, inside & (time == 0))
        before = tl.where(time == 0, not_below(first, LEAST), before)
    weight = weight_of(i, m)
    log = log_forget(f, EXPONENTIAL)
    log = tl.where(log <= LEAST, LEAST, log + (before - m))  # shut, even where m is LEAST too
    tl.store(log_decay + row, log, inside)
    tl.store(weights + row, weight.to(weights.dtype.element_ty), inside)
    column = tl.arange(0, WIDE)[None, :]
    keep = inside[:, None] & (column < channels)
    start = (batch * v_b + time * v_t + head * v_h)[:, None]
    v = tl.load(value + start + column * v_p, keep, other=0.0).to(tl.float32)
    place = weighted + row[:, None] * channels + column
    tl.store(place, (v * weight[:, None]).to(weighted.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["length"])
def weights_adjoint_kernel(value, input_gate, forget_gate, top, d_weighted, d_weights, d_decay,
                           d_value, d_input, d_forget,
                           length, n_head, channels, v_b, v_t, v_h, v_p,
                           i_b, i_t, i_h, f_b, f_t, f_h,
                           EXPONENTIAL: tl.constexpr,
                           ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Gradients of value and gates, m held constant."""
    row, inside, batch, time, head = block_of(length, n_head, ROWS)
    i = gate_at(input_gate, batch, time, head, i_b, i_t, i_h, inside)
    weight = weight_of(i, tl.load(top + row, inside, other=0.0))
    column = tl.arange(0, WIDE)[None, :]
    keep = inside[:, None] & (column < channels)
    start = (batch * v_b + time * v_t + head * v_h)[:, None]
    v = tl.load(value + start + column * v_p, keep, other=0.0).to(tl.float32)
    place = row[:, None] * channels + column
    grad = tl.load(d_weighted + place, keep, other=0.0).to(tl.float32)
    tl.store(d_value + place, (grad * weight[:, None]).to(d_value.dtype.element_ty), keep)
    total = tl.sum(grad * v, 1) + tl.load(d_weights + row, inside, other=0.0).to(tl.float32)
    tl.store(d_input + row, (total * weight).to(d_input.dtype.element_ty), inside)
    change = tl.load(d_decay + row, inside, other=0.0)
    if not EXPONENTIAL:
        f = gate_at(forget_gate, batch, time, head, f_b, f_t, f_h, inside)
        change = change * sigmoid(-not_below(tl.where(f > 100.0, 100.0, f), -100.0), True)
    tl.store(d_forget + row, change.to(d_forget.dtype.element_ty), inside)


@triton.jit
def divisor_of(divisor, top, row, inside):
    """q.n, and the least divisor exp(-m)."""
    sums = tl.load(divisor + row, inside, other=1.0).to(tl.float32)
    least = exp_of(-tl.load(top + row, inside, other=0.0))
    return sums, not_below(least, TINY)


@triton.jit(do_not_specialize=["count"])
def divide_kernel(numerator, divisor, top, out, count, channels, eps,
                  ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Numerator / (max(|q.n|, exp(-m)) + eps)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    sums, least = divisor_of(divisor, top, row, inside)
    size = tl.maximum(tl.abs(sums), least) + eps
    column = tl.arange(0, WIDE)[None, :]
    keep = inside[:, None] & (column < channels)
    place = row[:, None] * channels + column
    x = tl.load(numerator + place, keep, other=0.0).to(tl.float32)
    y = tl.div_rn(x, tl.broadcast_to(size[:, None], [ROWS, WIDE]))
    tl.store(out + place, y.to(out.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["length"])
def divide_adjoint_kernel(numerator, divisor, top, grad, d_numerator, d_divisor,
                          length, n_head, channels, eps, g_b, g_t, g_h, g_p,
                          ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Gradients of the numerator, and of q.n where it exceeds exp(-m)."""
    row, inside, batch, time, head = block_of(length, n_head, ROWS)
    sums, least = divisor_of(divisor, top, row, inside)
    factor = tl.div_rn(1.0, tl.maximum(tl.abs(sums), least) + eps)
    column = tl.arange(0, WIDE)[None, :]
    keep = inside[:, None] & (column < channels)
    start = (batch * g_b + time * g_t + head * g_h)[:, None]
    dy = tl.load(grad + start + column * g_p, keep, other=0.0).to(tl.float32)
    place = row[:, None] * channels + column
    x = tl.load(numerator + place, keep, other=0.0).to(tl.float32)
    dx = dy * factor[:, None]
    tl.store(d_numerator + place, dx.to(d_numerator.dtype.element_ty), keep)
    change = -tl.sum(dx * (x * factor[:, None]), 1)
    change = tl.where(sums < 0, -change, change)
    change = tl.where(tl.abs(sums) > least, change, 0.0)
    tl.store(d_divisor + row, change.to(d_divisor.dtype.element_ty), inside)
