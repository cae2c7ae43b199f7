"""The walk of chunk_kernel with the key sum beside the state: outputs leave it divided.

The scores of a chunk give its part of the divisor as sums of their rows, the key sum z the rest,
as a product with z in two parts, what the type of the products holds and what it rounds off. Both
are float32, and the numerator is not rounded before it is divided. One launch, every input
read once; for the shapes that are walked (scalar_decay_launch.form_of).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunks import cells, chunk_decays, entering, owned, pair_decay, rows
from dsf_kernels.launch import narrow, power_of_two
from dsf_kernels.scalar_decay_launch import form_of, settings_of, slab_of, start

COPIES = tl.constexpr(16)  # columns of the key sum, all equal: the least that a product takes


@triton.jit(do_not_specialize=["length", "n_chunk"])
def normalised_kernel(x, y, w, out, divisor, high, low, initial, initial_sum, final, final_sum,
                      length, n_chunk, n_head, width, channels, scale, eps,
                      x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                      i_b, i_h, i_n, i_p, s_b, s_h, s_n,
                      X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr,
                      HAS_DECAY: tl.constexpr, FIXED: tl.constexpr, HAS_INITIAL: tl.constexpr,
                      HAS_SUM: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                      COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                      WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """A program owns one head and one slab of channels; the first slab's stores the divisor."""
    slab, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    x += batch * x_b + head // X_SHARE * x_h
    y += batch * y_b + head // Y_SHARE * y_h
    w += batch * w_b + head * w_h
    out += (batch * length * n_head + head) * channels
    divisor += batch * length * n_head + head
    if FIXED:
        high += head
    else:
        high += lane * n_chunk * CHUNK
        low += lane * n_chunk * CHUNK
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    h = entering(initial + batch * i_b + head * i_h, row, column, inside, i_n, i_p, HAS_INITIAL)
    copy = tl.arange(0, COPIES)[None, :]
    sums = initial_sum + batch * s_b + head * s_h
    kept = (row < width) & (copy >= 0)
    z = entering(sums, row, copy * 0, kept, s_n, s_n, HAS_SUM)
    i = tl.arange(0, CHUNK)
    pair = i[:, None] >= i[None, :]
    for chunk in tl.range(0, n_chunk, num_stages=STAGES):
        first = chunk * CHUNK
        ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        between = tl.dot(xs, h.to(COMPUTE), input_precision=PRECISION)
        score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
        high_z = z.to(COMPUTE)
        rest = tl.where(copy == 1, z - high_z.to(tl.float32), 0.0).to(COMPUTE)
        parts = tl.where(copy == 0, high_z, rest)
        d = tl.sum(tl.dot(xs, parts, input_precision=PRECISION), 1)
        if HAS_DECAY:
            g, g_low, to_end, from_start, whole = chunk_decays(
                high, low, first, length, CHUNK, EXACT, FIXED
            )
            score = score * pair_decay(g, g_low, pair, 0, EXACT)
            between = between * from_start[:, None]
            d = d * from_start
            written = (ws.to(tl.float32) * to_end[:, None]).to(COMPUTE)
            ones = (to_end[:, None] + copy * 0.0).to(COMPUTE)
            h, z = h * whole, z * whole
        else:
            score = tl.where(pair, score, 0.0)
            written = ws
            ones = tl.full([CHUNK, COPIES], 1.0, COMPUTE)
        d = (d + tl.sum(score, 1)) * scale
        known = first + i < length
        place = (first + i).to(tl.int64) * n_head
        if slab == 0:
            tl.store(divisor + place, d, known)
        d = d + eps
        result = tl.dot(score.to(COMPUTE), ws, between, input_precision=PRECISION) * scale
        result = (result / tl.where(d == 0.0, 1.0, d)[:, None]).to(out.dtype.element_ty)
        place = out + place[:, None] * channels + column
        if FULL:
            tl.store(place, result)
        else:
            tl.store(place, result, known[:, None] & (column < channels))
        h = tl.dot(tl.trans(ys), written, h, input_precision=PRECISION)
        z = tl.dot(tl.trans(ys), ones, z, input_precision=PRECISION)
    tl.store(final + (lane * width + row) * channels + column, h, inside)
    if slab == 0:
        tl.store(final_sum + lane * width + row + copy * 0, z, kept & (copy == 0))


def walked(value: Tensor, width: int) -> bool:
    """Whether rows of this shape are walked in time, not split or computed side by side."""
    settings = settings_of(value.dtype, width)
    n_head, channels = value.shape[2:]
    programs = n_head * -(-channels // slab_of(settings, width, channels))
    short, segment = form_of(value.shape[1], programs, width, settings)
    return not short and not segment


@functools.lru_cache(maxsize=1024)
def _plan(x, y, w, strides, settings, scale, eps, given):
    """Grid, numbers and constants of a launch, and a place for what was compiled for them."""
    (batch, length, n_head, channels), width = w, y[3]
    wide, slab = power_of_two(width, 16), slab_of(settings, width, channels)
    grid = (batch * n_head * -(-channels // slab), 1, 1)
    numbers = (length, -(-length // settings.CHUNK), n_head, width, channels, scale, eps, *strides)
    has_decay, fixed, has_initial, has_sum = given
    constants = settings._asdict() | {
        "X_SHARE": n_head // x[2], "Y_SHARE": n_head // y[2], "HAS_DECAY": has_decay,
        "FIXED": fixed, "HAS_INITIAL": has_initial, "HAS_SUM": has_sum, "WIDTH": wide,
        "SLAB": slab,
        "FULL": length % settings.CHUNK == 0 and width == wide and channels % slab == 0,
    }  # fmt: skip
    return grid, numbers, constants, {}


def walk(query, key, value, decays, initial, initial_sum, scale, eps):
    """Outputs, divisors without eps (batch, time, head), last state, last key sum."""
    batch, length, n_head, channels = value.shape
    width = key.shape[3]
    query, key, value = narrow(query, 1), narrow(key, 1), narrow(value, 1)
    out = value.new_empty(value.shape)
    divisor, final, final_sum = (
        value.new_empty(shape, dtype=torch.float32)
        for shape in ((batch, length, n_head), (batch, n_head, width, channels),
                      (batch, n_head, width))
    )  # fmt: skip
    fixed = decays is not None and decays.fixed is not None
    strides = (
        *query.stride(), *key.stride(), *value.stride(),
        *((0, 0, 0, 0) if initial is None else initial.stride()),
        *((0, 0, 0) if initial_sum is None else initial_sum.stride()),
    )  # fmt: skip
    given = decays is not None, fixed, initial is not None, initial_sum is not None
    plan = _plan(query.shape, key.shape, value.shape, strides, settings_of(value.dtype, width),
                 scale, eps, given)  # fmt: skip
    high = low = query
    if fixed:
        high = low = decays.fixed
    elif decays is not None:
        high, low = decays.cumulated
    tensors = (query, key, value, out, divisor, high, low, query if initial is None else initial,
               query if initial_sum is None else initial_sum, final, final_sum)  # fmt: skip
    start(normalised_kernel, plan[0], tensors, *plan[1:])
    return out, divisor, final, final_sum
