"""The sums that row measures are made of, and how those of two sets of keys become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

_ADDED = ("absolute", "negative", "n_negative", "log_moment", "first", "distance")


@dataclasses.dataclass(frozen=True)
class RowSums:
    """Over the n keys that a row w may see, each (*lead, query).

    count n, mean, centred squares sum |w - mean|^2, absolute sum |w|, negative sum max(-w, 0),
    n_negative, log_moment sum |w| ln |w|, first |w| at the first key, distance sum |w| |t - j|.
    `scanned` ones come without a map, NaN where a scan cannot tell.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    absolute: Tensor
    negative: Tensor
    n_negative: Tensor
    log_moment: Tensor
    first: Tensor
    distance: Tensor
    scanned: bool = False

    @property
    def power(self) -> Tensor:
        """sum |w|^2."""
        return self.squares + self.count * self.mean.abs() ** 2

    def merge(self, other: RowSums) -> RowSums:
        """The sums of two disjoint sets of keys (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        gap = other.mean - self.mean
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return RowSums(
            count=count, mean=self.mean + share * gap,
            squares=self.squares + other.squares + self.count * share * gap.abs() ** 2, **added,
            scanned=self.scanned,
        )  # fmt: skip

    def flip(self) -> RowSums:
        """The rows in reverse order."""
        return dataclasses.replace(self, **{n: getattr(self, n).flip(-1) for n in _NAMES})

    @classmethod
    def same(cls, values: Tensor) -> RowSums:
        """Every sum the same tensor."""
        one = values
        return cls(one, one, one, one, one, one, one, one, one)

    @staticmethod
    def cat(parts: Sequence[RowSums]) -> RowSums:
        """The sums of several sets of rows, one after another."""
        joined = {name: torch.cat([getattr(p, name) for p in parts], -1) for name in _NAMES}
        return dataclasses.replace(parts[0], **joined)

    @staticmethod
    def stack(parts: Sequence[RowSums], lead: tuple[int, ...]) -> RowSums:
        """The sums of every head, each (query,), as one (*lead, query)."""
        joined = {
            name: torch.stack([getattr(p, name) for p in parts]).reshape(*lead, -1)
            for name in _NAMES
        }
        return dataclasses.replace(parts[0], **joined)


_NAMES = tuple(f.name for f in dataclasses.fields(RowSums) if f.name != "scanned")
