"""Sums over each row of a map, gathered tile by tile, from which the row measures follow."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.measures._maps import MapSource, widened


@dataclasses.dataclass(frozen=True)
class RowSums:
    """Over the n keys that a row w may see, each (*lead, query).

    count n, mean, centred squares sum |w - mean|^2, absolute sum |w|, negative sum max(-w, 0),
    n_negative, log_moment sum |w| ln |w|, first |w| at the first key.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    absolute: Tensor
    negative: Tensor
    n_negative: Tensor
    log_moment: Tensor
    first: Tensor

    def merge(self, other: RowSums) -> RowSums:
        """The sums of two disjoint sets of keys (Chan, Golub and LeVeque, 1983)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        gap = other.mean - self.mean
        added = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("absolute", "negative", "n_negative", "log_moment", "first")
        }
        return RowSums(
            count=count, mean=self.mean + share * gap,
            squares=self.squares + other.squares + self.count * share * gap.abs() ** 2, **added,
        )  # fmt: skip


def row_sums(source: MapSource, block: int | None = None) -> RowSums:
    """The sums of every row. Memory O(length x block). Squares are centred: no cancellation."""
    parts = []
    for rows, columns in source.tiles(block):
        total: RowSums | None = None
        for cols in columns:
            part = _tile_sums(source, rows, cols)
            total = part if total is None else total.merge(part)
        if total is not None:
            parts.append(total)
    if not parts:
        empty = torch.zeros(*source.lead_shape, source.n_query, dtype=torch.float64)
        return RowSums(*[empty] * 8)
    return RowSums(*[torch.cat([getattr(p, f.name) for p in parts], -1)
                     for f in dataclasses.fields(RowSums)])  # fmt: skip


def _tile_sums(source: MapSource, rows: range, cols: range) -> RowSums:
    w = widened(source.read(rows, cols))
    seen = source.visible(rows, cols).to(w.device).expand(w.shape)
    count = seen.sum(-1).to(torch.float64)
    mean = w.sum(-1) / count.clamp(min=1)
    squares = ((w - mean[..., None]).abs() ** 2 * seen).sum(-1)
    size = w.abs()
    below = torch.full_like(size, torch.nan) if w.is_complex() else (-w).clamp(min=0)
    first = source.positions[1][cols.start : cols.stop] == source.positions[1].min()
    return RowSums(
        count=count, mean=mean, squares=squares, absolute=size.sum(-1), negative=below.sum(-1),
        n_negative=torch.where(below.isnan(), below, (below > 0).to(below.dtype)).sum(-1),
        log_moment=torch.xlogy(size, size).sum(-1), first=(size * first.to(w.device)).sum(-1),
    )  # fmt: skip


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN for a row without any weight."""
    alive = whole > 0
    return torch.where(alive, part / whole.masked_fill(~alive, 1.0), torch.nan)
