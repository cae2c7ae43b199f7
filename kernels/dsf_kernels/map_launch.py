"""How the kernels of maps are launched: tiles by a written rule, three families of maps.

Positions are those of the sequence; `row_0` and `col_0` start the rows and columns asked for.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.diagonal_decay_launch import CHUNK, Chunks, exact_products
from dsf_kernels.launch import INTERPRETED, narrow, power_of_two
from dsf_kernels.map_diagonal_kernels import diagonal_statistics_kernel, diagonal_tiles_kernel
from dsf_kernels.map_kernels import (
    linear_statistics_kernel,
    linear_tiles_kernel,
    running_kernel,
)
from dsf_kernels.map_softmax_kernels import softmax_rows_kernel, softmax_tiles_kernel

TILES = {
    False: {"ROWS": 64, "COLUMNS": 64, "SLAB": 128, "num_warps": 4},
    True: {"ROWS": 64, "COLUMNS": 64, "SLAB": 16, "num_warps": 8},
}
"""By whether the products are of float32. None spills for sm_90, 128 x 128 tiles do."""
STATISTICS = {
    False: {"ROWS": 64, "COLUMNS": 64, "SLAB": 128, "num_warps": 8},
    True: {"ROWS": 64, "COLUMNS": 64, "SLAB": 16, "num_warps": 8},
}
DIAGONAL = {"num_warps": 8}
RUNNING = {"CHUNK": 512, "HEADS": 4, "num_warps": 8}
if INTERPRETED:
    _SMALL = {"ROWS": 16, "COLUMNS": 16, "SLAB": 16, "num_warps": 4}
    TILES = STATISTICS = {False: _SMALL, True: _SMALL}
    RUNNING = {"CHUNK": 8, "HEADS": 2, "num_warps": 4}
PROGRAMS = 2048
"""Programs that fill a GPU several times: rows are cut into spans until there are as many."""
BINS = 64
NAMES = ("sum", "squares", "negative", "absolute", "log_moment", "maximum")
"""Statistics in the order in which `put_sums` stores them."""


class Block(NamedTuple):
    """Rows and columns of a map: first and number of each."""

    row_0: int
    n_row: int
    col_0: int
    n_col: int


def products_of(query: Tensor) -> dict:
    """Type and precision of the products."""
    exact = query.dtype == torch.float32 or INTERPRETED
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {"COMPUTE": tl.float32 if exact else kind[query.dtype], "PRECISION": "ieee"}


def _tiles(table: dict, query: Tensor) -> dict:
    tiles, wide = dict(table[query.dtype == torch.float32]), power_of_two(query.shape[3], 16)
    if wide > tiles["SLAB"]:
        tiles["num_warps"] = 8
    return tiles | {"SLAB": min(tiles["SLAB"], wide), "WIDTH": wide}


def _span(blocks: int, programs: int) -> int:
    """Blocks of columns that one program makes when `programs` of them have all columns."""
    return -(-blocks // min(blocks, max(1, -(-PROGRAMS // programs))))


def _grid(lanes: int, rows: int, columns: int, span: int) -> tuple[int]:
    return (lanes * rows * -(-columns // span),)


def running(log_decay: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """g (batch, head, time) from the first step on, high and low; `like` twice for no decay."""
    if log_decay is None:
        return like, like
    batch, length, n_head = log_decay.shape
    high, low = log_decay.new_empty((2, batch, n_head, length), dtype=torch.float32)
    tiles = dict(RUNNING)
    heads = tiles["HEADS"] = min(tiles["HEADS"], power_of_two(n_head))
    running_kernel[(batch * -(-n_head // heads),)](
        log_decay, high, low, length, n_head, *log_decay.stride(), **tiles
    )
    return high, low


def _places(query: Tensor, key: Tensor, tiles: dict, block: Block, causal: bool) -> bool:
    """Whether every tile of rows, states and keys is whole."""
    keys = block.n_col % tiles["COLUMNS"] == 0
    if causal:
        keys = keys and (block.row_0 - block.col_0) % tiles["COLUMNS"] == 0
    return keys and block.n_row % tiles["ROWS"] == 0 and query.shape[3] == tiles["WIDTH"]


# -- no decay, or one a head -------------------------------------------------------------------


def linear_tiles(query: Tensor, key: Tensor, log_decay: Tensor | None, out: Tensor, block: Block,
                 scale: float) -> None:  # fmt: skip
    batch, n_head = out.shape[:2]
    length, tiles = key.shape[1], _tiles(TILES, query)
    rows, columns = -(-block.n_row // tiles["ROWS"]), -(-block.n_col // tiles["COLUMNS"])
    span = _span(columns, batch * n_head * rows)
    query, key = narrow(query, 1), narrow(key, 1)
    linear_tiles_kernel[_grid(batch * n_head, rows, columns, span)](
        query, key, *running(log_decay, query), out, *block, block.n_col, span,
        length, n_head, n_head // query.shape[2], n_head // key.shape[2], key.shape[3], scale,
        *query.stride(), *key.stride(), DECAY=log_decay is not None,
        FULL=_places(query, key, tiles, block, True), **products_of(query), **tiles,
    )  # fmt: skip


def linear_statistics(query: Tensor, key: Tensor, log_decay: Tensor | None, edges: Tensor,
                      found: Tensor, mass: Tensor, block: Block,
                      scale: float) -> None:  # fmt: skip
    _, batch, n_head, _ = found.shape
    length, tiles = key.shape[1], _tiles(STATISTICS, query)
    query, key = narrow(query, 1), narrow(key, 1)
    linear_statistics_kernel[(batch * n_head * -(-block.n_row // tiles["ROWS"]),)](
        query, key, *running(log_decay, query), edges, found, mass, block.row_0, block.n_row,
        found[0].numel(), mass.shape[3], length, n_head, n_head // query.shape[2],
        n_head // key.shape[2], key.shape[3], scale, *query.stride(), *key.stride(),
        DECAY=log_decay is not None, FULL=_places(query, key, tiles, block, True),
        BINS=_bins(mass), **products_of(query), **tiles,
    )  # fmt: skip


def _bins(mass: Tensor) -> int:
    """Bins in registers: 1 for none asked."""
    return power_of_two(mass.shape[3], 2) if mass.shape[3] else 1


# -- softmax -----------------------------------------------------------------------------------


def _softmax(query, key, bias, scale, causal) -> tuple[list, dict]:
    """Arguments that both kernels end with, and their constants."""
    steps = (0, 0, 0, 0) if bias is None else bias.stride()
    sizes = [query.shape[1], key.shape[1], query.shape[2], query.shape[2] // key.shape[2]]
    rest = [*sizes, key.shape[3], scale, *query.stride(), *key.stride(), *steps]
    return rest, {"CAUSAL": causal, "BIAS": bias is not None, **products_of(query)}


def softmax_rows(query: Tensor, key: Tensor, bias: Tensor | None, edges: Tensor, peak: Tensor,
                 found: Tensor, mass: Tensor, block: Block, scale: float, causal: bool,
                 statistics: bool) -> None:  # fmt: skip
    """Maximum and sum of each row into `peak`, or the statistics into `found` and `mass`."""
    tiles = _tiles(STATISTICS, query)
    if statistics and bias is not None:
        tiles["ROWS"] = min(32, tiles["ROWS"])  # 64 spill
    query, key = narrow(query, 1), narrow(key, 1)
    bias = bias if bias is None else narrow(bias, 2)
    rest, constants = _softmax(query, key, bias, scale, causal)
    lanes, every = query.shape[0] * query.shape[2], block._replace(col_0=0, n_col=key.shape[1])
    softmax_rows_kernel[(lanes * -(-block.n_row // tiles["ROWS"]),)](
        query, key, query if bias is None else bias, edges, peak, found, mass,
        block.row_0, block.n_row, lanes * block.n_row, mass.shape[3], *rest,
        STATISTICS=statistics, FULL=_places(query, key, tiles, every, causal), BINS=_bins(mass),
        **constants, **tiles,
    )  # fmt: skip


def softmax_tiles(query: Tensor, key: Tensor, bias: Tensor | None, peak: Tensor, out: Tensor,
                  block: Block, scale: float, causal: bool) -> None:  # fmt: skip
    tiles = _tiles(TILES, query)
    if bias is not None:
        tiles["num_warps"] = 8  # 4 spill
    query, key = narrow(query, 1), narrow(key, 1)
    bias = bias if bias is None else narrow(bias, 2)
    rest, constants = _softmax(query, key, bias, scale, causal)
    lanes = query.shape[0] * query.shape[2]
    rows, columns = -(-block.n_row // tiles["ROWS"]), -(-block.n_col // tiles["COLUMNS"])
    span = _span(columns, lanes * rows)
    softmax_tiles_kernel[_grid(lanes, rows, columns, span)](
        query, key, query if bias is None else bias, peak, out, *block, block.n_col, span,
        lanes * block.n_row, *rest, FULL=_places(query, key, tiles, block, causal),
        **constants, **tiles,
    )  # fmt: skip


# -- one decay a state -------------------------------------------------------------------------


class DiagonalMap:
    """The chunks of `block`, cut where those of the whole sequence are, and their kernels."""

    def __init__(self, query: Tensor, key: Tensor, log_decay: Tensor, block: Block,
                 scale: float):  # fmt: skip
        size = CHUNK[exact_products(query)]
        last = block.row_0 + block.n_row
        first = min(block.row_0, block.col_0) // size * size
        part = slice(first, last)
        self.chunks = Chunks(
            query[:, part], key[:, part], query[:, part], log_decay[:, part], scale
        )
        self.block = block._replace(row_0=block.row_0 - first, col_0=block.col_0 - first)
        self.first, self.length, self.size = first, query.shape[1], size
        low, high = self.block.row_0 // size, -(-(self.block.row_0 + block.n_row) // size)
        self.n_block, self.lanes = high - low, query.shape[0] * query.shape[2]
        chunks = self.chunks
        wide = power_of_two(chunks.width, 16)
        self.parts = chunks.score, chunks.queries, chunks.keys, chunks.total
        self.constants = {
            "WHOLE": chunks.width == wide, "CHUNK": size, "WIDTH": wide,
            "PRECISION": "tf32" if query.dtype == torch.float16 else "ieee",
        }  # fmt: skip

    def tiles(self, out: Tensor) -> None:
        block, size = self.block, self.size
        columns = -(-(block.col_0 + block.n_col) // size) - block.col_0 // size
        span = _span(columns, self.lanes * self.n_block)
        full = all(place % size == 0 for place in block)
        diagonal_tiles_kernel[_grid(self.lanes, self.n_block, columns, span)](
            *self.parts, out, *block, block.n_col, span, self.n_block, self.chunks.n_chunk,
            self.chunks.width, FULL=full, **self.constants, **DIAGONAL,
        )  # fmt: skip

    def statistics(self, edges: Tensor, found: Tensor, mass: Tensor) -> None:
        diagonal_statistics_kernel[(self.lanes * self.n_block,)](
            *self.parts, edges, found, mass, self.block.row_0, self.block.n_row,
            found[0].numel(), mass.shape[3], self.length, self.n_block, self.chunks.n_chunk,
            self.chunks.width, BINS=_bins(mass), **self.constants, **DIAGONAL,
        )  # fmt: skip
