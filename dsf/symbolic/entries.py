"""Every system of `dsf.models` in symbols, by its name."""

from __future__ import annotations

import inspect
from typing import Any

from dsf.errors import DsfValueError
from dsf.symbolic import (  # noqa: F401  each registers its systems
    _caches,
    _delta_rules,
    _gated,
    _normalised,
    _state_spaces,
    _trajectories,
)
from dsf.symbolic._inputs import Inputs
from dsf.symbolic._registry import ENTRIES
from dsf.symbolic._systems import SymbolicSystem


def registered() -> list[str]:
    """The names of all systems: those of `dsf.models.registered()`."""
    return sorted(ENTRIES)


def system(name: str, *, length: int = 3, size: int = 2, **options: Any) -> SymbolicSystem:
    """A, B, C, D of a registered system in symbols, for `length` tokens.

    size is the width of queries and keys, or the states of a head or channel; systems of one
    state a channel have no use for it. `options` are those of the numeric `<name>_recurrence`
    that change its formula: gauge, coordinates, realisation, stabilised, normalise, window, ...
    The query comes scaled: scale = 1. One head, one channel; initial states are zero. Systems
    nonlinear in their own state are written along the trajectory, their gates as symbols, and say
    so in `mode`. Raises DsfValueError on an unknown name or option, and on sizes below 1.
    """
    if name not in ENTRIES:
        raise DsfValueError(
            f"dsf.symbolic.system: name: expected one of {registered()}, got {name!r}."
        )
    if length < 1 or size < 1:
        raise DsfValueError(
            f"dsf.symbolic.system: expected length and size of at least 1, got {length}, {size}."
        )
    known = list(inspect.signature(ENTRIES[name]).parameters)[1:]
    if not set(options) <= set(known):
        raise DsfValueError(
            f"dsf.symbolic.system: options of {name}: expected some of {known}, got "
            f"{sorted(options)}."
        )
    return ENTRIES[name](Inputs(length, size), **options)
