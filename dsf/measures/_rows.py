"""Sums over each row of a map: by scans where they have them, by tiles, or of some rows alone."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsf.measures._maps import MapSource, widened
from dsf.measures._row_scans import scanned_sums
from dsf.measures._row_tiles import Rows, row_tiles
from dsf.measures._row_totals import RowSums
from dsf.measures._softmax_sums import softmax_sums
from dsf.memory import require_memory

__all__ = ["RowSums", "method_of", "row_sums", "share"]


def row_sums(
    source: MapSource, block: int | None = None, rows: Rows | None = None, *,
    signed: bool = True, scans: bool = True,
) -> RowSums:  # fmt: skip
    """The sums of every row, or of the rows asked for; memory O(length x block).

    By scans, without the map, where the system allows: count, mean, squares and first key of any
    recurrence with dense coefficients; with `signed` the absolute and negative sums too, which
    scans give for one state and for coefficients without negative entries. Else tile by tile,
    always with `scans=False`: of plain softmax attention from the logits of a block of rows.
    """
    kept = source.n_query if rows is None else len(rows)
    require_memory(
        "dsf.measures", "row sums", (*source.lead_axes, "query", "quantity"),
        (*source.lead_shape, kept, len(dataclasses.fields(RowSums))), torch.float64,
        advice="Measure fewer heads or fewer rows (queries=).",
    )  # fmt: skip
    if rows is not None:
        parts = [_tile_sums(source, tile, seen, at, range(source.n_key))
                 for at, tile, seen in row_tiles(source, rows, block)]  # fmt: skip
        return RowSums.cat(parts) if parts else _empty(source, 0)
    found = scanned_sums(source, block, signed=signed) if scans else None
    found = softmax_sums(source.system, block) if found is None else found
    return found if found is not None else _by_tiles(source, block)


def method_of(sums: RowSums, rows: Rows | None) -> str:
    """How the sums were had, for attrs."""
    if rows is not None:
        return f"{rows.described}, float64"
    return "float64 scans, no map" if sums.scanned else "float64 sums by tiles"


def _by_tiles(source: MapSource, block: int | None) -> RowSums:
    parts = []
    for rows, columns in source.tiles(block):
        total: RowSums | None = None
        at = torch.arange(rows.start, rows.stop)
        for cols in columns:
            tile, seen = source.read(rows, cols), source.visible(rows, cols)
            part = _tile_sums(source, tile, seen, at, cols)
            total = part if total is None else total.merge(part)
        if total is not None:
            parts.append(total)
    return RowSums.cat(parts) if parts else _empty(source, source.n_query)


def _empty(source: MapSource, n: int) -> RowSums:
    return RowSums.same(torch.zeros(*source.lead_shape, n, dtype=torch.float64))


def _tile_sums(
    source: MapSource, tile: Tensor, seen: Tensor, rows: Tensor, cols: range
) -> RowSums:
    w = widened(tile)
    seen = seen.to(w.device).expand(w.shape)
    count = seen.sum(-1).to(torch.float64)
    mean = w.sum(-1) / count.clamp(min=1)
    squares = ((w - mean[..., None]).abs() ** 2 * seen).sum(-1)
    size = w.abs()
    below = torch.full_like(size, torch.nan) if w.is_complex() else (-w).clamp(min=0)
    query, key = source.positions
    key = key[cols.start : cols.stop]
    first = key == source.positions[1].min()
    lag = (query[rows][:, None] - key).abs().to(w.device, torch.float64)
    return RowSums(
        count=count, mean=mean, squares=squares, absolute=size.sum(-1), negative=below.sum(-1),
        n_negative=torch.where(below.isnan(), below, (below > 0).to(below.dtype)).sum(-1),
        log_moment=torch.xlogy(size, size).sum(-1), first=(size * first.to(w.device)).sum(-1),
        distance=(size * lag).sum(-1),
    )  # fmt: skip


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, NaN for a row without any weight."""
    alive = whole > 0
    return torch.where(alive, part / whole.masked_fill(~alive, 1.0), math.nan)
