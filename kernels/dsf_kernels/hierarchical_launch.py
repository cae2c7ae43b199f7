"""How hierarchical attention is launched: which levels share a launch, and what passes between.

The lowest levels whose families, filled up to powers of two, make at most a tile of rows are one
stage; its subtrees are the items of the next. The last stage holds the root: a tile, if what is
left fits in one, else blocks of items against blocks. Forward is one launch a stage and one for
every stage below the last on the way down.
"""

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.hierarchical_root import root_columns_kernel, root_kernel, root_rows_kernel
from dsf_kernels.hierarchical_tiles import (
    descend_kernel,
    gather_kernel,
    tile_gradient_kernel,
    tile_kernel,
)
from dsf_kernels.launch import INTERPRETED, narrow, power_of_two

LOG2_E = math.log2(math.e)
LEAST = 16  # rows of a matrix product
LARGEST_FAMILY = 64
# By exactness, and whether a side is wider than 64: rows of a tile of tokens, and its warps; of a
# block of the root (tokens in 16 bits take a tile's). Fewer warps or more rows spill registers.
TILE = {(False, False): 64, (False, True): 64, (True, False): 32, (True, True): 16}
WARPS = {(False, False): 4, (False, True): 8, (True, False): 8, (True, True): 8}
ROOT = {(False, False): 32, (False, True): 32, (True, False): 32, (True, True): 16}
ITEMS = 32  # rows of a tile of items at most: their products have operands of 32 bits
ITEM_WARPS = 8
BLOCK = 64  # rows of the way down
MEANS = ("query", "key", "value", "count", "g")
KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GATHERED = ("LEVELS", "PADS", "PLACES", "N", "SUBS", "ROWS", "LEAF", "CHANNELS")


