"""ZeroS on a long row of few heads: the states between its segments, from both ends."""

# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.zeros_kernels import before, gap, place


@triton.jit(do_not_specialize=["length", "segment"])
def carry_kernel(ends, starts, final, moments, log_total, mean, initial, length, n_segment,
                 segment, n_head, size, n_right, m_b, m_h, m_o, m_n, m_p, HAS_STATE: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """States before each segment of so many tokens (REVERSE: adjoint states after it); the last.

    ends (lane, segment, 3, size): what each segment adds to zero states. With f, r and m of
    zeros_walk over a whole segment: D <- f D + r H + end_D, G <- G - m H + end_G, H <- H + end_H,
    and transposed. In float64.
    """
    n_block = tl.cdiv(size, BLOCK)
    lane = (tl.program_id(0) // n_block).to(tl.int64)
    cell = tl.program_id(0) % n_block * BLOCK + tl.arange(0, BLOCK)
    inside = cell < size
    log_total += lane * length
    mean += lane * length
    initial += lane * 3
    d = tl.zeros([BLOCK], tl.float64)
    g = tl.zeros([BLOCK], tl.float64)
    h = tl.zeros([BLOCK], tl.float64)
    if HAS_STATE:
        source = moments + place(lane, n_head, m_b, m_h)
        source += cell // n_right * m_n + cell % n_right * m_p
        d += tl.load(source, inside, other=0.0).to(tl.float64)
        g += tl.load(source + m_o, inside, other=0.0).to(tl.float64)
        h += tl.load(source + 2 * m_o, inside, other=0.0).to(tl.float64)
    for passed in range(n_segment):
        number = n_segment - 1 - passed if REVERSE else passed
        at = ((lane * n_segment + number) * 3) * size + cell
        tl.store(starts + at, d.to(tl.float32), inside)
        tl.store(starts + at + size, g.to(tl.float32), inside)
        tl.store(starts + at + 2 * size, h.to(tl.float32), inside)
        start = tl.cast(number, tl.int64) * segment
        end = tl.minimum(start + segment, length) - 1
        count, level, centre = before(log_total, mean, initial, start, HAS_INITIAL)
        fade, rest = gap(level, tl.load(log_total + end), count,
                         count + (end - start + 1).to(tl.float64))  # fmt: skip
        drift = tl.load(mean + end) - centre
        if REVERSE:
            h += rest * d - drift * g
            d = fade * d
        else:
            d = fade * d + rest * h
            g -= drift * h
        d += tl.load(ends + at, inside, other=0.0).to(tl.float64)
        g += tl.load(ends + at + size, inside, other=0.0).to(tl.float64)
        h += tl.load(ends + at + 2 * size, inside, other=0.0).to(tl.float64)
    at = lane * 3 * size + cell
    tl.store(final + at, d.to(tl.float32), inside)
    tl.store(final + at + size, g.to(tl.float32), inside)
    tl.store(final + at + 2 * size, h.to(tl.float32), inside)
