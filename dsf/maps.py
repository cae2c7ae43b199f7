"""Materialise: the attention map a system implies, whole or by tiles, bare or labelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfShapeError, DsfValueError
from dsf.factors import MixingRows, OneHot
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.transitions import Identity
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, total_length

Rows = slice | range | None
_KEY_BLOCK = 256


def materialise(
    system: System,
    queries: Rows = None,
    keys: Rows = None,
    *,
    length: int | None = None,
    backend: str = "auto",
    max_memory: int | None = None,
) -> Tensor:
    """The implied attention map, or any tile of it, without computing the rest.

        M_tj = C_t A_t ... A_{j+1} B_j + [t = j] D_t   for j <= t, else 0

    Returns (batch, head, query, key); with a channel axis after head when a gate makes the map
    differ by channel; with (output, input) at the end when there are several. `queries` and
    `keys` are contiguous slices of positions (0-based). `length` is needed for a time-invariant
    system. The zero half of a causal map is exactly zero. Cost: O(queries x keys x state), by a
    scan over one-hot values. Raises DsfMemoryError, with the size, before allocating more than
    `max_memory` bytes (default 80 % of what is free). Source: Sieber et al. (2024), equation 12.
    """
    total = _length(system, length)
    rows, cols = _range("queries", queries, total), _range("keys", keys, total)
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
    backend: str = "auto",
    max_memory: int | None = None,
    **attrs: Any,
) -> xr.DataArray:
    """`materialise` as a labelled array: tokens as coordinates, and what it is in attrs.

    `tokens` are the texts of all positions; they become the coordinates `query_token` and
    `key_token` beside the integer positions. attrs: system, structure, gauge, mode, precision,
    dsf_version and any keyword given.
    """
    total = _length(system, length)
    if tokens is not None and len(tokens) != total:
        raise DsfShapeError(
            f"dsf.attention_map: tokens: expected {total} texts, got {len(tokens)}; the length is "
            f"fixed by the recurrence."
        )
    values = materialise(
        system, queries, keys, length=length, backend=backend, max_memory=max_memory)  # fmt: skip
    rows, cols = _range("queries", queries, total), _range("keys", keys, total)
    axes, _, _ = _result_shape(system, rows, cols)
    coords: dict[str, Any] = {"query": ("query", list(rows)), "key": ("key", list(cols))}
    if tokens is not None:
        coords["query_token"] = ("query", [str(tokens[i]) for i in rows])
        coords["key_token"] = ("key", [str(tokens[i]) for i in cols])
    return to_xarray(
        values, axes, name="attention_map", coords=coords,
        attrs={**system_attrs(system), "units": "1", "long_name": "implied attention weight", **attrs},
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


def _map(system: System, rows: range, cols: range, backend: str) -> Tensor:
    if isinstance(system, Gated):
        inner = _map(system.system, rows, cols, backend)
        gate = system.gate
        gate = gate[:, rows.start : rows.stop] if gate.shape[1] > 1 else gate
        return gate.permute(0, 2, 3, 1)[..., None] * inner.unsqueeze(2)
    if isinstance(system, Bidirectional):
        r = system.causal
        if (
            isinstance(r.C, MixingRows)
            and r.C is system.anticausal.recurrence.C
            and (system.anticausal.strict and r.D is None)
        ):
            return r.C.tile(slice(rows.start, rows.stop), slice(cols.start, cols.stop))
        return _map(r, rows, cols, backend) + _map(system.anticausal, rows, cols, backend)
    if isinstance(system, Anticausal):
        return _anticausal_map(system, rows, cols, backend)
    if (
        isinstance(system.C, MixingRows)
        and isinstance(system.B, OneHot)
        and (isinstance(system.A, Identity) and system.B.offset == 0 and system.D is None)
    ):
        tile = system.C.tile(slice(rows.start, rows.stop), slice(cols.start, cols.stop))
        return tile if system.C.causal else tile * _lower(rows, cols, tile)
    return _causal_map(system, rows, cols, backend)


def _causal_map(r: Recurrence, rows: range, cols: range, backend: str) -> Tensor:
    blocks = [
        _key_block(r, rows, range(k, min(k + _KEY_BLOCK, cols.stop)), backend)
        for k in range(cols.start, cols.stop, _KEY_BLOCK)
    ]
    if not blocks:
        _, shape, dtype = _result_shape(r, rows, cols)
        return torch.zeros(shape, dtype=dtype, device=r.device)
    return torch.cat(blocks, dim=3)


def _key_block(r: Recurrence, rows: range, cols: range, backend: str) -> Tensor:
    """Columns `cols`: run the system from their first key on one-hot values, one channel each."""
    batch, _, head = r.lead_shape()
    dtype = torch.promote_types(r.dtype, torch.float32)
    n_in, n_out = r.n_input, r.n_output
    first, last = cols.start, max(rows.stop, cols.start)
    steps = last - first
    out = torch.zeros(batch, len(rows), head, n_out, n_in * len(cols), dtype=_out_dtype(r, dtype),
                      device=r.device)  # fmt: skip
    if steps > 0 and len(rows):
        impulses = torch.zeros(steps, n_in, len(cols), n_in, dtype=dtype, device=r.device)
        alive = min(steps, len(cols))
        index = torch.arange(alive, device=r.device)
        for i in range(n_in):
            impulses[index, i, index, i] = 1
        u = impulses.flatten(2).expand(batch, steps, head, n_in, -1) if n_in > 1 else (
            impulses.flatten(1).expand(batch, 1, steps, -1).transpose(1, 2).expand(
                batch, steps, head, -1))  # fmt: skip
        part = r.time_slice(first, last).replace(initial_state=None)
        y = scan(part, u, backend, allow_nonfinite=True)  # type: ignore[call-overload]
        y = y.unsqueeze(3) if n_out == 1 else y
        seen = range(max(rows.start, first), rows.stop)
        out[:, seen.start - rows.start :] = y[:, seen.start - first : seen.stop - first]
    tile = out.unflatten(-1, (len(cols), n_in)).permute(0, 2, 1, 4, 3, 5)
    return tile[..., 0, 0] if n_in == n_out == 1 else tile


def _anticausal_map(system: Anticausal, rows: range, cols: range, backend: str) -> Tensor:
    r = system.recurrence
    total = max(r.length, rows.stop, cols.stop)
    if isinstance(r.C, MixingRows) and isinstance(r.B, OneHot) and r.D is None:
        tile = r.C.tile(slice(rows.start, rows.stop), slice(cols.start, cols.stop))
        upper = 1 - _lower(rows, cols, tile, -1 if not system.strict else 0)
        return tile * upper
    back_rows = range(total - rows.stop, total - rows.start)
    back_cols = range(total - cols.stop, total - cols.start)
    tile = _causal_map(r.flip_time(), back_rows, back_cols, backend).flip(2, 3)
    if not system.strict:
        return tile
    own = range(max(rows.start, cols.start), min(rows.stop, cols.stop))
    if len(own):
        index = torch.arange(own.start, own.stop)
        D = 0 if r.D is None else r.D.expand(*r.D.shape[:1], total, *r.D.shape[2:])[:, index]
        kept = torch.as_tensor(D, dtype=tile.dtype)
        diagonal = tile[:, :, index - rows.start, index - cols.start]
        kept = kept.transpose(1, 2) if kept.ndim else kept
        tile = tile.clone()
        value = kept[..., 0, 0] if kept.ndim == 5 and tile.ndim == 4 else kept
        tile[:, :, index - rows.start, index - cols.start] = value.expand_as(diagonal)
    return tile


def _lower(rows: range, cols: range, like: Tensor, shift: int = 0) -> Tensor:
    q = torch.arange(rows.start, rows.stop, device=like.device)[:, None]
    k = torch.arange(cols.start, cols.stop, device=like.device)
    return (k <= q + shift).to(like.dtype)


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


def _range(name: str, asked: Rows, total: int) -> range:
    if asked is None:
        return range(total)
    found = range(*asked.indices(total)) if isinstance(asked, slice) else asked
    if found.step != 1 or (len(found) and (found.start < 0 or found.stop > total)):
        raise DsfValueError(
            f"dsf.materialise: {name}: expected a contiguous range within 0..{total}, got {asked}."
        )
    return range(found.start, max(found.stop, found.start))


def _out_dtype(r: Recurrence, dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if r.real_output and dtype.is_complex else dtype


def _result_shape(system: System, rows: range, cols: range) -> tuple[list, list, torch.dtype]:
    r = core(system)
    batch, _, head = r.lead_shape()
    axes, shape = ["batch", "head"], [batch, head]
    if isinstance(system, Gated):
        gate = system.gate.shape
        shape = [max(batch, gate[0]), max(head, gate[2])]
        axes, shape = [*axes, "channel"], [*shape, gate[3]]
    axes, shape = [*axes, "query", "key"], [*shape, len(rows), len(cols)]
    if r.n_input > 1 or r.n_output > 1:
        axes, shape = [*axes, "output", "input"], [*shape, r.n_output, r.n_input]
    return axes, shape, _out_dtype(r, torch.promote_types(r.dtype, torch.float32))
