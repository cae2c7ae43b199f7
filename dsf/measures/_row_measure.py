"""The frame of every measure that gives one number a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf.measures._maps import MapLike, MapSource, open_map
from dsf.measures._row_formulas import FORMULAS
from dsf.measures._row_tiles import Queries, Rows, chosen_rows
from dsf.measures._rows import method_of, row_sums


def row_measure(
    name: str,
    system: MapLike,
    length: int | None,
    block: int | None,
    queries: Queries | None,
) -> xr.DataArray:
    """The quantity `name` of each row, labelled (*lead, query), with the rows' positions."""
    return row_quantities((name,), system, length, block, queries)[name]


def row_quantities(
    names: Sequence[str],
    system: MapLike,
    length: int | None,
    block: int | None,
    queries: Queries | None,
) -> dict[str, xr.DataArray]:
    """Several quantities of each row from one pass over the map."""
    source = open_map(system, length=length)
    rows = chosen_rows(f"dsf.{names[0]}", queries, source.n_query)
    wanted = {name: FORMULAS[name] for name in names}
    sums = row_sums(
        source, block, rows, signed=any(f.signed for f in wanted.values()),
        scans=all(f.scans for f in wanted.values()),
    )  # fmt: skip
    return {
        name: row_result(
            source, f.of(sums), name, rows, units=f.units, long_name=f.long_name,
            method=method_of(sums, rows),
        )
        for name, f in wanted.items()
    }  # fmt: skip


def row_result(
    source: MapSource, values: Tensor, name: str, rows: Rows | None, *,
    axes: tuple[str, ...] = (), coords: dict[str, Any] | None = None, **attrs: Any,
) -> xr.DataArray:  # fmt: skip
    """Values (*lead, query, *axes) of all rows, or of chosen ones, which keep their positions."""
    found = dict(coords or {})
    if rows is not None:
        at = torch.tensor(rows.positions)
        own = {n: (d, v[at.numpy()]) for n, (d, v) in source.coords.items()
               if tuple(d) == ("query",)}  # fmt: skip
        found = {"query": ("query", source.positions[0][at].numpy()), **own, **found}
    return source.result(
        values, ("query", *axes), name, coords=found, n_query=source.n_query, **attrs
    )
