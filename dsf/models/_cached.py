"""Attention layers that keep a cache of keys: one `step` for all rows that read it."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsf.factors import OneHot, SoftmaxRows
from dsf.mixing_rows import MixingRows
from dsf.models._heads import check_divides, merge_heads, share_groups, split_heads
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.transitions import Identity


def cache_recurrence(system: str, rows: MixingRows) -> Recurrence:
    """A = I, B_t = e_t, C_t = row t of a map over as many keys as tokens."""
    return Recurrence(
        Identity(rows.n_key), OneHot(rows.n_key, rows.n_key), rows, system=system,
        gauge="one state per token",
    )  # fmt: skip


class ScoredRows(MixingRows):
    """Map rows made of the logits of `scores`, over the same queries and keys."""

    scores: SoftmaxRows

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        return self.scores.shape

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether a row is zero beyond its own position."""
        return self.scores.causal

    @property
    def query_start(self) -> int:  # type: ignore[override]
        """Position of the first row."""
        return self.scores.query_start


class CacheState(NamedTuple):
    """What `step` keeps: values (batch, key, group, channel), what rows need of keys, tokens."""

    value: Tensor
    seen: tuple[Tensor, ...]


class CachedMixer(SequenceMixer):
    """Query, key and value by head; a subclass says with `rows` how queries weigh the keys.

    n_group key-value heads serve n_head heads. `step` costs O(cache), and the cache grows.
    """

    def __init__(
        self, width: int, n_head: int, *, n_group: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.n_head, self.n_group = n_head, n_head if n_group is None else n_group
        check_divides(name, "n_head", n_head, "width", width)
        check_divides(name, "n_group", self.n_group, "n_head", n_head)
        shared = width // n_head * self.n_group
        self.query, self.key, self.value, self.out = (
            nn.Linear(*sizes, bias=bias)
            for sizes in ((width, width), (width, shared), (width, shared), (width, width))
        )

    def seen(self, x: Tensor) -> tuple[Tensor, ...]:
        """What rows need of the tokens as keys: (batch, time, ...) each, the key first."""
        return (split_heads(self.key(x), self.n_group),)

    @abc.abstractmethod
    def rows(self, x: Tensor, query: Tensor, seen: tuple[Tensor, ...], start: int) -> MixingRows:
        """The rows of tokens x, their queries at start, start + 1, ..., over all keys seen."""

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The cache system and the values (batch, time, head, channel)."""
        rows = self.rows(x, split_heads(self.query(x), self.n_head), self.seen(x), 0)
        values = split_heads(self.value(x), self.n_group)
        return cache_recurrence(self.system, rows), share_groups(values, self.n_head)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, CacheState]:
        """One token against the cache."""
        x = x_t[:, None]
        value, seen = split_heads(self.value(x), self.n_group), self.seen(x)
        if state is not None:
            value = torch.cat([state.value, value], dim=1)
            seen = tuple(torch.cat(p, dim=1) for p in zip(state.seen, seen, strict=True))
        rows = self.rows(x, split_heads(self.query(x), self.n_head), seen, value.shape[1] - 1)
        y = rows.mix_part(share_groups(value, self.n_head).transpose(1, 2), "full", 0)
        return self.readout(y.transpose(1, 2), x)[:, 0], CacheState(value, seen)
