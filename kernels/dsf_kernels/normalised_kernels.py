"""What turns a numerator and its divisor into outputs, row by row; forward and backward."""

import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import on_device, power_of_two
from dsf_kernels.operators import operator

TILE = 2048  # numbers of a program


@triton.jit
def tile_of(n_row, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of this program, which of them exist, places of their numbers, which of those exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = row < n_row
    return row, inside, row[:, None] * channels + column, inside[:, None] & (column < channels)


@triton.jit(do_not_specialize=["n_row"])
def divide_kernel(numerator, divisor, out, n_row, channels, eps,
                  ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """out = numerator / (divisor + eps), a sum of 0 counting as 1."""
    row, known, place, inside = tile_of(n_row, channels, ROWS, WIDTH)
    d = tl.load(divisor + row, known, other=1.0) + eps
    d = tl.where(d == 0.0, 1.0, d)
    n = tl.load(numerator + place, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (n / d[:, None]).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["n_row"])
def divide_adjoint_kernel(numerator, divisor, grad, grad_numerator, grad_divisor, n_row, channels,
                          eps, DIVIDED: tl.constexpr, ROWS: tl.constexpr,
                          WIDTH: tl.constexpr):  # fmt: skip
    """dn = dy / d, dd = -(dn . n) / d, 0 where d counted as 1; DIVIDED: n / d is given for n."""
    row, known, place, inside = tile_of(n_row, channels, ROWS, WIDTH)
    d = tl.load(divisor + row, known, other=1.0) + eps
    zero = d == 0.0
    d = tl.where(zero, 1.0, d)
    n = tl.load(numerator + place, inside, other=0.0).to(tl.float32)
    dn = tl.load(grad + place, inside, other=0.0).to(tl.float32) / d[:, None]
    tl.store(grad_numerator + place, dn.to(grad_numerator.dtype.element_ty), inside)
    if not DIVIDED:
        n = n / d[:, None]
    dd = tl.sum(dn * (0.0 - n), 1)
    tl.store(grad_divisor + row, tl.where(zero, 0.0, dd), known)


def tiles(like: Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """Grid, (rows, channels) and tile for a tensor (..., channel)."""
    channels = like.shape[-1]
    n_row = like.numel() // channels
    width = power_of_two(channels)
    rows = max(1, TILE // width)
    return (-(-n_row // rows),), (n_row, channels), {"ROWS": rows, "WIDTH": width}


def _run(numerator: Tensor, divisor: Tensor, eps: float) -> Tensor:
    out = numerator.new_empty(numerator.shape)
    if out.numel():
        grid, sizes, tile = tiles(out)
        with on_device(out):
            divide_kernel[grid](
                numerator.contiguous(), divisor.contiguous(), out, *sizes, eps, **tile
            )
    return out


def _fake(numerator, divisor, eps):
    return numerator.new_empty(numerator.shape)


def _run_adjoint(
    numerator: Tensor, divisor: Tensor, grad: Tensor, eps: float, divided: bool
) -> tuple[Tensor, Tensor]:
    grad_numerator = numerator.new_empty(numerator.shape)
    grad_divisor = divisor.new_empty(divisor.shape)
    if grad_numerator.numel():
        grid, sizes, tile = tiles(grad_numerator)
        with on_device(grad):
            divide_adjoint_kernel[grid](
                numerator.contiguous(), divisor.contiguous(), grad.contiguous(), grad_numerator,
                grad_divisor, *sizes, eps, DIVIDED=divided, **tile,
            )  # fmt: skip
    return grad_numerator, grad_divisor


def _fake_adjoint(numerator, divisor, grad, eps, divided):
    return numerator.new_empty(numerator.shape), divisor.new_empty(divisor.shape)


divide_rows_adjoint = operator("divide_rows_adjoint", _run_adjoint, _fake_adjoint)
"""(n, or y where divided; divisor, dy, eps, divided) -> dn, d divisor."""


def _backward(ctx, grad):
    numerator, divisor = ctx.saved_tensors
    if grad is None:
        return None, None, None
    return *divide_rows_adjoint(numerator, divisor, grad, ctx.rest[0], False), None


divide_rows = operator("divide_rows", _run, _fake, _backward)
"""(numerator (..., channel), divisor (...) float32, eps) -> numerator / (divisor + eps)."""