class Stage(NamedTuple):
    """Levels that one launch handles; branching from the bottom up, () for a large root."""

    branching: tuple[int, ...]
    n_item: int
    n_sub: int
    rows: int
    top: bool

    @property
    def large(self) -> bool:
        return self.top and not self.branching

    @property
    def span(self) -> int:
        """Items in a whole subtree."""
        return math.prod(self.branching)

    @property
    def subs(self) -> int:
        return self.rows // math.prod(map(power_of_two, self.branching))

    @property
    def n_tile(self) -> int:
        """Programs a head: tiles of subtrees, or blocks of a large root's items."""
        return -(-self.n_item // self.rows) if self.large else -(-self.n_sub // self.subs)

    def fixed(self) -> dict:
        places = [math.prod(self.branching[:u]) for u in range(len(self.branching) + 1)]
        return {
            "LEVELS": self.branching, "PADS": tuple(map(power_of_two, self.branching)),
            "PLACES": tuple(places), "N": len(self.branching), "SUBS": self.subs,
            "ROWS": self.rows, "TOP": self.top,
        }  # fmt: skip


def stages(length: int, branching: tuple[int, ...], tile: int, root_rows: int) -> list[Stage]:
    """The stages of the tree that `length` tokens make, from the tokens up."""
    lower = [b for b in branching[:0:-1] if b > 1]
    found, n_item = [], length
    while True:
        tile = min(tile, ITEMS) if found else tile
        root = -(-n_item // math.prod(lower))
        levels = (*lower, root)
        size = math.prod(map(power_of_two, levels))
        if size <= tile:
            return [*found, Stage(levels, n_item, 1, max(size, LEAST), True)]
        if not lower:
            rows = root_rows if found else max(tile, root_rows)
            return [*found, Stage((), n_item, 1, rows, True)]
        here, size = [], 1
        while lower and (not here or size * power_of_two(lower[0]) <= tile):
            size *= power_of_two(lower[0])
            here.append(lower.pop(0))
        n_sub = -(-n_item // math.prod(here))
        found.append(Stage(tuple(here), n_item, n_sub, max(tile, size), False))
        n_item = n_sub


class Plan:
    """What the launches of one call share: stages, sizes, types."""

    def __init__(self, query, key, value, mask, branching, self_term, scale):
        self.leaves = tuple(narrow(t, 1) for t in (query, key, value))
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.self_term, self.scale = self_term, scale
        self.batch, length, self.head, width = query.shape
        # torch.compile takes these as constants: the tree and its tiles hang on them
        self.length, self.width, self.channels = int(length), int(width), int(value.shape[3])
        self.exact = query.dtype == torch.float32 or INTERPRETED
        self.wide = max(self.width, self.channels) > 64
        kind = self.exact, self.wide
        self.stages = stages(self.length, tuple(branching), TILE[kind], ROOT[kind])
        self.kind = query.dtype

    def moved(self, grads: bool) -> list[dict[str, int]]:
        """Numbers an item of what the stages hand on, or of the gradients of that."""
        items = {"query": self.width, "key": self.width, "value": self.channels, "g": 1}
        items |= {"out": self.channels, "mass": 1}
        if not grads:
            items |= {"count": 1, "part": self.channels, "own": 1}
        found: list[dict[str, int]] = [{}, *(dict(items) for _ in self.stages[1:])]
        if self.stages[-1].large:
            found[-1]["delta" if grads else "norm"] = 1
        return found

    def room(self, *, grads: bool = False) -> int:
        """Float32 numbers of all that."""
        rows = self.batch * self.head
        return rows * sum(
            stage.n_item * sum(fields.values())
            for stage, fields in zip(self.stages, self.moved(grads), strict=True)
        )

    def views(self, saved: Tensor, *, grads: bool = False) -> list[dict[str, Tensor]]:
        """The parts of `saved`, each (batch, item, head, numbers), stage by stage."""
        found, start = [], 0
        for stage, fields in zip(self.stages, self.moved(grads), strict=True):
            parts = {}
            for name, numbers in fields.items():
                shape = (self.batch, stage.n_item, self.head, numbers)
                size = math.prod(shape)
                parts[name] = saved[start : start + size].view(shape)
                start += size
            found.append(parts)
        return found

    def common(self, stage: Stage, place: int) -> dict:
        kind = tl.float32 if self.exact or place > 0 else KINDS[self.kind]
        fixed = {
            "LEAF": place == 0, "MASKED": place == 0 and self.mask is not None,
            "COMPUTE": kind, "PRECISION": "ieee" if self.exact else "tf32",
            "WIDTH": power_of_two(self.width, LEAST),
            "CHANNELS": power_of_two(self.channels, LEAST),
        }  # fmt: skip
        warps = ITEM_WARPS if place else WARPS[self.exact, self.wide]
        fixed["num_warps"] = warps
        if stage.large:
            own = place == 0 and self.self_term
            if place and not (self.exact or self.wide):
                fixed["num_warps"] = 4
            return fixed | {"DIAGONAL": own, "ROWS": stage.rows, "num_stages": 2}
        return fixed | {"SELF": self.self_term} | stage.fixed()

    def inputs(self, place: int, parts: list[dict]) -> tuple[tuple, tuple]:
        """Query, key, value, count and g of a stage's items, and the strides of all but g."""
        if place:
            here = parts[place]
            tensors = (here["query"], here["key"], here["value"], here["count"], here["g"])
            strides = [t.stride() for t in tensors[:3]] + [here["count"].stride()[:3]]
        else:
            count = self.leaves[0] if self.mask is None else self.mask
            tensors = (*self.leaves, count, self.leaves[0])
            steps = (0, 0, 0) if self.mask is None else (*self.mask.stride(), 0)
            strides = [t.stride() for t in self.leaves] + [steps]
        return tensors, tuple(s for group in strides for s in group)

    def sizes(self, stage: Stage) -> tuple[int, ...]:
        return stage.n_item, stage.n_tile, stage.n_sub, self.head

    def grid(self, n_block: int) -> tuple[int]:
        return (self.batch * self.head * n_block,)

    def forward(self, out: Tensor, local: Tensor, saved: Tensor) -> None:
        """Fill `out`, each token's part from its first subtree (`local`), and `views(saved)`."""
        parts, last = self.views(saved), len(self.stages) - 1
        factor = float(self.scale * LOG2_E)
        for place, stage in enumerate(self.stages):
            tensors, strides = self.inputs(place, parts)
            part, own = self.results(place, parts, out, local, saved)
            fixed, end = self.common(stage, place), (self.width, self.channels, factor, *strides)
            if stage.large:
                root_kernel[self.grid(stage.n_tile)](
                    *tensors, part, own, parts[place]["norm"], stage.n_item, stage.n_tile,
                    self.head, *end, **fixed,
                )  # fmt: skip
            else:
                up = parts[place + 1] if place < last else dict.fromkeys(MEANS, saved)
                tile_kernel[self.grid(stage.n_tile)](
                    *tensors, part, own, *(up[name] for name in MEANS), *self.sizes(stage), *end,
                    **fixed,
                )  # fmt: skip
        for place in range(last - 1, -1, -1):
            stage, up, here = self.stages[place], parts[place + 1], parts[place]
            n_block = -(-stage.n_item // BLOCK)
            descend_kernel[self.grid(n_block)](
                *self.results(place, parts, out, local, saved), up["out"], up["mass"],
                here["out"] if place else out, here["mass"] if place else saved,
                stage.n_item, n_block, stage.n_sub, self.head, self.channels, stage.span,
                LEAF=place == 0, ROWS=BLOCK, CHANNELS=power_of_two(self.channels, LEAST),
            )  # fmt: skip

    def results(self, place, parts, out, local, saved) -> tuple[Tensor, Tensor]:
        """Where a stage puts its outputs and own masses: those of the root's hold for all."""
        top = self.stages[place].top
        if place == 0:
            return (out if top else local), saved
        here = parts[place]
        return (here["out"], here["mass"]) if top else (here["part"], here["own"])

    def backward(self, grad, out, local, saved, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Gradients of query, key and value, into `grads`."""
        parts, last = self.views(saved), len(self.stages) - 1
        work = torch.empty(self.room(grads=True), dtype=torch.float32, device=grad.device)
        back = self.views(work, grads=True)
        back[0] |= {"out": narrow(grad, 1), "mass": work, "g": work}
        back[0] |= dict(zip(("query", "key", "value"), grads, strict=True))
        for place, stage in enumerate(self.stages[:-1]):
            here, up = back[place], back[place + 1]
            fixed = self.common(stage, place)
            gather_kernel[self.grid(stage.n_tile)](
                here["out"], here["mass"], *self.results(place, parts, out, local, saved),
                up["out"], up["mass"], *self.sizes(stage), self.channels, *here["out"].stride(),
                **{name: fixed[name] for name in GATHERED},
            )  # fmt: skip
        for place in range(last, -1, -1):
            self.adjoint(place, parts, back, out, saved)

    def adjoint(self, place, parts, back, out, saved) -> None:
        """Gradients of one stage's items, given those of the subtrees above."""
        stage, here = self.stages[place], back[place]
        tensors, strides = self.inputs(place, parts)
        fixed = self.common(stage, place)
        end = (self.width, self.channels, float(self.scale), float(self.scale * LOG2_E),
               *strides, *here["out"].stride())  # fmt: skip
        if stage.large:
            given, own = self.results(place, parts, out, out, saved)
            norm, delta = parts[place]["norm"], here["delta"]
            sizes = (stage.n_item, stage.n_tile, self.head)
            root_rows_kernel[self.grid(stage.n_tile)](
                *tensors[:4], given, own, norm, here["out"], here["mass"], here["query"],
                here["g"], delta, *sizes, *end, **fixed,
            )  # fmt: skip
            root_columns_kernel[self.grid(stage.n_tile)](
                *tensors[:4], norm, delta, here["out"], here["key"], here["value"], *sizes, *end,
                **fixed,
            )  # fmt: skip
            return
        names = ("query", "key", "value", "g")
        up = dict.fromkeys(names, saved) if stage.top else back[place + 1]
        mass = saved if stage.top else parts[place + 1]["mass"]
        tile_gradient_kernel[self.grid(stage.n_tile)](
            *tensors, here["out"], here["mass"], mass, *(up[name] for name in names),
            *(here[name] for name in names), *self.sizes(stage), *end, **fixed,
        )  # fmt: skip
