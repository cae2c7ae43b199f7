"""Adapters: which layers dsf can turn into recurrences, one file here (or entry point) each.

An adapter is chosen by the class names along `type(module).__mro__`, so no optional package is
imported to recognise a layer. Other packages add theirs through the entry-point group
`dsf.adapters`: each entry point names an `Adapter` class or instance.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import warnings

from torch import nn

from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.errors import DsfUnsupportedError

__all__ = [
    "Adapter", "Built", "TappedCall", "Visit", "adapter_for", "adapters", "first_tensor",
    "supported", "unsupported",
]  # fmt: skip

GROUP = "dsf.adapters"


@functools.cache
def adapters() -> tuple[Adapter, ...]:
    """Every adapter: those of other packages first, so that they may replace one of ours.

    An entry point that cannot be loaded is reported by name in a warning and left out. Looked up
    once in a process; `adapters.cache_clear()` looks again.
    """
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    own = [a() for n in names for a in importlib.import_module(f"{__name__}.{n}").ADAPTERS]
    return (*_plugins(), *own)


def _plugins() -> list[Adapter]:
    loaded = map(_load, importlib.metadata.entry_points(group=GROUP))
    return [adapter for adapter in loaded if adapter is not None]


def _load(entry: importlib.metadata.EntryPoint) -> Adapter | None:
    try:
        loaded = entry.load()
        adapter = loaded() if isinstance(loaded, type) else loaded
        if not isinstance(adapter, Adapter):
            raise TypeError(f"expected a dsf.adapters.Adapter, got {type(adapter).__name__}")
    except Exception as error:  # a plugin may fail in any way, and must not take dsf with it
        warnings.warn(
            f"dsf.adapters: entry point {entry.name!r} ({entry.value}) left out: "
            f"{type(error).__name__}: {error}. Mend or uninstall the package that declares it.",
            stacklevel=4,
        )
        return None
    return adapter


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter that covers this layer, or None."""
    return next((a for a in adapters() if a.recognises(module)), None)


def supported() -> list[str]:
    """What is covered, in words, one line per kind of layer."""
    return [line for adapter in adapters() for line in adapter.covers]


def unsupported(function: str, module: nn.Module, path: str = "") -> DsfUnsupportedError:
    """The error for a layer that no adapter covers: what is, and how to add one."""
    where = f" at {path!r}" if path else ""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    lines = "\n  ".join(supported())
    return DsfUnsupportedError(
        f"{function}: module: expected a layer that an adapter covers, got {kind}{where}. "
        f"Covered:\n  {lines}\n"
        f"To add one, write a subclass of dsf.adapters.Adapter (recognises, tap, build) and "
        f"declare it as an entry point of the group {GROUP!r}; with tensors of your own use "
        f"dsf.Recurrence or the <system>_recurrence functions of dsf.models."
        f"{_outside_the_interface(module)}"
    )


def _outside_the_interface(module: nn.Module) -> str:
    """Why transformers' attention layers in it are not covered, where there are any."""
    kinds = {
        type(m).__name__ for m in module.modules()
        if type(m).__module__.startswith("transformers.models.")
        and "Attention" in type(m).__name__
    }  # fmt: skip
    if not kinds:
        return ""
    return (
        f" {', '.join(sorted(kinds))}: no part of it calls transformers' attention interface "
        f"(ALL_ATTENTION_FUNCTIONS), where queries, keys and values would be read, and no adapter "
        f"knows what it computes instead."
    )
