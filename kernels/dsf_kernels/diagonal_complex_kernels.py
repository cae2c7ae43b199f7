"""Device code of the complex elementwise recurrence: one pass, as `diagonal_scan`.

Tile, tickets and carries are those of `diagonal_scan`. Here each thread owns T consecutive steps
of one channel, one value a step in a tuple, so the layout is fixed by the code: threads
s C + c, segment s = 0..S-1, channel c. A number is a pair, real and imaginary part, side by side
in memory: it loads as one word of 64 bits, and its two carries are waited for at once.
"""

# Tuples grow in unrolled loops: their types count as empty.
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from dsf_kernels.combine import enter, leave
from dsf_kernels.diagonal_kernels import tile_of, tile_place
from dsf_kernels.exponentials import ROUND, exponential

# pi / 2 in three parts: products of the first two with a whole number below 2^13 are exact.
HALF_PI_1 = tl.constexpr(1.5703125)
HALF_PI_2 = tl.constexpr(4.837512969970703125e-4)
HALF_PI_3 = tl.constexpr(7.549789948768648e-08)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)


@triton.jit
def cosine_sine(x):
    """cos x and sin x, each to an ulp of 1, |x| < 2^22."""
    turns = (x * TWO_OVER_PI + ROUND) - ROUND
    r = tl.fma(turns, -HALF_PI_1, x)
    r = tl.fma(turns, -HALF_PI_2, r)
    r = tl.fma(turns, -HALF_PI_3, r)
    q = r * r
    cos = q * (1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320 - q * (1.0 / 3628800))))
    cos = 1.0 + q * (cos - 0.5)
    sin = -1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880)))
    sin = r + (r * q) * sin
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return c, s


@triton.jit
def read_polar(log_modulus, phase, mask):
    """exp(l + i p), both parts: 1 where not `mask`, 0 for l = -inf."""
    modulus = tl.load(log_modulus, mask, other=0.0)
    modulus = exponential(tl.where(modulus < -200.0, -200.0, modulus), True)
    cos, sin = cosine_sine(tl.load(phase, mask, other=0.0))
    return modulus * cos, modulus * sin


