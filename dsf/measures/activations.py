"""Does a layer put out a few activations that dwarf all others?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.axes import clean_attrs, to_xarray
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.measures._size_checks import require_copies

__all__ = ["massive_activations"]

FLOOR = 100.0
RATIO = 1000.0


@runtime_checkable
class HasOutput(Protocol):
    """Anything with a layer's output, a `LayerTrace` for one."""

    output: Tensor


def massive_activations(
    activations: Tensor | HasOutput | Mapping[str, Any],
    *,
    floor: float = FLOOR,
    ratio: float = RATIO,
) -> xr.Dataset:
    """The largest activation of every layer, against the median one, and how many are massive.

    M-Act is the mean over layers of max |x| (Qiu et al., 2025): attrs `m_act`. An activation is
    massive when |x| > floor and |x| >= ratio x the median |x| of its layer (Sun et al., 2024).

    activations: the hidden states that a layer puts out, (batch, time, width) or of any other
    axes with time second, a trace (its `output`), or a mapping of name to either: one entry for
    each layer. Pass the stream after the residual for the papers' numbers; a trace's output is
    what the mixer adds to it. Returns a Dataset over `layer`: `largest`, `median`, `ratio`,
    `count` of massive ones, `token` where the largest stands, in the activations' units. Raises
    DsfTypeError, DsfShapeError, DsfValueError (empty, NaN). Cost: one pass.
    """
    require_copies("massive_activations", activations)
    layers = activations if isinstance(activations, Mapping) else {"": activations}
    if not layers:
        raise DsfValueError("dsf.massive_activations: activations: expected a layer, got none.")
    found = [_of_layer(str(name), item, floor, ratio) for name, item in layers.items()]
    names = [str(n) for n in layers]
    method = f"massive: |x| > {floor:g} and >= {ratio:g} x the layer's median |x|"
    long_names = {
        "largest": "largest absolute activation", "median": "median absolute activation",
        "ratio": "largest over median", "count": "massive activations",
        "token": "position of the largest",
    }  # fmt: skip
    columns = {
        key: to_xarray(
            np.array([row[key] for row in found]), ("layer",), name=key,
            coords={"layer_name": ("layer", names)},
            attrs={"units": "step" if key == "token" else "1", "long_name": text,
                   "method": method, "gauge": "none"},
        )
        for key, text in long_names.items()
    }  # fmt: skip
    m_act = float(np.mean([row["largest"] for row in found]))
    return xr.Dataset(columns, attrs=clean_attrs({"m_act": m_act, "method": method}))


def _of_layer(name: str, item: Any, floor: float, ratio: float) -> dict[str, float]:
    where = f"dsf.massive_activations: activations{f'[{name!r}]' if name else ''}"
    x = item if isinstance(item, Tensor) else getattr(item, "output", None)
    if not isinstance(x, Tensor):
        raise DsfTypeError(f"{where}: expected a tensor or a trace, got {type(item).__name__}.")
    if x.ndim < 2:
        raise DsfShapeError(f"{where}: expected axes (batch, time, ...), got {tuple(x.shape)}.")
    size = x.detach().abs().double()
    if not size.numel() or bool(size.isnan().any()):
        raise DsfValueError(f"{where}: expected numbers, got {'NaN' if size.numel() else 'none'}.")
    largest, median = float(size.max()), float(size.flatten().median())
    at = int(np.unravel_index(int(size.argmax()), tuple(size.shape))[1])
    massive = (size > floor) & (size >= ratio * median)
    over = largest / median if median > 0 else (torch.inf if largest > 0 else torch.nan)
    return {"largest": largest, "median": median, "ratio": over,
            "count": int(massive.sum()), "token": at}  # fmt: skip


MEASURES = ()
