"""Rows of a depthwise convolution over grids of patches, whatever order the patches come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dsf.mixing_rows import MixingRows
from dsf.shapes import Inexact
from dsf.transitions._base import register, static


@register
@dataclasses.dataclass(frozen=True)
class GridRows(MixingRows):
    """Every channel a head: its row at a patch holds the channel's taps at the patch's neighbours.

        M_tj = weight[channel, dy + kernel//2, dx + kernel//2],   (dy, dx) = place_j - place_t

    for patches t, j of one frame with |dy|, |dx| <= kernel//2, and zero otherwise: a correlation
    with zeros beyond the border, as torch's Conv2d. weight (channel, kernel, kernel) with an odd
    kernel. `grids` are (frames, rows, columns) of images and videos one behind another; within a
    frame blocks of merge x merge patches stand together, blocks and patches in reading order.
    Rows `query_start` and on, `n_row` of them. `mix` takes O(query x kernel^2) a channel, a tile
    what it holds.
    """

    weight: Tensor
    grids: tuple[tuple[int, int, int], ...] = static()
    merge: int = static()
    n_row: int = static()
    query_start: int = static(default=0)

    causal = False

    @classmethod
    def of(cls, weight: Tensor, grids: Sequence[Sequence[int]], merge: int = 1) -> GridRows:
        """A row for every patch."""
        sizes = tuple((int(t), int(y), int(x)) for t, y, x in grids)
        return cls(weight, sizes, merge, sum(t * y * x for t, y, x in sizes))

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of every patch, (key,) each."""
        found, frames = [], 0
        for time, height, width in self.grids:
            axes = (time, height // self.merge, width // self.merge, self.merge, self.merge)
            t, block_row, block_column, row, column = (
                torch.arange(n, device=self.weight.device).view(
                    [-1 if i == axis else 1 for i in range(5)]
                )
                for axis, n in enumerate(axes)
            )
            rows, columns = block_row * self.merge + row, block_column * self.merge + column
            found.append([part.expand(axes).flatten() for part in (frames + t, rows, columns)])
            frames += time
        if not found:
            none = torch.zeros(0, dtype=torch.long, device=self.weight.device)
            return none, none, none
        frame, row, column = (torch.cat(parts) for parts in zip(*found, strict=True))
        return frame, row, column

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        return torch.Size((1, self.n_row, self.weight.shape[0], 1, self.patches))

    @property
    def patches(self) -> int:
        """Number of patches, the columns of the map."""
        return sum(t * y * x for t, y, x in self.grids)

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """The taps between some patches and others."""
        at = range(*queries.indices(self.n_row))
        read = slice(self.query_start + at.start, self.query_start + at.stop)
        half = self.weight.shape[1] // 2
        frame, row, column = self.places()
        dy, dx = (x[None, keys] - x[read, None] for x in (row, column))
        near = (dy.abs() <= half) & (dx.abs() <= half)
        near &= frame[None, keys] == frame[read, None]
        taps = self.weight[:, dy.clamp(-half, half) + half, dx.clamp(-half, half) + half]
        return (taps * near)[None]

    def time_slice(self, start: int, stop: int) -> GridRows:
        """The rows of steps start..stop-1 over the same patches."""
        return dataclasses.replace(self, n_row=stop - start, query_start=self.query_start + start)

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """Every patch's neighbours, looked up tap by tap."""
        half, patches = self.weight.shape[1] // 2, self.patches
        frame, row, column = self.places()
        read = slice(self.query_start, self.query_start + self.n_row)
        dtype = torch.promote_types(values.dtype, self.weight.dtype)
        shape = torch.broadcast_shapes(values.shape[:2], (1, self.weight.shape[0]))
        y = values.new_zeros(*shape, self.n_row, values.shape[3], dtype=dtype)
        if not patches:
            return y
        wide, high = (int(x.max()) + 1 + 2 * half for x in (column, row))
        code = (frame * high + row + half) * wide + column + half
        table = code.new_full((int(code.max()) + 1 + half * (wide + 1),), patches)
        table[code] = torch.arange(patches, device=code.device)
        padded = torch.nn.functional.pad(values.to(dtype), (0, 0, 0, 1))  # beyond the border: zero
        for dy in range(-half, half + 1):
            for dx in range(-half, half + 1):
                neighbour = table[code[read] + dy * wide + dx]
                tap = self.weight[:, dy + half, dx + half, None, None]
                y = y + tap * padded[:, :, neighbour]
        return y

    def shape_faults(self) -> list[str]:
        """An odd square kernel, and grids of whole blocks."""
        size = tuple(self.weight.shape)
        if len(size) != 3 or size[1] != size[2] or size[1] % 2 == 0:
            return [f"C.weight: expected axes (channel, kernel, kernel), kernel odd, got {size}."]
        if any(y % self.merge or x % self.merge for _, y, x in self.grids):
            return [f"C.grids: expected rows and columns in blocks of {self.merge}, got "
                    f"{self.grids}."]  # fmt: skip
        return []
