"""A convolution of the values: taps per token in a shift register, 3 x 3 grids."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.algebra import parallel
from dsf.errors import DsfShapeError
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Shift


def register_recurrence(
    taps: Float[Tensor, "#batch #time head tap"], *, lead: int = 0
) -> Recurrence:
    """y_t = sum_i taps_t[i] u_(t - lead - i) as a register of lead + tap past values.

    The taps may change from token to token. A = shift, B = e_1, C_t = (0 .. 0, taps_t).
    """
    C = torch.nn.functional.pad(taps, (lead, 0))
    B = taps.new_zeros(1, 1, 1, C.shape[-1], 1)
    B[..., 0, 0] = 1
    return Recurrence(Shift(C.shape[-1]), B, C[..., None, :], gauge="register")


def with_register(attention: Recurrence, register: Recurrence) -> Recurrence:
    """The sum of both on the same values, labelled as the attention: A = blkdiag(A, shift)."""
    return parallel(attention, register).replace(
        system=attention.system, gauge=f"{attention.gauge}; register of past values"
    )


def convolved(
    values: Float[Tensor, "batch time channel"],
    taps: Float[Tensor, "#batch #time channel tap"],
    past: Float[Tensor, "batch past channel"] | None = None,
) -> Float[Tensor, "batch time channel"]:
    """sum_i taps_t[i] values_(t - i), zeros before the start or `past` (tap - 1 values)."""
    length, n = values.shape[1], taps.shape[-1]
    if past is None:
        past = values.new_zeros(values.shape[0], n - 1, values.shape[2])
    padded = torch.cat([past, values], dim=1)
    y = taps[..., 0] * values
    for lag in range(1, n):
        y = y + taps[..., lag] * padded[:, n - 1 - lag : n - 1 - lag + length]
    return y


def grid_taps(
    kernel: Float[Tensor, "batch channel 3 3"], side: int, class_token: bool
) -> tuple[Float[Tensor, "batch time channel behind"], Float[Tensor, "batch time channel ahead"]]:
    """A zero-padded 3 x 3 correlation in raster order: taps of lags 0..side+1 and of -1..-side-1.

    The neighbour (row + dy, column + dx) stands dy side + dx tokens later. A class token stands
    first, outside the grid: it gets nothing and gives nothing.
    """
    position = torch.arange(side * side, device=kernel.device)
    row, column = position // side, position % side
    shape = (kernel.shape[0], side * side, kernel.shape[1], side + 2)
    behind, ahead = kernel.new_zeros(shape), kernel.new_zeros(shape)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            inside = ((row + dy >= 0) & (row + dy < side) & (column + dx >= 0)
                      & (column + dx < side)).to(kernel.dtype)  # fmt: skip
            offset = dy * side + dx
            part = inside[:, None] * kernel[:, None, :, dy + 1, dx + 1]
            taps = ahead if offset > 0 else behind
            # added, not set: on a grid one wide several neighbours share an offset, all outside
            index = torch.tensor([abs(offset)], device=kernel.device)
            taps = taps.index_add(-1, index, part[..., None])
            behind, ahead = (behind, taps) if offset > 0 else (taps, ahead)
    if class_token:
        behind, ahead = (torch.nn.functional.pad(t, (0, 0, 0, 0, 1, 0)) for t in (behind, ahead))
    return behind, ahead[..., 1:]


def grid_convolved(
    values: Float[Tensor, "batch time channel"],
    kernel: Float[Tensor, "batch channel 3 3"],
    side: int,
    class_token: bool,
) -> Float[Tensor, "batch time channel"]:
    """The same correlation by conv2d, one kernel an image and channel."""
    start = int(class_token)
    check_grid(values.shape[1], side, class_token)
    batch, _, channel = values.shape
    if not side:
        return torch.zeros_like(values)
    grid = values[:, start:].mT.reshape(1, batch * channel, side, side)
    flat = kernel.reshape(batch * channel, 1, 3, 3)
    y = torch.nn.functional.conv2d(grid, flat, padding=1, groups=batch * channel)
    return torch.nn.functional.pad(y.reshape(batch, channel, -1).mT, (0, 0, start, 0))


def check_grid(length: int, side: int, class_token: bool) -> None:
    """Raise DsfShapeError unless the tokens fill the grid."""
    wanted = side * side + int(class_token)
    if length != wanted:
        raise DsfShapeError(
            f"dsf.InlineAttention: x: expected {side} x {side} patches and {int(class_token)} "
            f"class token, {wanted} tokens, got {length}."
        )
