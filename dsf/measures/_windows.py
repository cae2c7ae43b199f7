"""Which keys lie near a query: along a line, or in a window of an image."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.measures._maps import MapSource


@dataclasses.dataclass(frozen=True)
class Window:
    """Keys within `size` of a query.

    On a line: causal j = t-size+1..t, anticausal j = t..t+size-1, else |t - j| <= (size-1)/2. On
    a grid (rows, columns) of patches in raster order: `size` x `size` patches around the query's,
    cut at the border. With a class token, at position 0, patches start at 1; it has no window and
    lies in none.
    """

    size: int
    direction: str
    grid: tuple[int, int] | None = None
    class_token: bool = False

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        """(query, key), True for the keys in each query's window."""
        q, k = query[:, None] - int(self.class_token), key - int(self.class_token)
        half = (self.size - 1) // 2
        if self.grid is not None:
            across = self.grid[1]
            rows = torch.div(q, across, rounding_mode="floor") - torch.div(
                k, across, rounding_mode="floor")  # fmt: skip
            near = (rows.abs() <= half) & ((q % across - k % across).abs() <= half)
        elif self.direction == "bidirectional":
            near = (q - k).abs() <= half
        else:
            lag = q - k if self.direction == "causal" else k - q
            near = (lag >= 0) & (lag < self.size)
        return near & (q >= 0) & (k >= 0)

    def has_one(self, query: Tensor) -> Tensor:
        """Which queries have a window at all: every patch."""
        return query >= int(self.class_token)

    @property
    def border(self) -> str:
        """What happens at the edge, for attrs."""
        return "cut: fewer keys at the border"


def make_window(
    name: str, source: MapSource, size: int, grid: tuple[int, int] | None, class_token: bool
) -> Window:
    """Checked. Raises DsfValueError on an even window around a query, or a grid that is not it."""
    direction = source.attrs["direction"]
    around = grid is not None or direction == "bidirectional"
    if size < 1 or (around and size % 2 == 0):
        odd = ", odd since the query is in the middle" if around else ""
        raise DsfValueError(f"{name}: window: expected at least 1{odd}, got {size}.")
    length = int(max((int(p.max()) + 1 for p in source.positions if len(p)), default=0))
    patches = length - int(class_token)
    if grid is not None and grid[0] * grid[1] != patches:
        raise DsfValueError(
            f"{name}: grid: expected rows x columns = {patches} patches (class_token="
            f"{class_token}), got {grid[0]} x {grid[1]}; their number is fixed by system."
        )
    return Window(size, direction, grid, class_token)
