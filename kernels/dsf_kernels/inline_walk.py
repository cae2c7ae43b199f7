"""The walk of chunk_kernel for InLine attention: a chunk's weights, whole, times its values.

    y_i = sum_{j <= i} (g_i x_i . y_j + o_i) w_j + g_i x_i h + o_i u,   o_i = (1 - g_i d_i) / t_i

d_i = x_i z_i as in normalised_walk; h, z and u, the sums of the tokens before the chunk, are
float32, and nothing is rounded before the sum but the weights. One launch, every input read once;
for the shapes that are walked (scalar_decay_launch.form_of).
"""

import functools

import torch
import triton
import triton.language as tl

from dsf_kernels.chunks import cells, entering, owned, rows
from dsf_kernels.launch import narrow, power_of_two
from dsf_kernels.normalised_walk import COPIES
from dsf_kernels.scalar_decay_launch import settings_of, slab_of, start


@triton.jit(do_not_specialize=["count", "length", "n_chunk"])
def inline_kernel(x, y, w, out, divisor, initial, initial_sum, initial_values, final, final_sum,
                  final_values, count, length, n_chunk, n_head, width, channels, scale,
                  x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                  i_b, i_h, i_n, i_p, s_b, s_h, s_n, v_b, v_h, v_p,
                  X_SHARE: tl.constexpr, Y_SHARE: tl.constexpr, OVER_COUNT: tl.constexpr,
                  HAS_INITIAL: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                  COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                  WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """A program owns one head and one slab of channels; the first slab's stores d and z."""
    slab, lane, batch, head, offset = owned(tl.cdiv(channels, SLAB), n_head, SLAB)
    x += batch * x_b + head // X_SHARE * x_h
    y += batch * y_b + head // Y_SHARE * y_h
    w += batch * w_b + head * w_h
    out += (batch * length * n_head + head) * channels
    divisor += batch * length * n_head + head
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    copy = tl.arange(0, COPIES)[None, :]
    kept = (row < width) & (copy >= 0)
    channel = offset + tl.arange(0, SLAB)
    h = entering(initial + batch * i_b + head * i_h, row, column, inside, i_n, i_p, HAS_INITIAL)
    sums = initial_sum + batch * s_b + head * s_h
    z = entering(sums, row, copy * 0, kept, s_n, s_n, HAS_INITIAL)
    if HAS_INITIAL:
        source = initial_values + batch * v_b + head * v_h + channel * v_p
        u = tl.load(source, channel < channels, other=0.0).to(tl.float32)
    else:
        u = tl.zeros([SLAB], tl.float32)
    i = tl.arange(0, CHUNK)
    pair = i[:, None] >= i[None, :]
    ones = tl.full([CHUNK, COPIES], 1.0, COMPUTE)
    for chunk in tl.range(0, n_chunk, num_stages=STAGES):
        first = chunk * CHUNK
        ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        between = tl.dot(xs, h.to(COMPUTE), input_precision=PRECISION)
        score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
        score = tl.where(pair, score, 0.0)
        high = z.to(COMPUTE)
        rest = tl.where(copy == 1, z - high.to(tl.float32), 0.0).to(COMPUTE)
        parts = tl.where(copy == 0, high, rest)
        d = tl.sum(tl.dot(xs, parts, input_precision=PRECISION), 1) + tl.sum(score, 1)
        t = (count + first + i + 1).to(tl.float32)
        g = scale / t if OVER_COUNT else scale + t * 0.0
        own = (1.0 - g * d) / t
        known = first + i < length
        token = (first + i).to(tl.int64) * n_head
        if slab == 0:
            tl.store(divisor + token, d, known)
        weight = tl.where(pair, g[:, None] * score + own[:, None], 0.0).to(COMPUTE)
        between = g[:, None] * between + own[:, None] * u[None, :]
        result = tl.dot(weight, ws, between, input_precision=PRECISION)
        result = result.to(out.dtype.element_ty)
        place = out + token[:, None] * channels + column
        if FULL:
            tl.store(place, result)
        else:
            tl.store(place, result, known[:, None] & (column < channels))
        h = tl.dot(tl.trans(ys), ws, h, input_precision=PRECISION)
        z = tl.dot(tl.trans(ys), ones, z, input_precision=PRECISION)
        u += tl.sum(ws.to(tl.float32), 0)
    tl.store(final + (lane * width + row) * channels + column, h, inside)
    tl.store(final_values + lane * channels + channel, u, channel < channels)
    if slab == 0:
        tl.store(final_sum + lane * width + row + copy * 0, z, kept & (copy == 0))


@functools.lru_cache(maxsize=1024)
def _plan(x, y, w, strides, settings, scale, over_count, has_initial):
    """Grid, numbers and constants of a launch, and a place for what was compiled for them."""
    (batch, length, n_head, channels), width = w, y[3]
    wide, slab = power_of_two(width, 16), slab_of(settings, width, channels)
    grid = (batch * n_head * -(-channels // slab), 1, 1)
    numbers = (length, -(-length // settings.CHUNK), n_head, width, channels, scale, *strides)
    constants = settings._asdict() | {
        "X_SHARE": n_head // x[2], "Y_SHARE": n_head // y[2], "OVER_COUNT": over_count,
        "HAS_INITIAL": has_initial, "WIDTH": wide, "SLAB": slab,
        "FULL": length % settings.CHUNK == 0 and width == wide and channels % slab == 0,
    }  # fmt: skip
    return grid, numbers, constants, {}


def walk(query, key, value, sums, count, scale, over_count):
    """Outputs, q z (batch, time, head), and the last three sums; sums: the first ones, or None."""
    batch, length, n_head, channels = value.shape
    width = key.shape[3]
    query, key, value = narrow(query, 1), narrow(key, 1), narrow(value, 1)
    out = value.new_empty(value.shape)
    shapes = ((batch, length, n_head), (batch, n_head, width, channels), (batch, n_head, width),
              (batch, n_head, channels))  # fmt: skip
    divisor, state, key_sum, value_sum = (
        value.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
    starts = (query,) * 3 if sums is None else sums
    none = (0,) * 10
    steps = none if sums is None else tuple(step for t in sums for step in t.stride())
    strides = (*query.stride(), *key.stride(), *value.stride(), *steps)
    grid, numbers, constants, built = _plan(
        query.shape, key.shape, value.shape, strides, settings_of(value.dtype, width), scale,
        over_count, sums is not None,
    )  # fmt: skip
    tensors = (query, key, value, out, divisor, *starts, state, key_sum, value_sum)
    start(inline_kernel, grid, tensors, (count, *numbers), constants, built)
    return out, divisor, state, key_sum, value_sum
