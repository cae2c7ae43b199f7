"""The table of layers that dsf can turn into recurrences, from what the adapters declare."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsf.adapters import adapters
from dsf.adapters._contract import Adapter
from dsf.adapters._one_token import Decoding
from dsf.models import registered

_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface"


def layer_rows(releases: Mapping[str, str]) -> list[dict[str, str]]:
    """One row for each class that an adapter names, or for its words where it goes by the code.

    `releases` are those that the tests run with, by package ("transformers": "5.23.0").
    """
    return [
        {
            "layer": layer, "systems": ", ".join(systems := _of_layer(adapter, layer))
            or getattr(adapter, "system", ""),
            "A": adapter.structure or _structures(systems), "read at": _read_at(adapter),
            "scope": adapter.scope,
            "with a cache": "yes" if Decoding(adapter).decodes else "",
            "tried with": _tried(adapter, releases),
        }
        for adapter in adapters() for layer in _layers(adapter)
    ]  # fmt: skip


def _of_layer(adapter: Adapter, layer: str) -> tuple[str, ...]:
    """Of several systems the one that the class is named after, if any is."""
    every = systems_of(adapter)
    return tuple(name for name in every if len(every) > 1 and name in layer.lower()) or every


def systems_of(adapter: Adapter) -> tuple[str, ...]:
    """The registered systems that an adapter declares, or that its name or its file speak of."""
    known = registered()
    if adapter.systems:
        return adapter.systems
    file = vars(sys.modules[type(adapter).__module__])
    guesses = [
        getattr(adapter, "system", ""), adapter.name.partition("_")[2],
        *(name.removesuffix("_recurrence") for name in file if name.endswith("_recurrence")),
        *(re.sub(r"\W", "", word.lower()) for line in adapter.covers for word in line.split()),
    ]  # fmt: skip
    return next(((guess,) for guess in guesses if guess in known), ())


def registry_folders(models: Path) -> list[str]:
    """Folders of transformers' models with a layer that goes through its attention interface."""
    return sorted({
        file.parent.name for file in models.glob("*/modeling_*.py")
        if _INTERFACE in file.read_text(encoding="utf-8")
    })  # fmt: skip


def _layers(adapter: Adapter) -> list[str]:
    """Class names, each with what tells it from its namesakes; or words, where there are none."""
    return [_named(name) for name in sorted(adapter.classes)] or [*adapter.covers]


def _named(name: str) -> str:
    module, _, layer = name.partition(":")
    parts = module.split(".")
    if parts[0] == "torch":
        return f"`torch.nn.{layer}`"
    return f"`{layer}` ({parts[2] if parts[0] == 'transformers' else parts[0]})"


def _structures(systems: Iterable[str]) -> str:
    known = registered()
    found = [known[name].equations["A"] for name in systems if name in known]
    return "; ".join(dict.fromkeys(found))


def _read_at(adapter: Adapter) -> str:
    functions = getattr(adapter, "functions", ())
    if adapter.tapped:
        return adapter.tapped
    if functions:
        return ", ".join(f"`{name}`" for name in functions)
    return "a method or part of the layer" if adapter.needs_tap else "weights and input"


def _tried(adapter: Adapter, releases: Mapping[str, str]) -> str:
    words = [*adapter.covers, *adapter.classes]
    return adapter.releases or ", ".join(
        f"{package} {release}" for package, release in releases.items()
        if any(word.startswith((f"{package}.", f"{package}:")) for word in words)
    )  # fmt: skip
