"""Which share of a row's strength has each part of a map that is a sum of parts?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures._chunks import chunks_of, scannable
from dsf.measures._maps import MapLike, MapSource, open_map
from dsf.measures._row_measure import row_result
from dsf.measures._row_tiles import Queries, Rows, all_rows, chosen_rows, row_tiles
from dsf.memory import require_memory
from dsf.recurrence import Recurrence

__all__ = ["order_shares"]


def order_shares(
    parts: Mapping[str, MapLike],
    *,
    length: int | None = None,
    block: int | None = None,
    queries: Queries | None = None,
) -> xr.Dataset:
    """The share of each part in the squared weight of every row, and their cross terms.

        w = sum_a w_a,   share_a = ||w_a||^2 / ||w||^2,   cross_ab = 2 w_a.w_b / ||w||^2

    which add up to 1. For the orders of ZeroS the parts are the map with all gates but one at
    zero: {"zero": zeros_recurrence(q, k, s, o, o, g0), "first": (..., g1, o), "higher": (..., o,
    gh)} with o = 0 g1; likewise of `zeros_radial_recurrence`. There the zero order is orthogonal
    to both others, which are not orthogonal to each other; in the full map nothing is. Shares may
    exceed 1 where parts cancel.

    parts: name -> system or map, all of one shape. length, block, queries as `row_sum`. Returns a
    Dataset: `share` (batch, head, query, order), `cross` (batch, head, query, pair), `cross_term`
    their sum over the pairs; NaN for a row of zeros. Cost: where the parts are recurrences that
    differ in C alone, scans of the keys' Gram matrix, O(length x state x (state + chunk)); else
    row by row, O(length^2), or chosen rows alone. Raises DsfShapeError, DsfValueError.
    Source: Lu et al. (2025), sections 3.1-3.2; ZeroS attention, weight diagnostics.
    """
    if not parts:
        raise DsfValueError("dsf.order_shares: parts: expected at least one, got none.")
    names = list(parts)
    sources = [open_map(part, length=length) for part in parts.values()]
    first = sources[0]
    shapes = {n: (*s.lead_shape, s.n_query, s.n_key) for n, s in zip(names, sources, strict=True)}
    if len(set(shapes.values())) > 1:
        raise DsfShapeError(f"dsf.order_shares: parts: expected one shape, got {shapes}.")
    rows = chosen_rows("dsf.order_shares", queries, first.n_query)
    kept = first.n_query if rows is None else len(rows)
    require_memory(
        "dsf.order_shares", "products", (*first.lead_axes, "query", "order", "pair"),
        (*first.lead_shape, kept, 2 * len(names), len(names)), torch.float64,
        advice="Measure fewer heads or fewer rows (queries=).",
    )  # fmt: skip
    products = None if rows is not None else _scanned(sources, block)
    method = "scans of the keys' Gram matrix, float64, no map"
    if products is None:
        every = all_rows(first.n_query) if rows is None else rows
        products = _tiled(sources, every, block)
        method = f"{every.described}, each read whole, float64"
    return _dataset(first, rows, names, products, method)


def _dataset(
    source: MapSource, rows: Rows | None, names: list[str], products: Tensor, method: str
) -> xr.Dataset:
    """Shares and cross terms from w_a.w_b, (*lead, query, part, part)."""
    power = products.sum((-2, -1)).clamp(min=0)[..., None, None]
    shares = torch.where(power > 0, products / power.masked_fill(power <= 0, 1.0), torch.nan)
    pairs = list(itertools.combinations(range(len(names)), 2))
    cross = torch.zeros(*shares.shape[:-2], len(pairs), dtype=shares.dtype)
    for number, (a, b) in enumerate(pairs):
        cross[..., number] = 2 * shares[..., a, b]

    def labelled(values: Tensor, name: str, long_name: str, *axis: str, labels=()) -> xr.DataArray:
        coords = {axis[0]: (axis[0], list(labels))} if axis and labels else {}
        return row_result(source, values, name, rows, axes=axis, coords=coords, units="1",
                          long_name=long_name, method=method)  # fmt: skip

    return xr.Dataset({
        "share": labelled(shares.diagonal(dim1=-2, dim2=-1), "share",
                          "share of the squared weight", "order", labels=names),
        "cross": labelled(cross, "cross", "cross term of two parts", "pair",
                          labels=[f"{names[a]}.{names[b]}" for a, b in pairs]),
        "cross_term": labelled(cross.sum(-1), "cross_term", "sum of the cross terms"),
    })  # fmt: skip


def _scanned(sources: list[MapSource], chunk: int | None) -> Tensor | None:
    """w_a.w_b of every row, (batch, head, query, part, part), if the parts share A and B."""
    systems = [s.system for s in sources
               if scannable(s.system) and isinstance(s.system, Recurrence)]  # fmt: skip
    if len(systems) < len(sources):
        return None
    n_state = max(r.n_state for r in systems)
    if n_state > max(64, sources[0].n_query):
        return None
    found, gram = [], None
    walks = [chunks_of(r, sources[0].n_query, chunk) for r in systems]
    for pieces in zip(*walks, strict=True):
        one = pieces[0]
        for other in pieces[1:]:
            same = torch.equal(one.write, other.write) and torch.equal(one.carry, other.carry)
            if not same:
                return None
        local = torch.stack([p.local for p in pieces], -2)
        products = local @ local.mH
        if gram is not None:
            read = torch.stack([p.read for p in pieces], -2)
            products = products + read @ gram[:, :, None] @ read.mH
        found.append(products.real)
        fresh = one.write @ one.write.mH
        gram = fresh if gram is None else one.carry @ gram @ one.carry.mH + fresh
    return torch.cat(found, 2) if found else None


def _tiled(sources: list[MapSource], rows: Rows, block: int | None) -> Tensor:
    found = []
    for tiles in zip(*(row_tiles(s, rows, block) for s in sources), strict=True):
        stacked = torch.stack([tile for _, tile, _ in tiles], -2)
        found.append((stacked @ stacked.mH).real)
    n = len(sources)
    empty = torch.zeros(*sources[0].lead_shape, 0, n, n, dtype=torch.float64)
    return torch.cat([empty, *found], -3)


MEASURES = ()
