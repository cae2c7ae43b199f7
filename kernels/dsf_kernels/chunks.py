"""What the families with a matrix state share: decays in a chunk, tiles of tokens and states.

g is the cumulative log decay in a chunk, in units of log 2, as a sum of two float32: differences
of it are then exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.exponentials import LN_2, LOG2_E, fast_exp2
from dsf_kernels.launch import narrow, power_of_two


@triton.jit
def two_floats(x):
    """A float64 as a sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def cumulate_kernel(log_decay, high, low, length, n_head, n_chunk, stride_b, stride_t, stride_h,
                     CHUNK: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """g, high and low."""
    n_block = tl.cdiv(n_head, HEADS)
    program = tl.program_id(0).to(tl.int64)
    block, chunk = program % n_block, program // n_block % n_chunk
    batch = program // (n_block * n_chunk)
    time = tl.arange(0, CHUNK)[:, None]
    head = block * HEADS + tl.arange(0, HEADS)[None, :]
    keep = (chunk * CHUNK + time < length) & (head < n_head)
    log_decay += batch * stride_b + chunk * CHUNK * stride_t
    step = tl.load(log_decay + time * stride_t + head * stride_h, keep, other=0.0).to(tl.float32)
    step = tl.maximum(step, -110.0)  # its exp is 0 in float32; keeps -inf out of differences
    top, rest = two_floats(tl.cumsum(step.to(tl.float64) * LOG2_E, 0))
    place = (batch * n_head + head) * (n_chunk * CHUNK) + chunk * CHUNK + time
    tl.store(high + place, top, head < n_head)
    tl.store(low + place, rest, head < n_head)


def cumulate(log_decay: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """g of every chunk (batch, head, time in whole chunks): high and low."""
    batch, length, n_head = log_decay.shape
    n_chunk = -(-length // chunk)
    log_decay = narrow(log_decay, 1)
    high, low = log_decay.new_empty((2, batch, n_head, n_chunk * chunk), dtype=torch.float32)
    heads = min(32, power_of_two(n_head))
    grid = (batch * n_chunk * -(-n_head // heads),)
    cumulate_kernel[grid](
        log_decay, high, low, length, n_head, n_chunk, *log_decay.stride(),
        CHUNK=chunk, HEADS=heads,
    )  # fmt: skip
    return high, low


@triton.jit
def exp2_gap(a, a_low, b, b_low, keep):
    """2^(a - b) where `keep`, else 0; a and b are sums of two float32, so a - b is not rounded."""
    gap = a - b
    back = gap - a
    rest = (a - (gap - back)) - (b + back) + (a_low - b_low)
    return tl.exp2(tl.where(keep, gap, float("-inf"))) * (1.0 + LN_2 * rest)


@triton.jit
def chunk_decays(high, low, first, length, CHUNK: tl.constexpr, EXACT: tl.constexpr,
                 FIXED: tl.constexpr):  # fmt: skip
    """g in the chunk and its low part; decays to the end, from the start, of the whole chunk.

    FIXED: `high` points to the log decay of every step. Not EXACT: 2^x in one instruction, as
    tl.exp2 beside 16-bit products spills more registers.
    """
    i = tl.arange(0, CHUNK)
    g_low, low_end = 0.0, 0.0
    if FIXED:
        step = tl.maximum(tl.load(high).to(tl.float32), -110.0)  # as cumulate_kernel
        past = tl.minimum(i + 1, length - first)
        most = tl.minimum(length - first, CHUNK)
        if EXACT:
            exact = step.to(tl.float64) * LOG2_E
            g_exact, end_exact = exact * past, exact * most
            g, g_low = two_floats(g_exact)
            g_end, low_end = two_floats(end_exact)
        else:
            g, g_end = step * LOG2_E * past, step * LOG2_E * most
    else:
        g, g_end = tl.load(high + first + i), tl.load(high + first + CHUNK - 1)
        if EXACT:
            g_low, low_end = tl.load(low + first + i), tl.load(low + first + CHUNK - 1)
    if EXACT:
        to_end = exp2_gap(g_end, low_end, g, g_low, i >= 0)
        from_start = exp2_gap(g, g_low, 0.0, 0.0, i >= 0)
        whole = exp2_gap(g_end, low_end, 0.0, 0.0, g_end == g_end)
    else:
        to_end, from_start, whole = fast_exp2(g_end - g), fast_exp2(g), tl.exp2(g_end)
        g_low = g
    return g, g_low, to_end, from_start, whole


@triton.jit
def decay_between(late, late_low, early, early_low, keep, EXACT: tl.constexpr):
    """2^(late - early) where `keep`, else 0; the low parts count where EXACT."""
    if EXACT:
        decay = exp2_gap(late, late_low, early, early_low, keep)
    else:
        decay = fast_exp2(tl.where(keep, late - early, float("-inf")))
    return decay


@triton.jit
def pair_decay(g, g_low, pair, LATER: tl.constexpr, EXACT: tl.constexpr):
    """Decay between the tokens of each pair, 0 outside `pair`; LATER: the axis of the later."""
    late, early = tl.expand_dims(g, 1 - LATER), tl.expand_dims(g, LATER)
    late_low, early_low = tl.expand_dims(g_low, 1 - LATER), tl.expand_dims(g_low, LATER)
    return decay_between(late, late_low, early, early_low, pair, EXACT)


@triton.jit
def rows(pointer, first, length, stride_t, stride_w, width, offset, FULL: tl.constexpr,
          CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A tile (CHUNK, WIDTH) of rows first.. and columns offset.., zero beyond the edges."""
    time = tl.arange(0, CHUNK)[:, None]
    column = offset + tl.arange(0, WIDTH)[None, :]
    pointer += first.to(tl.int64) * stride_t
    place = pointer + time * stride_t + column * stride_w
    if FULL:
        rows = tl.load(place)
    else:
        rows = tl.load(place, (time < length - first) & (column < width), other=0.0)
    return rows


@triton.jit
def owned(n_slab, n_head, SLAB: tl.constexpr):
    """What this program owns: slab of channels, lane, the lane's batch and head, first channel."""
    program = tl.program_id(0).to(tl.int64)
    slab, lane = program % n_slab, program // n_slab
    return slab, lane, lane // n_head, lane % n_head, slab.to(tl.int32) * SLAB


@triton.jit
def cells(offset, width, channels, FULL: tl.constexpr, WIDTH: tl.constexpr,
          SLAB: tl.constexpr):  # fmt: skip
    """Rows and columns of a slab of the state, and which of its cells exist."""
    row = tl.arange(0, WIDTH)[:, None]
    column = offset + tl.arange(0, SLAB)[None, :]
    inside = (row >= 0) & (column >= 0) if FULL else (row < width) & (column < channels)
    return row, column, inside


@triton.jit
def entering(initial, row, column, inside, stride_n, stride_p, GIVEN: tl.constexpr):
    """The state that a walk starts from: the initial one where GIVEN, else zero."""
    if GIVEN:
        place = initial + row * stride_n + column * stride_p
        h = tl.load(place, inside, other=0.0).to(tl.float32)
    else:
        h = tl.zeros(inside.shape, tl.float32)
    return h