@triton.jit
def _pair(number):
    """Places of both parts of whole numbers at places (n,): (n, 2)."""
    return 2 * number[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def read_pair(pointer, number, mask):
    both = mask[:, None] & (tl.arange(0, 2)[None, :] >= 0)
    return tl.split(tl.load(pointer + _pair(number), both, other=0.0))


@triton.jit
def write_pair(pointer, number, re, im, mask):
    both = mask[:, None] & (tl.arange(0, 2)[None, :] >= 0)
    tl.store(pointer + _pair(number), tl.join(re, im), both)


@triton.jit
def times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def times_conjugate(a_re, a_im, b_re, b_im):
    """a conj(b)."""
    return a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im


@triton.jit
def combine_complex(a_re, a_im, h_re, h_im, b_re, b_im, g_re, g_im):
    """b after a: the product b a, and b h + g."""
    moved_re, moved_im = times(b_re, b_im, h_re, h_im)
    a_re, a_im = times(b_re, b_im, a_re, a_im)
    return a_re, a_im, moved_re + g_re, moved_im + g_im


@triton.jit
def _before(x, empty, S: tl.constexpr, C: tl.constexpr):
    """x (S, C) of the segment before, `empty` for the first; as (S C,)."""
    place = tl.arange(0, S * C)
    x = tl.gather(tl.reshape(x, [S * C]), tl.maximum(place - C, 0), 0)
    return tl.where(place < C, empty, x)


@triton.jit
def _enter_segment(total_re, total_im, end_re, end_im, tile, initial, carry, keep,
                   S: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """State before each segment and behind it, (S C,), given its product and its end from zero."""
    total_re, total_im, end_re, end_im = tl.associative_scan(
        (tl.reshape(total_re, [S, C]), tl.reshape(total_im, [S, C]),
         tl.reshape(end_re, [S, C]), tl.reshape(end_im, [S, C])), 0, combine_complex,
    )  # fmt: skip
    enter_re, enter_im = tl.split(enter(tile, initial, carry, keep))
    enter_re = tl.reshape(enter_re, [S * C])
    enter_im = tl.reshape(enter_im, [S * C])
    start_re, start_im = times(_before(total_re, 1.0, S, C), _before(total_im, 0.0, S, C),
                               enter_re, enter_im)  # fmt: skip
    start_re += _before(end_re, 0.0, S, C)
    start_im += _before(end_im, 0.0, S, C)
    behind_re, behind_im = times(tl.reshape(total_re, [S * C]), tl.reshape(total_im, [S * C]),
                                 enter_re, enter_im)  # fmt: skip
    behind_re += tl.reshape(end_re, [S * C])
    behind_im += tl.reshape(end_im, [S * C])
    return start_re, start_im, behind_re, behind_im


@triton.jit
def _leave_tile(tile, n_tile, final, carry, width, ends, re, im, n: tl.constexpr):
    leave(tile, n_tile, final, carry, width * 2, ends, tl.reshape(tl.join(re, im), [n, 1, 2]), 1.0)


@triton.jit(do_not_specialize=["length", "n_tile", "modulus_c", "phase_c", "inputs_c", "states_c"])
def _scan_kernel(log_modulus, phase, inputs, initial, states, final, table, carry, ticket,
                 length, width, n_tile, n_block, initial_b,
                 modulus_b, modulus_t, modulus_c, phase_b, phase_t, phase_c,
                 inputs_b, inputs_t, inputs_c, states_b, states_t, states_c,
                 FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                 C: tl.constexpr):  # fmt: skip
    """Forward: h = a h + b. The grid is one program a tile; strides count whole numbers.

    table: see diagonal_kernels.
    """
    tile, batch, block = tile_place(ticket, n_tile, n_block)
    slot, row, known = tile, batch, width
    if table is not None:
        row, origin, length, tile, n_tile, known = tile_of(table, tile, width)
    start = tile * T * S if table is None else origin + tile * T * S
    first = block * C
    thread = tl.arange(0, S * C)
    time = thread // C * T
    channel = thread % C
    held = channel < known - first
    inside = tl.minimum(length - start, T * S).to(tl.int32)
    log_modulus += batch * modulus_b + start * modulus_t + first * modulus_c
    phase += batch * phase_b + start * phase_t + first * phase_c
    inputs += 2 * (batch * inputs_b + start * inputs_t + first * inputs_c)
    states += 2 * (batch * states_b + start * states_t + first * states_c)
    total_re = tl.full([S * C], 1.0, tl.float32)
    total_im = tl.zeros([S * C], tl.float32)
    end_re = total_im
    end_im = total_im
    steps = ()
    for t in tl.static_range(T):
        mask = (thread >= 0) if FULL else held & (time + t < inside)
        at = time + t
        a_re, a_im = read_polar(log_modulus + at * modulus_t + channel * modulus_c,
                                phase + at * phase_t + channel * phase_c, mask)  # fmt: skip
        b_re, b_im = read_pair(inputs, at * inputs_t + channel * inputs_c, mask)
        steps = steps + ((a_re, a_im, b_re, b_im),)
        total_re, total_im, end_re, end_im = combine_complex(
            total_re, total_im, end_re, end_im, a_re, a_im, b_re, b_im
        )
    lane = (2 * first + _pair(channel * states_c))[:, None, :]
    keep = held[:, None, None] & (lane >= 0)
    carry += (batch * n_tile + tile if table is None else slot) * width * 2 + lane
    h_re, h_im, end_re, end_im = _enter_segment(total_re, total_im, end_re, end_im, tile,
                                                initial + row * initial_b + lane, carry, keep,
                                                S, C)  # fmt: skip
    ends = keep & (thread >= S * C - C)[:, None, None]
    _leave_tile(tile, n_tile, final + row * width * 2 + lane, carry, width, ends,
                end_re, end_im, S * C)  # fmt: skip
    for t in tl.static_range(T):
        a_re, a_im, b_re, b_im = steps[t]
        h_re, h_im = times(a_re, a_im, h_re, h_im)
        h_re += b_re
        h_im += b_im
        mask = (thread >= 0) if FULL else held & (time + t < inside)
        write_pair(states, (time + t) * states_t + channel * states_c, h_re, h_im, mask)


@triton.jit(do_not_specialize=["length", "n_tile", "modulus_c", "phase_c", "states_c", "grads_c",
                               "out_c"])  # fmt: skip
def _adjoint_kernel(log_modulus, phase, states, grads, initial, grad_final, grad_modulus,
                    grad_phase, grad_inputs, grad_initial, table, carry, ticket,
                    length, width, n_tile, n_block, initial_b, grad_final_b,
                    modulus_b, modulus_t, modulus_c, phase_b, phase_t, phase_c,
                    states_b, states_t, states_c, grads_b, grads_t, grads_c, out_b, out_t, out_c,
                    FULL: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                 C: tl.constexpr):  # fmt: skip
    """Backward: m_t = conj(a_{t+1}) m_{t+1} + dh_t from the last step.

    db = m; dl + i dp = m_t conj(h_{t-1}) conj(a_t), which is 0 where a is.
    """
    tile, batch, block = tile_place(ticket, n_tile, n_block)
    slot, row, known = tile, batch, width
    if table is not None:
        row, origin, length, tile, n_tile, known = tile_of(table, tile, width)
    start = length - 1 - tile * T * S
    before = start if table is None else start - origin
    first = block * C
    thread = tl.arange(0, S * C)
    back = thread // C * T
    channel = thread % C
    held = channel < known - first
    newest = tl.minimum(before, T * S).to(tl.int32)
    some = tl.minimum(tile, 1).to(tl.int32)
    log_modulus += batch * modulus_b + start * modulus_t + first * modulus_c + channel * modulus_c
    phase += batch * phase_b + start * phase_t + first * phase_c + channel * phase_c
    states += 2 * (batch * states_b + start * states_t + first * states_c)
    grads += 2 * (batch * grads_b + start * grads_t + first * grads_c)
    lane = (2 * first + _pair(channel * out_c))[:, None, :]
    keep = held[:, None, None] & (lane >= 0)
    begin = initial + row * initial_b + 2 * first
    total_re = tl.full([S * C], 1.0, tl.float32)
    total_im = tl.zeros([S * C], tl.float32)
    end_re = total_im
    end_im = total_im
    steps = ()
    decays = ()
    for k in tl.static_range(T):
        at = back + k
        later = held & (at <= newest + 1) & (at + some > 0)
        a_re, a_im = read_polar(log_modulus + (1 - at) * modulus_t, phase + (1 - at) * phase_t,
                                later)  # fmt: skip
        decays = decays + ((a_re, a_im),)
        mask = (thread >= 0) if FULL else held & (at <= newest)
        if not FULL:
            a_re = tl.where(mask, a_re, 1.0)
            a_im = tl.where(mask, a_im, 0.0)
        m_re, m_im = read_pair(grads, channel * grads_c - at * grads_t, mask)
        h_re, h_im = read_pair(states, channel * states_c - (at + 1) * states_t,
                               mask & (at < newest))  # fmt: skip
        steps = steps + ((m_re, m_im, h_re, h_im),)
        total_re, total_im, end_re, end_im = combine_complex(
            total_re, total_im, end_re, end_im, a_re, -a_im, m_re, m_im
        )
    a_re, a_im = read_polar(log_modulus + (1 - back - T) * modulus_t,
                            phase + (1 - back - T) * phase_t,
                            held & (back + T <= newest + 1))  # fmt: skip
    decays = decays + ((a_re, a_im),)
    carry += (batch * n_tile + tile if table is None else slot) * width * 2 + lane
    n_re, n_im, end_re, end_im = _enter_segment(total_re, total_im, end_re, end_im, tile,
                                                grad_final + row * grad_final_b + lane, carry,
                                                keep, S, C)  # fmt: skip
    oldest = held & (thread * 0 + tile == n_tile - 1)
    begin_re, begin_im = read_pair(begin, channel * out_c, oldest)
    if tile == n_tile - 1:
        one_re, one_im = read_polar(
            log_modulus - before * modulus_t, phase - before * phase_t, held
        )
        end_re, end_im = times_conjugate(end_re, end_im, one_re, one_im)
    ends = keep & (thread >= S * C - C)[:, None, None]
    _leave_tile(tile, n_tile, grad_initial + row * width * 2 + lane, carry, width, ends,
                end_re, end_im, S * C)  # fmt: skip
    place = batch * out_b + start * out_t + first * out_c
    grad_inputs += 2 * place
    grad_modulus += place
    grad_phase += place
    for k in tl.static_range(T):
        at = back + k
        mask = (thread >= 0) if FULL else held & (at <= newest)
        m_re, m_im, h_re, h_im = steps[k]
        a_re, a_im = decays[k]
        n_re, n_im = times_conjugate(n_re, n_im, a_re, a_im)
        n_re += m_re
        n_im += m_im
        place = channel * out_c - at * out_t
        write_pair(grad_inputs, place, n_re, n_im, mask)
        h_re = tl.where(at == newest, begin_re, h_re)
        h_im = tl.where(at == newest, begin_im, h_im)
        d_re, d_im = times_conjugate(n_re, n_im, h_re, h_im)
        a_re, a_im = decays[k + 1]
        d_re, d_im = times_conjugate(d_re, d_im, a_re, a_im)
        tl.store(grad_modulus + place, d_re, mask)
        tl.store(grad_phase + place, d_im, mask)
