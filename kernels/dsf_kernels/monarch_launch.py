"""How the half-steps of monarch_attention are launched: tiles, room, their order."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import INTERPRETED, power_of_two
from dsf_kernels.monarch_gradients import left_gradient, right_gradient
from dsf_kernels.monarch_kernels import left_kernel, right_kernel, short_kernel
from dsf_kernels.monarch_wide import wide_left_kernel, wide_right_kernel

LEAST = 16  # rows of a matrix product
MAX_TILE = 128
"""The widest tile that is whole in the registers of one program; one step walks over wider ones,
forward."""
WARPS = {16: 1, 32: 2, 64: 4, 128: 4}
"""Warps by the side of the tile."""
SHORT = {"SIDE": 16, "ROWS": 64, "num_warps": 4, "num_stages": 1}
"""One step of at most SIDE blocks of SIDE places, ROWS tokens at once."""
SHORT_LAUNCHES = 1
GRADIENT_WARPS = {16: 1, 32: 4, 64: 4, 128: 8}
EXACT_WARPS = {16: 4, 32: 8, 64: 8, 128: 8}
WIDE = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 2}
EXACT_WIDE = {"ROWS": 16, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}
"""The same where a tile is walked over."""
ROWS, GRADIENT_ROWS, EXACT_ROWS, EXACT_SHORT = 64, 32, 16, 32
"""Rows of a tile at once. EXACT: products in float32, outside the matrix units."""


def tile_settings(side: int, widths: tuple[int, int], dtype: torch.dtype, gradient: bool) -> dict:
    """Compile-time settings of a tile of `side` places or blocks."""
    exact = dtype == torch.float32 or INTERPRETED
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    size = power_of_two(side, LEAST)
    rows, warps = (GRADIENT_ROWS, GRADIENT_WARPS) if gradient else (ROWS, WARPS)
    if exact:
        rows, warps = EXACT_ROWS, EXACT_WARPS
    return {
        "COMPUTE": tl.float32 if exact else types[dtype], "PRECISION": "ieee",
        "WIDTH": power_of_two(widths[0], LEAST), "CHANNELS": power_of_two(widths[1], LEAST),
        "ROWS": min(size, rows), "num_warps": warps[size], "num_stages": 1,
    }  # fmt: skip


class Step(NamedTuple):
    """What one step keeps: abar, None for the first, the means of queries (lane, block, place,
    width) and their sums of weights; of the blocks, means, mixed (lane, place, block, ...) and
    entropy (lane, place, block)."""

    abar: tuple[Tensor, Tensor] | None
    means: Tensor
    entropy: Tensor
    mixed: Tensor


class Monarch:
    """The launches of one call, and the sizes they share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, block: int,
                 steps: int, before: bool, scale: float):  # fmt: skip
        self.query, self.key, self.value, self.steps = query, key, value, steps
        self.mask = None if mask is None else mask.view(torch.uint8)
        batch, self.length, self.head, self.width = query.shape
        self.channels, self.scale = value.shape[3], scale
        self.block, self.n_block = block, -(-self.length // block)
        front = self.n_block * block - self.length if before else 0
        self.grid = (self.length, block, self.n_block, front, self.head)
        self.lanes = batch * self.head
        self.masked = (0, 0) if self.mask is None else self.mask.stride()

    def room(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty tensor, a row a lane."""
        return self.value.new_empty((self.lanes, *shape), dtype=dtype)

    def _tiles(self, side: int, gradient: bool = False) -> dict:
        return tile_settings(side, (self.width, self.channels), self.value.dtype, gradient)

    def _right_tiles(self, first: bool, last: bool, gradient: bool = False) -> dict:
        side = power_of_two(self.block, LEAST)
        return {
            "FIRST": first, "LAST": last, "HAS_MASK": self.mask is not None, "B": side,
        } | self._tiles(side, gradient)  # fmt: skip

    def _left_tiles(self, last: bool, gradient: bool = False) -> dict:
        side = power_of_two(self.n_block, LEAST)
        return {
            "LAST": last, "HAS_MASK": self.mask is not None, "M": side,
        } | self._tiles(side, gradient)  # fmt: skip

    def right(self, abar: tuple[Tensor, Tensor] | None, last: bool) -> Step:
        """One update of the right factor."""
        b, m, dtype = self.block, self.n_block, self.value.dtype
        means, entropy = self.room(b, m, self.width, dtype=dtype), self.room(b, m)
        mixed = self.room(b, m, self.channels, dtype=dtype) if last else means
        query, key, value = self.query, self.key, self.value
        right_kernel[(self.lanes * m,)](
            query, key, value, _or(self.mask, query), abar[0] if abar else query,
            means, entropy, mixed,
            *self.grid, self.head // key.shape[2], self.width, self.channels, self.scale,
            *query.stride(), *key.stride(), *value.stride(), *self.masked,
            **self._right_tiles(abar is None, last),
        )  # fmt: skip
        return Step(abar, means, entropy, mixed)

    def left(self, step: Step, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """One update of the left factor: `out` filled, or without it the next abar."""
        query, shape = self.query, (self.n_block, self.block)
        abar = (step.entropy, step.entropy)
        if out is None:
            abar = self.room(*shape, self.width, dtype=query.dtype), self.room(*shape)
        left_kernel[(self.lanes * self.block,)](
            query, _or(self.mask, query), *step[1:], *abar, _or(out, query),
            *self.grid, self.width, self.channels,
            *query.stride(), *_or(out, query).stride(), *self.masked,
            **self._left_tiles(out is not None),
        )  # fmt: skip
        return abar

    def forward(self, out: Tensor | None) -> list[Step]:
        """All steps; `out` None leaves out the last launch, which the gradients do not need."""
        found: list[Step] = []
        abar = None
        side = max(self.grid[1:3])
        if self.steps == 1 and out is not None and not SHORT["SIDE"] < side <= MAX_TILE:
            (self._wide if side > MAX_TILE else self._short)(out)
            return found
        for n in range(self.steps):
            last = n == self.steps - 1
            found.append(self.right(abar, last))
            if not last or out is not None:
                abar = self.left(found[-1], out if last else None)
        return found

    def _short(self, out: Tensor) -> None:
        tiles = self._tiles(SHORT["SIDE"]) | SHORT
        if tiles["COMPUTE"] == tl.float32:
            tiles["ROWS"] = EXACT_SHORT
        query, key, value, between = self.query, self.key, self.value, self._between()
        parts = (
            1 if SHORT_LAUNCHES == 1 else -(-max(self.grid[1:3]) * tiles["SIDE"] // tiles["ROWS"])
        )
        for right, left in ((True, True),) if parts == 1 else ((True, False), (False, True)):
            short_kernel[(self.lanes * parts,)](
                query, key, value, _or(self.mask, query), *between, out, *self.grid,
                self.head // key.shape[2], self.width, self.channels, self.scale, parts,
                *query.stride(), *key.stride(), *value.stride(), *out.stride(), *self.masked,
                RIGHT=right, LEFT=left, HAS_MASK=self.mask is not None, **tiles,
            )  # fmt: skip

    def _wide(self, out: Tensor) -> None:
        b, m, query, key, value = self.block, self.n_block, self.query, self.key, self.value
        tiles = self._tiles(LEAST)
        tiles |= EXACT_WIDE if tiles["COMPUTE"] == tl.float32 else WIDE
        between, rows = self._between(), tiles["ROWS"]
        wide_right_kernel[(self.lanes * m * -(-b // rows),)](
            query, key, value, _or(self.mask, query), *between, *self.grid,
            self.head // key.shape[2], self.width, self.channels, self.scale,
            *query.stride(), *key.stride(), *value.stride(), *self.masked,
            HAS_MASK=self.mask is not None, **tiles,
        )  # fmt: skip
        wide_left_kernel[(self.lanes * b * -(-m // rows),)](
            query, *between, out, *self.grid, self.width, self.channels, *query.stride(),
            *out.stride(), **tiles,
        )  # fmt: skip

    def _between(self) -> tuple[Tensor, Tensor, Tensor]:
        """Room for means, entropy and mixed of the only step."""
        shape, dtype = (self.block, self.n_block), self.value.dtype
        return (
            self.room(*shape, self.width, dtype=dtype),
            self.room(*shape),
            self.room(*shape, self.channels, dtype=dtype),
        )

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, of key, a head each, and of value."""
        kept, dtype = self.forward(None), self.value.dtype
        sum_query, shape = self.room(self.length, self.width), self.query.shape
        sum_key, grad_abar = sum_query, None
        grad_value = torch.empty(self.value.shape, dtype=dtype, device=grad.device)
        grad_query = torch.empty(shape, dtype=dtype, device=grad.device)
        for n in reversed(range(self.steps)):
            last = n == self.steps - 1
            abar = kept[n + 1].abar if not last else None
            moved = self._left_gradient(kept[n], abar, grad, grad_abar, sum_query)
            grad_key = self.room(self.length, self.width)
            if n == 0 and self.key.shape[2] == self.head:
                grad_key = torch.empty(shape, dtype=dtype, device=grad.device)
            grad_abar = self._right_gradient(
                kept[n].abar, moved, sum_query, sum_key, (grad_query, grad_key, grad_value), last
            )
            sum_key = grad_key
        return grad_query, sum_key.view(shape), grad_value

    def _left_gradient(self, step: Step, abar: tuple[Tensor, Tensor] | None, grad: Tensor,
                       grad_abar: Tensor | None, sum_query: Tensor) -> list[Tensor]:  # fmt: skip
        b, m, query = self.block, self.n_block, self.query
        moved = [self.room(b, m, self.width), self.room(b, m)]
        moved.append(self.room(b, m, self.channels) if abar is None else moved[0])
        left_gradient[(self.lanes * b,)](
            query, _or(self.mask, query), *step[1:], *(abar or (query, query)), grad,
            _or(grad_abar, grad), sum_query, *moved, *self.grid, self.width, self.channels,
            *query.stride(), *grad.stride(), *self.masked,
            **self._left_tiles(abar is None, True),
        )  # fmt: skip
        return moved

    def _right_gradient(
        self, abar: tuple[Tensor, Tensor] | None, moved: list[Tensor], sum_query: Tensor,
        sum_key: Tensor, found: tuple[Tensor, ...], last: bool,
    ) -> Tensor | None:  # fmt: skip
        query, key, value = self.query, self.key, self.value
        b, m = self.block, self.n_block
        grad_abar = None if abar is None else self.room(m, b, self.width)
        right_gradient[(self.lanes * m,)](
            query, key, value, _or(self.mask, query), abar[0] if abar else query,
            *moved, sum_query, sum_key, *found, _or(grad_abar, sum_query),
            *self.grid, self.head // key.shape[2], self.width, self.channels, self.scale,
            *query.stride(), *key.stride(), *value.stride(), *self.masked,
            **self._right_tiles(abar is None, last, True),
        )  # fmt: skip
        return grad_abar


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor
