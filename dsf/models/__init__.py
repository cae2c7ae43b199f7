"""One system per file; the file name is the registered name, its `LAYER` the module."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dsf.errors import DsfValueError
from dsf.models._mixer import SequenceMixer


def registered() -> dict[str, type[SequenceMixer]]:
    """Every system by its name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").LAYER for name in names}


def build(name: str, width: int, **options: Any) -> SequenceMixer:
    """A layer of the named system; without options its small default."""
    known = registered()
    if name not in known:
        raise DsfValueError(
            f"dsf.models.build: name: expected one of {list(known)}, got {name!r}."
        )
    return known[name](width, **options) if options else known[name].small(width)
