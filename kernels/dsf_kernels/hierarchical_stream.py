"""Streaming hierarchical attention: every token reads the groups that ended before it.

The means of the groups come first, a launch a level above the tile; then each tile of tokens
attends to itself and to the groups before it, level by level, in one softmax. Its loss of KL
divergence to softmax is below that of the tied form, and no token reads a later one.
"""

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.hierarchical_attention import checked, empty_gradients, kept_room
from dsf_kernels.hierarchical_launch import BLOCK, KINDS, LEAST, LOG2_E, TILE, WARPS
from dsf_kernels.hierarchical_stream_gradients import (
    delta_kernel,
    group_gradient_kernel,
    stream_gradient_kernel,
)
from dsf_kernels.hierarchical_stream_kernels import means_kernel, stream_kernel
from dsf_kernels.launch import INTERPRETED, narrow, on_device, power_of_two
from dsf_kernels.operators import operator

PART_ROWS, MAX_PARTS = 2048, 8  # the rows that see a block of groups, cut in parts


class Outline(NamedTuple):
    """Levels inside a tile, and (tokens of a node, of its family or 0) of the levels above."""

    levels: tuple[int, ...]
    rows: int
    upper: tuple[tuple[int, int], ...]
    split: int
    """How many nodes of the first of the levels above are in a tile."""

    @property
    def span(self) -> int:
        return math.prod(self.levels)


