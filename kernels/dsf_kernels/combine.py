"""Device functions that families share: segments of one sequence composed in order."""

import triton
import triton.language as tl


@triton.jit
def combine(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def product(x, y):
    return x * y


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
