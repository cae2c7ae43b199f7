"""Segments of selective_scan: the states between them, and where those of packed rows lie."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsf_kernels.selective_kernels import connect_kernel
from dsf_kernels.sequences import Sequences

BLOCK = 512


def fold(
    states: Tensor, span: Tensor, rates: Tensor, outer: Tensor, reverse: bool,
    offsets: Tensor | None = None,
) -> None:  # fmt: skip
    """First states in place of last ones from zero; `outer` takes the last of each row."""
    n_row, n_state, channels = outer.shape
    size = n_state * channels
    connect_kernel[(n_row * -(-size // BLOCK),)](
        states, span, rates, outer, offsets, states.shape[0] * states.shape[1] // n_row, size,
        channels, REVERSE=reverse, BLOCK=BLOCK,
    )  # fmt: skip


def connect(run: Callable, outer: Tensor, rates: Tensor, n_segment: int, reverse: bool) -> Tensor:
    """Run segments from their right first states; `outer` (batch, state, channel) takes the last.

    run(states, span, summary) replaces states (batch, segment, state, channel), the first of each
    segment, by the last ones.
    """
    batch, n_state, channels = outer.shape
    if n_segment == 1:
        run(outer, outer, False)
        return outer
    states = outer.new_zeros((batch, n_segment, n_state, channels))
    span = outer.new_empty((batch, n_segment, 2, channels))
    run(states, span, True)
    fold(states, span, rates, outer, reverse)
    run(states, span, False)
    last = states[:, 0 if reverse else -1]
    return last.clone(memory_format=torch.contiguous_format)


class Segments:
    """The segments of the sequences of a packed row, of `steps` tokens at most, in tiles."""

    def __init__(self, cu_seqlens: Tensor, length: int, steps: int, tile: int):
        self.cut = Sequences(cu_seqlens, length, steps)
        self.whole = steps >= length  # then a sequence is one segment
        self.own, start, stop, place, _ = self.cut.tiles().unbind(1)
        first = start + place * steps
        last = torch.minimum(first + steps, stop)
        tiles = Sequences(cu_seqlens, length, tile).offsets[self.own] + place * (steps // tile)
        self.table = torch.stack([torch.minimum(first, last), last, tiles], 1)

    def connect(self, run: Callable, outer: Tensor, rates: Tensor, reverse: bool) -> Tensor:
        """As `connect`; outer (sequence, state, channel), that of empty sequences stays."""
        offsets, span = self.cut.offsets, outer
        if self.whole:
            states = outer[self.own]
        else:
            states = outer.new_zeros((1, self.cut.bound, *outer.shape[1:]))
            span = outer.new_empty((self.cut.bound, 2, outer.shape[2]))
            run(states, span, True)
            fold(states, span, rates, outer, reverse, offsets)
            states = states[0]
        run(states, span, False)
        last = offsets[:-1] if reverse else offsets[1:] - 1
        last = states[last.clamp(0, self.cut.bound - 1)]
        return torch.where((offsets.diff() > 0)[:, None, None], last, outer)