def outline(length: int, branching: tuple[int, ...], tile: int) -> Outline:
    """Whole levels as long as they fit, then a part of the next family that divides it."""
    lower = [b for b in branching[:0:-1] if b > 1]
    levels, size = [], 1
    while lower and (not levels or size * power_of_two(lower[0]) <= tile):
        size *= power_of_two(lower[0])
        levels.append(lower.pop(0))
    span = math.prod(levels)
    root = power_of_two(-(-length // span))
    room = min(max(1, tile // size), root if not lower else lower[0] & -lower[0])
    upper, node = [], span
    for b in lower:
        upper.append((node, node * b))
        node *= b
    upper.append((node, 0))
    upper = [u for u in upper if u[0] < length] if length > span * room else []
    whole = (*levels, room) if room > 1 else tuple(levels)
    return Outline(whole or (1,), max(LEAST, size * room), tuple(upper), room)


class Plan:
    """What the launches of one call share."""

    def __init__(self, query, key, value, mask, branching, scale):
        self.query, self.key, self.value = (narrow(t, 1) for t in (query, key, value))
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.batch, length, self.head, width = query.shape
        # torch.compile takes these as constants: the tree and its tiles hang on them
        self.length, self.width, self.channels = int(length), int(width), int(value.shape[3])
        exact = query.dtype == torch.float32 or INTERPRETED
        wide = max(self.width, self.channels) > 64
        self.warps, self.scale = WARPS[exact, wide], float(scale)
        self.outline = outline(self.length, tuple(branching), TILE[exact, wide])
        self.nodes = [-(-self.length // span) for span, _ in self.outline.upper]
        self.n_node = sum(self.nodes)
        self.n_tile = -(-self.length // self.outline.span)
        self.block = TILE[exact, wide] // (1 + (wide and not exact))
        self.fixed = {
            "COMPUTE": tl.float32 if exact else KINDS[query.dtype], "PRECISION": "ieee",
            "WIDTH": power_of_two(self.width, LEAST),
            "CHANNELS": power_of_two(self.channels, LEAST), "num_warps": self.warps,
            "num_stages": 2,
        }  # fmt: skip

    def views(self, saved: Tensor) -> tuple[Tensor, ...]:
        """Means of keys and values, and counts, of the groups; log normalisers of the tokens."""
        found, start = [], 0
        for items, numbers in ((self.n_node, self.width), (self.n_node, self.channels),
                               (self.n_node, 1), (self.length, 1)):  # fmt: skip
            shape = (self.batch, items, self.head, numbers)
            found.append(saved[start : start + math.prod(shape)].view(shape))
            start += math.prod(shape)
        return tuple(found)

    def room(self) -> int:
        """Numbers of all those."""
        numbers = self.n_node * (self.width + self.channels + 1) + self.length
        return self.batch * self.head * numbers

    def grid(self, n_block: int) -> tuple[int]:
        return (self.batch * self.head * n_block,)

    def masked(self) -> tuple[Tensor, tuple[int, ...]]:
        return (self.key, (0, 0)) if self.mask is None else (self.mask, self.mask.stride())

    def tiles(self) -> dict:
        """Settings of the kernels that own a tile of tokens."""
        spans, families = zip(*self.outline.upper, strict=True) if self.n_node else ((1,), (0,))
        return self.fixed | digits(self.outline.levels) | {
            "ROWS": self.outline.rows, "SPANS": spans, "FAMILIES": families,
            "UPPER": len(self.outline.upper), "MASKED": self.mask is not None,
            "BLOCK": self.block,
        }  # fmt: skip

    def means(self, mean_k: Tensor, mean_v: Tensor, count: Tensor) -> None:
        """Fill in the groups, from the tokens up."""
        below, first, n_item, item = 1, 0, self.length, 0
        mask, steps = self.masked()
        for place, (span, _) in enumerate(self.outline.upper):
            levels = (span // below,) if place else self.outline.levels
            if place == 0 and self.outline.split > 1:
                levels = levels[:-1] or (1,)
            size = math.prod(map(power_of_two, levels))
            rows = max(LEAST, BLOCK if size < BLOCK else size)
            subs = rows // size
            sources = (mean_k, mean_v, count) if place else (self.key, self.value, mask)
            strides = [t.stride() for t in sources[:2]]
            strides.append(count.stride()[:3] if place else (*steps, 0))
            n_sub = self.nodes[place]
            n_tile = -(-n_sub // subs)
            means_kernel[self.grid(n_tile)](
                *sources, mean_k, mean_v, count, n_item, n_tile, n_sub, self.head, self.width,
                self.channels, first, self.n_node, item, *(s for group in strides for s in group),
                SUBS=subs, ROWS=rows, LEAF=place == 0,
                MASKED=place == 0 and self.mask is not None, **digits(levels),
                WIDTH=self.fixed["WIDTH"], CHANNELS=self.fixed["CHANNELS"],
            )  # fmt: skip
            below, n_item, item, first = span, n_sub, first, first + n_sub

    def forward(self, out: Tensor, saved: Tensor) -> None:
        """Fill `out` and `views(saved)`."""
        *group, norm = self.views(saved)
        self.means(*group)
        mask, steps = self.masked()
        stream_kernel[self.grid(self.n_tile)](
            self.query, self.key, self.value, mask, *group, out, norm, self.length, self.n_tile,
            self.n_node, self.head, self.width, self.channels, self.scale * LOG2_E,
            *self.query.stride(), *self.key.stride(), *self.value.stride(), *steps,
            **self.tiles(),
        )  # fmt: skip

    def backward(self, grad, out, saved, grads) -> None:
        """Gradients of query, key and value, into `grads`."""
        *group, norm = self.views(saved)
        grad, delta = narrow(grad, 1), torch.empty_like(norm)
        n_block = -(-self.length // BLOCK)
        delta_kernel[self.grid(n_block)](
            out, grad, delta, self.length, n_block, self.head, self.channels, *grad.stride(),
            ROWS=BLOCK, CHANNELS=self.fixed["CHANNELS"],
        )  # fmt: skip
        up = self.group_gradients(group, grad, norm, delta)
        mask, steps = self.masked()
        stream_gradient_kernel[self.grid(self.n_tile)](
            self.query, self.key, self.value, mask, *group, grad, norm, delta, *up, *grads,
            self.length, self.n_tile, self.n_node, self.head, self.width, self.channels,
            self.scale, self.scale * LOG2_E, *self.query.stride(), *self.key.stride(),
            *self.value.stride(), *steps, *grad.stride(), **self.tiles(),
        )  # fmt: skip

    def group_gradients(self, group, grad, norm, delta) -> tuple[Tensor, Tensor]:
        """Those of the means of keys and values, summed over parts of the rows in order."""
        parts = min(MAX_PARTS, -(-self.length // PART_ROWS))
        shape = (parts, self.batch, self.n_node, self.head)
        like = {"dtype": torch.float32, "device": grad.device}
        up_k = torch.empty((*shape, self.width), **like)
        up_v = torch.empty((*shape, self.channels), **like)
        first = 0
        for n_live, (span, family_span) in zip(self.nodes, self.outline.upper, strict=True):
            family = family_span // span if family_span else n_live
            rows = min(family * span, self.length)
            part_rows = math.ceil(rows / (parts * self.block)) * self.block
            n_block = -(-n_live // family) * -(-family // self.block)
            group_gradient_kernel[self.grid(n_block * parts)](
                self.query, *group, grad, norm, delta, up_k, up_v, self.length, n_block,
                self.n_node, first, n_live, family, parts, part_rows, self.batch, self.head,
                self.width, self.channels, self.scale, self.scale * LOG2_E, *self.query.stride(),
                *grad.stride(), SPAN=span, TILE=self.outline.span, ROWS=self.block,
                BLOCK=self.block, **self.fixed,
            )  # fmt: skip
            first += n_live
        return (up_k[0], up_v[0]) if parts == 1 else (up_k.sum(0), up_v.sum(0))


def digits(levels: tuple[int, ...]) -> dict:
    """How slots of a tile are numbered."""
    places = tuple(math.prod(levels[:u]) for u in range(len(levels) + 1))
    pads = tuple(map(power_of_two, levels))
    return {"LEVELS": levels, "PADS": pads, "PLACES": places, "N": len(levels)}


def _outputs(query, key, value, mask, branching, scale):
    plan = Plan(query, key, value, mask, branching, scale)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return plan, out, kept_room(plan.room(), value.device)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, branching: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs, and for the way back the groups and log normalisers."""
    plan, out, saved = _outputs(query, key, value, mask, branching, scale)
    if out.numel():
        with on_device(value):
            plan.forward(out, saved)
    return out, saved


def _adjoint_run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad: Tensor, out: Tensor,
    saved: Tensor, branching: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = empty_gradients(query, key, value)
    if value.numel():
        plan = Plan(query, key, value, mask, branching, scale)
        with on_device(value):
            plan.backward(grad, out, saved, grads)
    return grads


_adjoint = operator(
    "hierarchical_stream_adjoint", _adjoint_run, lambda q, k, v, *_: empty_gradients(q, k, v)
)
operator("hierarchical_stream", _forward, lambda *a: _outputs(*a)[1:])
_stream = torch.ops.dsf.hierarchical_stream.default  # where its gradient is registered


def _save(ctx, inputs, output):
    *tensors, ctx.branching, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _saved):
    query, key, value, mask, *results = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    grads = _adjoint(query, key, value, mask, grad, *results, ctx.branching, ctx.scale)
    return *grads, None, None, None


torch.library.register_autograd("dsf::hierarchical_stream", _backward, setup_context=_save)


def hierarchical_stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branching: tuple[int, ...] = (16, 8, 4, 2),
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Outputs of causal attention of every token to itself and the groups that ended before it.

        y_t = sum_G theta_tG vbar_G,   theta_tG = softmax_G(scale q_t.kbar_G + log n_G)

    over G = {t} and all left siblings of t and of its ancestors, with kbar and vbar means over
    the n real tokens of G. No later token is read. Tree, shapes, types and errors as
    `hierarchical_attention`; products round to the type of the inputs, group means too.
    Differentiable in query, key and value, once.
    Cost: k and v twice and q and the output once; about time x (tile + groups seen above it) x 2
    (width + channel) operations a head. Source: derived, hierarchical self-attention (8.1).
    """
    scale = checked("hierarchical_stream", query, key, value, branching, key_mask, scale)
    return _stream(query, key, value, key_mask, [int(b) for b in branching], scale)[0]
