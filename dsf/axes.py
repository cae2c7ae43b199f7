"""The one list of axis names, and the one place where a tensor becomes an xarray object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfShapeError, DsfTypeError

AXES = (
    "system", "layer", "batch", "head", "channel", "query", "key", "time", "state", "state_out",
    "state_in", "input", "output", "value", "feature", "rank", "chunk", "step", "order", "pair",
    "epsilon", "eta",
)  # fmt: skip
"""Every dimension name that a dsf result may carry, in the order in which they appear."""

B_AXES = ("batch", "time", "head", "state", "input")
C_AXES = ("batch", "time", "head", "output", "state")
D_AXES = ("batch", "time", "head", "output", "input")
VALUE_AXES = ("batch", "time", "head", "input", "channel")
STATE_AXES = ("batch", "head", "state", "channel")
GATE_AXES = ("batch", "time", "head", "channel")

_WIDENED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def named_sizes(names: Sequence[str], sizes: Sequence[int | str]) -> str:
    """`(batch=2, time=64)`: how shapes are written in every message."""
    return "(" + ", ".join(f"{n}={s}" for n, s in zip(names, sizes, strict=True)) + ")"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A NumPy copy of any dense tensor: detached, conjugate resolved, 16-bit floats widened."""
    if not isinstance(tensor, Tensor):
        raise DsfTypeError(f"dsf.to_numpy: tensor: expected torch.Tensor, got {type(tensor)}.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise DsfTypeError(
            f"dsf.to_numpy: tensor: expected a dense tensor with data, got layout "
            f"{tensor.layout} on {tensor.device}. Call .to_dense() or load the data first."
        )
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to(_WIDENED.get(plain.dtype, plain.dtype)).cpu().numpy()


def clean_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that survive netCDF: None dropped, bool as 0/1, nested values as JSON text."""
    clean: dict[str, Any] = {}
    for name, value in attrs.items():
        if value is None:
            continue
        if isinstance(value, bool | np.bool_):
            clean[name] = int(value)
        elif isinstance(value, str | int | float | np.integer | np.floating):
            clean[name] = value
        else:
            clean[name] = json.dumps(value, default=str)
    return clean


def map_coords(
    function: str, length: int, queries: range | None, keys: range, tokens: Sequence[str] | None
) -> dict[str, Any]:
    """Coordinates of a map's rows (None: it has none) and columns: positions, and their texts.

    Raises DsfShapeError, in the name of `function`, unless there is one text for each of the
    `length` positions.
    """
    if tokens is not None and len(tokens) != length:
        raise DsfShapeError(
            f"{function}: tokens: expected {length} texts, got {len(tokens)}; the length is "
            f"fixed by the recurrence."
        )
    coords: dict[str, Any] = {}
    for name, positions in (("query", queries), ("key", keys)):
        if positions is not None:
            coords[name] = (name, list(positions))
            if tokens is not None:
                coords[f"{name}_token"] = (name, [str(tokens[t]) for t in positions])
    return coords


def to_xarray(
    values: Tensor | np.ndarray,
    dims: Sequence[str],
    *,
    name: str,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.DataArray:
    """A labelled array: `values` with `dims`, integer positions as index of every dimension.

    `coords` may name further coordinates as `{"query_token": ("query", [...])}`. The dtype of the
    computation goes to `attrs["precision"]` unless given. Raises DsfShapeError on a name outside
    `AXES` or a wrong number of names.
    """
    unknown = [d for d in dims if d not in AXES]
    if unknown or len(dims) != values.ndim or len(set(dims)) != len(dims):
        raise DsfShapeError(
            f"dsf.to_xarray: dims: expected {values.ndim} different names out of {AXES}, "
            f"got {tuple(dims)}."
        )
    precision = str(values.dtype).removeprefix("torch.")
    data = to_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    index = {d: np.arange(size) for d, size in zip(dims, data.shape, strict=True)}
    import dsf

    meta = {"precision": precision, "dsf_version": dsf.__version__, "schema_version": 1}
    return xr.DataArray(
        data,
        dims=tuple(dims),
        coords={**index, **(coords or {})},
        name=name,
        attrs=clean_attrs({**meta, **(attrs or {})}),
    )
