"""Materialise: the attention map a system implies, whole or by tiles, bare or labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import map_coords, to_xarray
from dsf.errors import DsfTypeError, DsfValueError
from dsf.kernel_maps import kernel_map, map_gap
from dsf.memory import require_memory
from dsf.mixing_rows import MixingRows, Part
from dsf.recurrence import Recurrence
from dsf.scanning import Backend, run_one
from dsf.shapes import Inexact, broadcast_shapes
from dsf.transitions._base import real_dtype
from dsf.validation import check_system
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, is_cache, total_length

Rows: TypeAlias = slice | range | None
_KEY_BLOCK = 256
"""How many columns of a map are made in one scan, each as one channel."""


def materialise(
    system: System,
    queries: Rows = None,
    keys: Rows = None,
    *,
    length: int | None = None,
    backend: Backend = "auto",
    max_memory: int | None = None,
    allow_nonfinite: bool = False,
) -> Inexact[Tensor, "batch head *rest"]:
    """The implied attention map, or any tile of it, without computing the rest.

        M_tj = C_t A_t ... A_{j+1} B_j + [t = j] D_t   for j <= t, else 0

    Returns (batch, head, query, key); with a channel axis after head when a gate makes the map
    differ by channel; with (output, input) at the end when there are several. `queries` and
    `keys` are contiguous slices of positions (0-based). `length` is needed for a time-invariant
    system. The zero half of a causal map is exactly zero; the initial state has no part in it.
    Cost: O(queries x keys x state), by a scan over one-hot values, or by a kernel that writes
    the tile once (CUDA, up to float32, no gradient wanted; `kernel_maps.map_gap`). Raises
    DsfMemoryError, with the size, before allocating more than `max_memory` bytes (default 80 % of
    what is free); DsfShapeError, DsfTypeError, DsfValueError as `scan`.
    Source: Sieber et al. (2024), eq. 12.
    """
    check_system("dsf.materialise", system, allow_nonfinite=allow_nonfinite)
    total = _length(system, length)
    rows, cols = spans("dsf.materialise", queries, keys, total)
    axes, shape, dtype = _result_shape(system, rows, cols)
    require_memory(
        "dsf.materialise", "map", axes, shape, dtype, device=core(system).device,
        max_memory=max_memory,
        advice="Ask for a tile with queries= and keys=, or raise max_memory=.",
    )  # fmt: skip
    return _map(system, rows, cols, backend)


def attention_map(
    system: System,
    queries: Rows = None,
    keys: Rows = None,
    *,
    tokens: Sequence[str] | None = None,
    length: int | None = None,
    backend: Backend = "auto",
    max_memory: int | None = None,
    **attrs: Any,
) -> xr.DataArray:
    """`materialise` as a labelled array: tokens as coordinates, and what it is in attrs.

    `tokens` are the texts of all positions; they become the coordinates `query_token` and
    `key_token` beside the integer positions. attrs: system, structure, gauge, mode, precision,
    dsf_version and any keyword given. Raises DsfShapeError unless there is one text per position,
    and as `materialise`.
    """
    check_system("dsf.attention_map", system, allow_nonfinite=True)
    total = _length(system, length)
    rows, cols = spans("dsf.materialise", queries, keys, total)
    coords = map_coords("dsf.attention_map", total, rows, cols, tokens)
    values = materialise(
        system, queries, keys, length=length, backend=backend, max_memory=max_memory)  # fmt: skip
    axes, _, _ = _result_shape(system, rows, cols)
    labels = {"units": "1", "long_name": "implied attention weight"}
    return to_xarray(
        values, axes, name="attention_map", coords=coords,
        attrs={**system_attrs(system), **labels, **attrs},
    )  # fmt: skip


def system_attrs(system: System) -> dict[str, Any]:
    """The labels that every map and measure of a system carries."""
    r = core(system)
    return {
        "system": r.system, "structure": r.structure, "gauge": r.gauge, "mode": r.mode,
        "n_state": r.n_state,
        "direction": {Recurrence: "causal", Anticausal: "anticausal"}.get(
            type(_ungated(system)), "bidirectional"),
        "gated": isinstance(system, Gated),
    }  # fmt: skip


# -- by kind of system -------------------------------------------------------------------------


def _map(system: System, rows: range, cols: range, backend: Backend) -> Tensor:
    if isinstance(system, Gated):
        return _gated_map(system, rows, cols, backend)
    if isinstance(system, Bidirectional):
        one, two = system.causal, system.anticausal
        if system.is_one_map and one.D is None and two.recurrence.D is None:
            return _tile(one, rows, cols)
        return _map(one, rows, cols, backend) + _map(two, rows, cols, backend)
    part: Part = "causal"
    if isinstance(system, Anticausal):
        part = "strict" if system.strict else "anticausal"
    r = core(system)
    if is_cache(r) and r.B.offset == 0 and r.D is None:  # type: ignore[union-attr]
        tile = _tile(r, rows, cols)
        return tile.masked_fill(~_in_part(part, rows, cols, tile.device), 0)
    return _scanned_map(r, rows, cols, backend, part)


def _gated_map(system: Gated, rows: range, cols: range, backend: Backend) -> Tensor:
    inner = _map(system.system, rows, cols, backend)
    gate = system.gate
    gate = gate[:, rows.start : rows.stop] if gate.shape[1] > 1 else gate
    gate = gate.permute(0, 2, 3, 1)[(...,) + (None,) * (inner.ndim - 3)]
    return gate[:, :, 0] * inner if gate.shape[2] == 1 else gate * inner.unsqueeze(2)


def _tile(r: Recurrence, rows: range, cols: range) -> Tensor:
    C = cast(MixingRows, r.C)
    return C.tile(slice(rows.start, rows.stop), slice(cols.start, cols.stop))


def _in_part(part: Part, rows: range, cols: range, device: torch.device) -> Tensor:
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(cols.start, cols.stop, device=device)
    return {"causal": key <= query, "anticausal": key >= query, "strict": key > query}[part]


def _scanned_map(r: Recurrence, rows: range, cols: range, backend: Backend, part: Part) -> Tensor:
    r = r.replace(initial_state=None)
    if part == "causal" and backend in ("auto", "triton") and not map_gap(r):
        return kernel_map(r, rows, cols)
    blocks = [
        _key_block(r, rows, range(k, min(k + _KEY_BLOCK, cols.stop)), backend, part)
        for k in range(cols.start, cols.stop, _KEY_BLOCK)
    ]
    if not blocks:
        _, shape, dtype = _result_shape(r, rows, cols)
        return torch.zeros(shape, dtype=dtype, device=r.device)
    return torch.cat(blocks, dim=3)


def _key_block(r: Recurrence, rows: range, cols: range, backend: Backend, part: Part) -> Tensor:
    """Columns `cols`: run the steps between keys and queries on impulses, one channel each."""
    batch, _, head = r.lead_shape()
    n_in, n_out, n_key = r.n_input, r.n_output, len(cols)
    first, last = (cols.start, rows.stop) if part == "causal" else (rows.start, cols.stop)
    seen = range(max(rows.start, first), min(rows.stop, last))
    dtype = torch.promote_types(real_dtype(r.dtype), torch.float32)
    if not len(seen):
        zero_dtype = dtype if r.real_output else torch.promote_types(r.dtype, dtype)
        out = torch.zeros(batch, len(rows), head, n_out, n_key * n_in, dtype=zero_dtype,
                          device=r.device)  # fmt: skip
    else:
        at = torch.arange(first, last, device=r.device)[:, None]
        hit = at == torch.arange(cols.start, cols.stop, device=r.device)
        eye = torch.eye(n_in, dtype=torch.bool, device=r.device)
        impulses = (hit[:, None, :, None] & eye[:, None]).flatten(2).to(dtype)
        u = impulses[None, :, None].expand(batch, -1, head, -1, -1)
        y, _ = run_one(r.time_slice(first, last), u, backend, None, part)
        y = y[:, seen.start - first : seen.stop - first]
        blank = (0, 0) * 3
        out = torch.nn.functional.pad(
            y, (*blank, seen.start - rows.start, rows.stop - seen.stop))  # fmt: skip
    tile = out.unflatten(-1, (n_key, n_in)).permute(0, 2, 1, 4, 3, 5)
    return tile[..., 0, 0] if n_in == n_out == 1 else tile


# -- sizes -------------------------------------------------------------------------------------


def _ungated(system: System) -> System:
    return _ungated(system.system) if isinstance(system, Gated) else system


def _length(system: System, length: int | None) -> int:
    own = total_length(system)
    if own != 1 or length is None:
        if length not in (None, own):
            raise DsfValueError(
                f"dsf.materialise: length: expected {own}, got {length}; the recurrence fixes it."
            )
        return own
    return length


def spans(function: str, queries: Rows, keys: Rows, total: int) -> tuple[range, range]:
    """The positions of a tile's rows and columns; see `span`."""
    return span(function, "queries", queries, total), span(function, "keys", keys, total)


