"""Layers of fla's names and conventions whose ops are float64 loops, for tests without a GPU."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, KEY, VALUE = 10, 4, 3, 5


def rows(cu_seqlens: Tensor | None, batch: int, length: int) -> list[tuple[int, slice]]:
    """Where each sequence of a call lies: (row, span)."""
    if cu_seqlens is None:
        return [(row, slice(0, length)) for row in range(batch)]
    ends = cu_seqlens.tolist()
    return [(0, slice(a, b)) for a, b in itertools.pairwise(ends)]


def by_row(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """An op on batches and packed rows from a loop over one sequence (time, head, width)."""

    def op(*, cu_seqlens: Tensor | None = None, **given: Any) -> Any:
        batch, length = given["q"].shape[:2]
        timed = [n for n, x in given.items()
                 if isinstance(x, Tensor) and x.shape[:2] == (batch, length)]  # fmt: skip
        out = given["q"].new_zeros(*given["q"].shape[:3], given["v"].shape[-1])
        if given["v"].shape[2] > out.shape[2]:
            out = torch.zeros_like(given["v"])
        for row, span in rows(cu_seqlens, batch, length):
            cut = {n: given[n][row, span] for n in timed}
            out[row, span] = function(**{**given, **cut})
        return out

    return op


class StandIn(nn.Module):
    """Projects, lays real tokens end to end as fla does, calls an op, puts them back, projects."""

    num_householder = 2

    def __init__(self, space: dict, op: str, sizes: dict[str, tuple[int, ...]], options: dict):
        super().__init__()
        self.space, self.op, self.options = space, op, options
        self.sizes = sizes
        self.parts = nn.ModuleDict(
            {n: nn.Linear(WIDTH, math.prod(s)) for n, s in sizes.items()})  # fmt: skip
        self.A_log, self.dt_bias = (nn.Parameter(torch.randn(HEADS)) for _ in range(2))
        self.out = nn.Linear(HEADS * VALUE, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask=None, cu_seqlens=None):
        x, kept = hidden_states, None
        if attention_mask is not None:
            kept = attention_mask.bool()
            x = x[kept][None]
            ends = attention_mask.sum(1).cumsum(0)
            cu_seqlens = torch.cat([torch.zeros_like(ends[:1]), ends])
        given = {n: self.parts[n](x).unflatten(-1, s) for n, s in self.sizes.items()}
        y = self.call(given, cu_seqlens)
        y = self.out(y.flatten(2))
        if kept is None:
            return y, None, None
        back = y.new_zeros(*kept.shape, WIDTH)
        back[kept] = y[0]
        return back, None, None

    def call(self, given: dict, cu_seqlens) -> Tensor:
        options = dict(self.options)
        if options.get("use_gate_in_kernel"):
            options |= {"A_log": self.A_log, "dt_bias": self.dt_bias}
        y = self.space[self.op](**given, **options, cu_seqlens=cu_seqlens)
        return y[0] if isinstance(y, tuple) else y


def layer(case: tuple, package: str = "fla.layers") -> nn.Module:
    """From (file, class, op, function, sizes, options, base): sys.modules holds its file."""
    file, name, op, function, sizes, options, base = case
    module = types.ModuleType(f"{package}.{file}")
    module.__dict__.update(function if isinstance(function, dict) else {op: function})
    sys.modules[module.__name__] = module
    made = type(name, (base,), {"__module__": module.__name__})
    made.__qualname__ = name
    return made(module.__dict__, op, sizes, options).to(torch.float64)
