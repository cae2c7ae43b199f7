"""One question per file; a file's `MEASURES` are registered, so a new measure is one new file.

Every measure is a plain function: a system (or an attention map) in, an xarray object out, whose
attrs say method, units, precision, gauge, system and tolerance. None takes a model, none plots.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import xarray as xr

Measure = Callable[..., xr.DataArray | xr.Dataset]


def registered() -> dict[str, Measure]:
    """Every measure by its name."""
    found = {f.__name__: f for module in _modules() for f in module.MEASURES}
    return dict(sorted(found.items()))


def _modules() -> list[ModuleType]:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def __getattr__(name: str) -> Any:
    """`dsf.measures.row_sum`: any public function of any file here, loaded on first use."""
    if not name.startswith("_"):
        for module in _modules():
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'dsf.measures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for module in _modules() for n in module.__all__)})