def span(function: str, name: str, asked: Any, total: int) -> range:
    """The positions 0..total-1 that `asked` means, all for None.

    Raises DsfTypeError on what is no slice or range, DsfValueError on gaps and on positions that
    do not exist; `function` and `name` are for the message.
    """
    if asked is None:
        return range(total)
    if not isinstance(asked, slice | range):
        raise DsfTypeError(
            f"{function}: {name}: expected a slice or a range of positions, got {asked!r}. For "
            f"one position t give range(t, t + 1)."
        )
    found = range(*asked.indices(total)) if isinstance(asked, slice) else asked
    if found.step != 1 or (len(found) and (found.start < 0 or found.stop > total)):
        raise DsfValueError(
            f"{function}: {name}: expected a contiguous range within 0..{total}, got {asked}."
        )
    return range(found.start, max(found.stop, found.start))


def _result_shape(system: System, rows: range, cols: range) -> tuple[list, list, torch.dtype]:
    r = core(system).replace(initial_state=None)
    batch, _, head = r.lead_shape()
    axes, shape = ["batch", "head"], [batch, head]
    if isinstance(system, Gated):
        gate = system.gate.shape
        shape = list(broadcast_shapes((batch, head), (gate[0], gate[2])))
        if gate[3] > 1:
            axes, shape = [*axes, "channel"], [*shape, gate[3]]
    axes, shape = [*axes, "query", "key"], [*shape, len(rows), len(cols)]
    if r.n_input > 1 or r.n_output > 1:
        axes, shape = [*axes, "output", "input"], [*shape, r.n_output, r.n_input]
    dtype = torch.promote_types(r.dtype, torch.float32)
    return axes, shape, real_dtype(dtype) if r.real_output else dtype
