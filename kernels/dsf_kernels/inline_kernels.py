"""InLine's outputs from the three sums, row by row; forward and backward.

y_t = g_t (n_t - d_t m_t) + m_t,    n = q S, d = q z, m = w / t, the mean of the values
dn = g dy,   dd = -g (dy . m),   dm = (1 - g d) dy
"""

import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import on_device
from dsf_kernels.normalised_kernels import tile_of, tiles
from dsf_kernels.operators import operator


@triton.jit
def factor(row, length, n_head, count, scale, OVER_COUNT: tl.constexpr):
    """g of each row."""
    g = tl.zeros(row.shape, tl.float32) + scale
    if OVER_COUNT:
        g = g / (row // n_head % length + 1 + count).to(tl.float32)
    return g


@triton.jit(do_not_specialize=["n_row", "length", "count"])
def subtract_kernel(numerator, key_sum, mean, out, n_row, channels, length, n_head, count, scale,
                    OVER_COUNT: tl.constexpr, ROWS: tl.constexpr,
                    WIDTH: tl.constexpr):  # fmt: skip
    """y of the head of this file."""
    row, known, place, inside = tile_of(n_row, channels, ROWS, WIDTH)
    g = factor(row, length, n_head, count, scale, OVER_COUNT)[:, None]
    d = tl.load(key_sum + row, known, other=0.0)[:, None]
    n = tl.load(numerator + place, inside, other=0.0).to(tl.float32)
    m = tl.load(mean + place, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (g * (n - d * m) + m).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["n_row", "length", "count"])
def subtract_adjoint_kernel(key_sum, mean, grad, grad_numerator, grad_key_sum, grad_mean,
                            n_row, channels, length, n_head, count, scale,
                            OVER_COUNT: tl.constexpr, ROWS: tl.constexpr,
                            WIDTH: tl.constexpr):  # fmt: skip
    """dn, dd, dm of the head of this file."""
    row, known, place, inside = tile_of(n_row, channels, ROWS, WIDTH)
    g = factor(row, length, n_head, count, scale, OVER_COUNT)
    d = tl.load(key_sum + row, known, other=0.0)
    m = tl.load(mean + place, inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + place, inside, other=0.0).to(tl.float32)
    tl.store(grad_key_sum + row, -g * tl.sum(dy * m, 1), known)
    dn = g[:, None] * dy
    tl.store(grad_numerator + place, dn.to(grad_numerator.dtype.element_ty), inside)
    dm = (1.0 - g * d)[:, None] * dy
    tl.store(grad_mean + place, dm.to(grad_mean.dtype.element_ty), inside)


def _run(
    numerator: Tensor, key_sum: Tensor, mean: Tensor, count: int, scale: float, over_count: bool
) -> Tensor:
    out = numerator.new_empty(numerator.shape)
    if out.numel():
        grid, sizes, tile = tiles(out)
        with on_device(out):
            subtract_kernel[grid](
                numerator.contiguous(), key_sum.contiguous(), mean.contiguous(), out, *sizes,
                *out.shape[1:3], count, scale, OVER_COUNT=over_count, **tile,
            )  # fmt: skip
    return out


def _fake(numerator, key_sum, mean, count, scale, over_count):
    return numerator.new_empty(numerator.shape)


def _run_adjoint(
    key_sum: Tensor, mean: Tensor, grad: Tensor, count: int, scale: float, over_count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_numerator, grad_mean = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    grad_key_sum = key_sum.new_empty(key_sum.shape)
    if mean.numel():
        grid, sizes, tile = tiles(mean)
        with on_device(mean):
            subtract_adjoint_kernel[grid](
                key_sum.contiguous(), mean.contiguous(), grad.contiguous(), grad_numerator,
                grad_key_sum, grad_mean, *sizes, *mean.shape[1:3], count, scale,
                OVER_COUNT=over_count, **tile,
            )  # fmt: skip
    return grad_numerator, grad_key_sum, grad_mean


def _fake_adjoint(key_sum, mean, grad, count, scale, over_count):
    shape = mean.shape
    return mean.new_empty(shape), key_sum.new_empty(key_sum.shape), mean.new_empty(shape)


subtract_mean_adjoint = operator("subtract_mean_adjoint", _run_adjoint, _fake_adjoint)


def _backward(ctx, grad):
    _, key_sum, mean = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    return *subtract_mean_adjoint(key_sum, mean, grad, *ctx.rest), None, None, None


subtract_mean = operator("subtract_mean", _run, _fake, _backward)
"""(n (batch, time, head, channel), d (batch, time, head) float32, m like n, tokens before, scale,
whether g_t = scale / t) -> y."""
