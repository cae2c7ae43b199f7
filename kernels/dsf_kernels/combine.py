"""Device functions that families share: segments composed in order, chunks of one sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import narrow, power_of_two


@triton.jit
def combine(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def along(channel, stride, V: tl.constexpr):
    """Offsets of channels: with V > 1 they are contiguous, so V of them load at once."""
    return channel * stride if V == 1 else channel


@triton.jit
def read(pointer, mask, other, LOG: tl.constexpr):
    value = tl.load(pointer, mask, other=other).to(tl.float32)
    return tl.exp(value) if LOG else value


@triton.jit
def within(decay, state, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    """Scans (C, S, T, V) along T; up to each segment's end, and to its start (C, S, V)."""
    decay, state = tl.associative_scan((decay, state), 2, combine)
    step = tl.arange(0, T)[None, None, :, None]
    total = tl.sum(tl.where(step == T - 1, decay, 0.0), 2)
    end = tl.sum(tl.where(step == T - 1, state, 0.0), 2)
    total, end = tl.associative_scan((total, end), 1, combine)
    segment = tl.arange(0, S)[None, :, None]
    before = tl.broadcast_to(tl.maximum(segment - 1, 0), [C, S, V])
    decay_before = tl.where(segment == 0, 1.0, tl.gather(total, before, 1))
    state_before = tl.where(segment == 0, 0.0, tl.gather(end, before, 1))
    return decay, state, total, end, decay_before, state_before


@triton.jit
def arrived(carry, keep):
    word = tl.load(carry, keep, other=1, volatile=True)
    return tl.min(tl.min(tl.min((word != 0).to(tl.int32), 2), 1), 0)


@triton.jit
def enter(tile, initial, carry, keep):
    """The state (C, S, V) that enters this tile, one copy a segment: the initial state, or what
    the tile before left.

    A carry is one 32-bit word, the inverted bits of the number, so 0 means not yet there: value
    and flag arrive together and need no fence.
    """
    if tile == 0:
        entering = tl.load(initial, keep, other=0.0)
    else:
        ready = arrived(carry, keep)
        while ready == 0:
            ready = arrived(carry, keep)
        word = tl.load(carry, keep, other=1, volatile=True)
        entering = (word ^ -1).to(tl.float32, bitcast=True)
    return entering


@triton.jit
def leave(tile, n_tile, final, carry, width, keep, end, factor):
    """Publish the state at the end of this tile, or store it times `factor` if it is the last."""
    if tile == n_tile - 1:
        tl.store(final, end * factor, keep)
    else:
        number = tl.where(end == end, end, float("nan"))  # one NaN, whose word is not 0
        tl.store(carry + width, number.to(tl.int32, bitcast=True) ^ -1, keep)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def cumulate_kernel(log_decay, high, low, length, n_head, n_chunk, stride_b, stride_t, stride_h,
                     CHUNK: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """g inside each chunk, in units of log 2, as a sum of two float32: exact differences."""
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
    g = tl.cumsum(step.to(tl.float64) * 1.4426950408889634, 0)
    top = g.to(tl.float32)
    place = (batch * n_head + head) * (n_chunk * CHUNK) + chunk * CHUNK + time
    tl.store(high + place, top, head < n_head)
    tl.store(low + place, (g - top.to(tl.float64)).to(tl.float32), head < n_head)


@triton.jit
def exp2(x):
    """2^x written out: beside 16-bit products the other form spills more registers."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp2_gap(a, a_low, b, b_low, keep):
    """2^(a - b) where `keep`, else 0; a and b are sums of two float32, so a - b is not rounded."""
    gap = a - b
    back = gap - a
    rest = (a - (gap - back)) - (b + back) + (a_low - b_low)
    return tl.exp2(tl.where(keep, gap, float("-inf"))) * (1.0 + 0.6931471805599453 * rest)


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


def cumulate(log_decay: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Cumulative log decay in each chunk (batch, head, time in whole chunks): high and low."""
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
