"""A system, a tensor or a labelled map behind one face: tiles of an attention map."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfTypeError
from dsf.factors import MixingRows, SoftmaxRows
from dsf.maps import materialise, system_attrs
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, total_length

MapLike = System | Tensor | xr.DataArray
"""What every measure of an attention map takes; a map already at hand is not made again."""

TILE_BYTES = 2**25
"""Tiles are about this large in float64, so that row statistics need memory O(length x block)."""


@dataclasses.dataclass(frozen=True)
class MapSource:
    """Tiles (*lead, query, key) of a map, which keys each row may see, and the labels to keep.

    `system` is what the tiles come from, None for a map that is there already.
    """

    lead_axes: tuple[str, ...]
    lead_shape: tuple[int, ...]
    n_query: int
    n_key: int
    read: Callable[[range, range], Tensor]
    visible: Callable[[range, range], Tensor]
    by_rows: bool
    attrs: dict[str, Any]
    coords: dict[str, Any]
    positions: tuple[Tensor, Tensor]
    system: System | None = None

    def tiles(self, block: int | None = None) -> Iterator[tuple[range, list[range]]]:
        """Row ranges with the key ranges that cover them, in the cheap direction.

        Rows of a softmax need all their keys at once; columns of a recurrence are made by one
        scan from their first key on, so that long maps are read by columns.
        """
        across = self.n_key if self.by_rows else self.n_query
        if block is None:
            one = 8 * math.prod(self.lead_shape) * max(across, 1)
            block = max(1, TILE_BYTES // max(one, 1))
        if self.by_rows:
            for rows in _blocks(self.n_query, block):
                yield rows, [range(self.n_key)]
        elif self.n_query:
            yield range(self.n_query), _blocks(self.n_key, block)

    def result(
        self, values: Tensor, axes: tuple[str, ...], name: str, *,
        lead: tuple[str, ...] | None = None, coords: dict[str, Any] | None = None, **attrs: Any,
    ) -> xr.DataArray:  # fmt: skip
        """The labelled outcome (*lead, *axes) with this source's coordinates and attrs."""
        dims = (*(self.lead_axes if lead is None else lead), *axes)
        kept = {n: c for n, c in self.coords.items() if set(c[0]) <= set(dims)}
        return to_xarray(
            values, dims, name=name, coords={**kept, **(coords or {})},
            attrs={**self.attrs, **attrs},
        )  # fmt: skip


def open_map(system: MapLike, *, length: int | None = None) -> MapSource:
    """The source of tiles for a system, a tensor ([batch, head, [channel,]] query, key) or a map.

    Raises DsfTypeError on anything else, DsfShapeError on axes that are not a map's.
    """
    if isinstance(system, xr.DataArray):
        return _from_array(system)
    if isinstance(system, Tensor):
        return _from_tensor(system)
    if isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        return _from_system(with_length(system, length))
    raise DsfTypeError(
        f"dsf.measures: system: expected a dsf system, a tensor (batch, head, query, key) or a "
        f"DataArray with dims query and key, got {type(system)}."
    )


def precision_of(r: Recurrence, *, real: bool = True) -> str:
    """The name of the dtype that a recurrence's numbers (or its map, if not `real`) have."""
    dtype = torch.promote_types(r.dtype, torch.float32)
    dtype = dtype.to_real() if real and dtype.is_complex else dtype
    return str(dtype).removeprefix("torch.")


def with_length(system: Any, length: int | None = None) -> Any:
    """A system whose recurrences all have their full length: time-invariant ones are spread.

    Views, no memory. `length` counts only where the system itself does not fix it. Maps are
    returned as they are.
    """
    if not isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        return system
    own = total_length(system)
    return _spread_time(system, length if own == 1 and length is not None else own)


def _spread_time(system: Any, length: int) -> Any:
    if isinstance(system, Gated):
        return Gated(_spread_time(system.system, length), system.gate)
    if isinstance(system, Anticausal):
        return Anticausal(_spread_time(system.recurrence, length), system.strict)
    if isinstance(system, Bidirectional):
        return Bidirectional(
            _spread_time(system.causal, length), _spread_time(system.anticausal, length)
        )
    if system.length == length or not isinstance(system.B, Tensor):
        return system
    return system.replace(B=system.B.expand(-1, length, -1, -1, -1))


def whole_map(source: MapSource, max_memory: int | None = None, advice: str = "") -> Tensor:
    """The map (*lead, query, key) in float64 (or complex128), refused when it would not fit."""
    dtype = torch.complex128 if source.attrs["precision"].startswith("complex") else torch.float64
    require_memory(
        "dsf.measures", "map", (*source.lead_axes, "query", "key"),
        (*source.lead_shape, source.n_query, source.n_key), dtype, max_memory=max_memory,
        advice=advice or "Measure fewer heads or a shorter input.",
    )  # fmt: skip
    return widened(source.read(range(source.n_query), range(source.n_key)))


def widened(tile: Tensor) -> Tensor:
    """Double precision, real or complex: sums of weights are taken in it."""
    return tile.detach().to(torch.complex128 if tile.is_complex() else torch.float64)


# -- the three kinds ---------------------------------------------------------------------------


