"""Layers whose coefficients see a few past tokens: one `step` for all, and divided rows."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import scan, step
from dsf.wrappers import gated


def divided_by_row_sums(
    r: Recurrence, divisor: Callable[[Tensor], Tensor], length: int,
    initial_sum: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """The system with row t of its map divided by divisor(sum of row t): C_t and D_t shrink.

    The sums are the system's own output on values of one, so they cost one more channel.
    initial_sum (batch, head, state) is what the initial state adds to them.
    """
    batch, _, head = r.lead_shape()
    ones = r.B.new_ones(batch, length, head, 1)  # type: ignore[union-attr]
    start = None if initial_sum is None else initial_sum[..., None]
    sums = scan(r.replace(initial_state=start), ones)
    result = gated(1 / divisor(sums), r)
    assert isinstance(result, Recurrence)
    return result


class WindowState(NamedTuple):
    """What `step` keeps: the last inputs (batch, at most n_past, width), h, tokens seen."""

    inputs: Tensor
    memory: Tensor
    position: int


class WindowedMixer(SequenceMixer):
    """A layer whose coefficients of token t are made from tokens t - n_past .. t.

    A subclass gives `core`, and `divisor` where rows are divided by a function of their own sums.
    `step` keeps the last n_past inputs and h: constant memory.
    """

    n_past: int = 0
    is_divided: bool = False

    @abc.abstractmethod
    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The undivided system of consecutive tokens x, the first at `start`, and its values."""

    def divisor(self, sums: Tensor) -> Tensor:
        """What a row is divided by, from its sum: the sum itself unless a subclass says more."""
        return sums

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The system for this input, and the values (batch, time, head, channel)."""
        r, values = self.core(x)
        if self.is_divided:
            r = divided_by_row_sums(r, self.divisor, x.shape[1])
        return r, values

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, WindowState]:
        """One token; what came before is the window of inputs and h."""
        x, memory, position = x_t[:, None], None, 0
        if state is not None:
            x, memory = torch.cat([state.inputs, x], dim=1), state.memory
            position = state.position
        last = x.shape[1] - 1
        r, values = self.core(x, position - last)
        u = values[:, -1]
        if self.is_divided:
            u = torch.cat([u, torch.ones_like(u[..., :1])], dim=-1)
        y, memory = step(r.time_slice(last, last + 1), u, memory)
        if self.is_divided:
            y = y[..., :-1] / self.divisor(y[..., -1:])
        # readouts work token by token, so the earlier ones may be anything
        out = self.readout(y[:, None].expand(-1, last + 1, *y.shape[1:]), x)[:, -1]
        return out, WindowState(x[:, max(last + 1 - self.n_past, 0) :], memory, position + 1)
