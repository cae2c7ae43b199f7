"""The input that a layer adds back to its output: one more part of a block, beside its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, System

if TYPE_CHECKING:
    from dsf.blocks import Block


def matrices(block: Block, cap: int | None, advice: str) -> Tensor:
    """R (batch, time, output, input): what token t's input adds to its output."""
    around = block.around
    assert around is not None
    shape = (*block.output.shape, block.input.shape[-1])
    require_memory(
        "dsf.Block", "residual", ("batch", "time", "output", "input"), shape, block.input.dtype,
        device=block.input.device, max_memory=cap, advice=advice,
    )  # fmt: skip
    n_out = block.output.shape[-1]
    found = block.input.new_zeros(shape)

    def seeds(which: range) -> Tensor:
        ones = block.output.new_zeros(len(which), *block.output.shape)
        ones[range(len(which)), :, :, list(which)] = 1
        return ones

    for which, rows in around.rows(seeds, n_out):
        found[:, :, which.start : which.stop] = rows.permute(1, 2, 0, 3)
    return found


def beside(heads: Tensor, own: Tensor, rows: range, cols: range) -> Tensor:
    """A tile (batch, head, query, key, ...), one part more: `own` (batch, time, ...) at t = j."""
    more = heads.new_zeros(heads.shape[0], 1, *heads.shape[2:])
    for t in range(max(rows.start, cols.start), min(rows.stop, cols.stop)):
        more[:, 0, t - rows.start, t - cols.start] = own[:, t]
    return torch.cat([heads, more], 1)


def with_residual(system: System, R: Tensor) -> System:
    """One more head, which reads its token's input through D = R and has no state of its own."""
    if isinstance(system, Bidirectional):
        behind = system.anticausal
        return Bidirectional(
            _one_more(system.causal, R),
            Anticausal(_one_more(behind.recurrence, torch.zeros_like(R)), behind.strict),
        )
    if isinstance(system, Anticausal):
        return Anticausal(_one_more(system.recurrence, R), system.strict)
    assert isinstance(system, Recurrence)
    return _one_more(system, R)


def _one_more(r: Recurrence, R: Tensor) -> Recurrence:
    B, C = r.dense_input_output()
    head = B.shape[2]
    D = R.new_zeros(*R.shape[:2], head, *R.shape[2:]) if r.D is None else r.D
    D = D.expand(*R.shape[:2], head, *R.shape[2:])

    def again(x: Any) -> Any:
        return torch.cat([x, x[:, :, -1:]], 2) if x.shape[2] == head > 1 else x

    more = (0, 0) * 2 + (0, 1)
    return r.replace(
        A=r.A.map_tensors(again), B=pad(B, more), C=pad(C, more),
        D=torch.cat([D.to(R), R[:, :, None]], 2),
    )  # fmt: skip