def _from_system(system: System) -> MapSource:
    r = core(system)
    total = total_length(system)
    batch, _, head = r.lead_shape()
    axes, shape = ["batch", "head"], [batch, head]
    if isinstance(system, Gated):
        gate = system.gate.shape
        shape = [max(batch, gate[0]), max(head, gate[2])]
        if gate[3] > 1:  # a gate of one channel leaves the map without that axis
            axes, shape = [*axes, "channel"], [*shape, gate[3]]
    several = r.n_input > 1 or r.n_output > 1
    if several:
        axes, shape = [*axes, "output", "input"], [*shape, r.n_output, r.n_input]

    def read(rows: range, cols: range) -> Tensor:
        with torch.no_grad():
            tile = materialise(system, rows, cols)
        return tile.movedim((-2, -1), (-4, -3)) if several else tile

    def visible(rows: range, cols: range) -> Tensor:
        seen = _visible(system, rows, cols)
        spare = len(axes) - 2
        return seen if seen.ndim == 2 else seen[(slice(None), slice(None), *[None] * spare)]

    _require_rows(tuple(axes), tuple(shape), total)
    index = torch.arange(total)
    return MapSource(
        tuple(axes), tuple(shape), total, total, read, visible, isinstance(r.C, MixingRows),
        {**system_attrs(system), "precision": precision_of(r, real=r.real_output)}, {},
        (index, index), system,
    )  # fmt: skip


def _visible(system: System, rows: range, cols: range) -> Tensor:
    """Keys that each row may use at all, (query, key) or (batch, head, query, key)."""
    if isinstance(system, Gated):
        return _visible(system.system, rows, cols)
    if isinstance(system, Bidirectional):
        both = (_visible(s, rows, cols) for s in (system.causal, system.anticausal))
        return torch.logical_or(*both)
    r = core(system)
    lag = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(cols.start, cols.stop)
    if isinstance(system, Anticausal):
        seen = lag < 0 if system.strict and r.D is None else lag <= 0
    else:
        seen = lag >= 0
    if isinstance(r.C, SoftmaxRows):
        seen = seen & seen_keys(r.C, rows, cols).cpu()
    return seen


def seen_keys(C: SoftmaxRows, rows: range, cols: range) -> Tensor:
    """Keys whose logit is not -inf: causality, window, key mask and bias together."""
    if C.bias is not None:
        return C.logits(slice(rows.start, rows.stop), slice(cols.start, cols.stop)) > -math.inf
    return C._visible(rows, cols, C.query.device)


def _from_tensor(weights: Tensor) -> MapSource:
    names = {2: (), 4: ("batch", "head"), 5: ("batch", "head", "channel")}
    if weights.ndim not in names:
        raise DsfShapeError(
            f"dsf.measures: map: expected axes (query, key), (batch, head, query, key) or (batch, "
            f"head, channel, query, key), got {tuple(weights.shape)}."
        )
    index = [torch.arange(n) for n in weights.shape[-2:]]
    return _from_values(weights, names[weights.ndim], {}, {}, index[0], index[1])


def _from_array(array: xr.DataArray) -> MapSource:
    if not {"query", "key"} <= set(array.dims):
        raise DsfShapeError(f"dsf.measures: map: expected dims query and key, got {array.dims}.")
    lead = [str(d) for d in array.dims if d not in ("query", "key")]
    ordered = array.transpose(*lead, "query", "key")
    weights = torch.from_numpy(np.array(ordered.values))
    position = [
        torch.as_tensor(np.array(array[d].values)) if d in array.coords else torch.arange(n)
        for d, n in (("query", weights.shape[-2]), ("key", weights.shape[-1]))
    ]
    coords = {
        str(n): (c.dims, c.values)
        for n, c in array.coords.items()
        if "key" not in c.dims and len(c.dims)
    }
    own = ("units", "long_name", "schema_version", "dsf_version")
    attrs = {str(n): v for n, v in array.attrs.items() if n not in own}
    return _from_values(weights, tuple(lead), attrs, coords, position[0], position[1])


def _from_values(
    weights: Tensor, lead: tuple[str, ...], attrs: dict, coords: dict, query: Tensor, key: Tensor
) -> MapSource:
    _require_rows(lead, tuple(weights.shape[: len(lead)]), len(query))
    lag = query[:, None] - key
    direction = attrs.get("direction") or _direction(weights, lag)
    seen = {"causal": lag >= 0, "anticausal": lag <= 0}.get(direction, torch.ones_like(lag) > 0)
    precision = attrs.get("precision", str(weights.dtype).removeprefix("torch."))

    def read(rows: range, cols: range) -> Tensor:
        return weights[..., rows.start : rows.stop, cols.start : cols.stop]

    def visible(rows: range, cols: range) -> Tensor:
        return seen[rows.start : rows.stop, cols.start : cols.stop]

    return MapSource(
        lead, tuple(weights.shape[: len(lead)]), len(query), len(key), read, visible, True,
        {**attrs, "direction": direction, "precision": precision}, coords, (query, key),
    )  # fmt: skip


def _require_rows(axes: tuple[str, ...], shape: tuple[int, ...], n_query: int) -> None:
    """Refuse what has no room for one number a row."""
    require_memory(
        "dsf.measures", "one number a row", (*axes, "query"), (*shape, n_query), torch.float64,
        advice="Measure fewer samples or heads at a time.",
    )  # fmt: skip


def _direction(weights: Tensor, lag: Tensor) -> str:
    """Causal when nothing above the diagonal is non-zero."""
    above = (weights != 0) & (lag < 0).to(weights.device)
    if not bool(above.any()):
        return "causal"
    below = (weights != 0) & (lag > 0).to(weights.device)
    return "bidirectional" if bool(below.any()) else "anticausal"


def _blocks(total: int, block: int) -> list[range]:
    return [range(i, min(i + block, total)) for i in range(0, total, block)]
