"""The table of systems: a function with a system's name that writes it down."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dsf.symbolic._systems import SymbolicSystem

Entry = Callable[..., SymbolicSystem]
ENTRIES: dict[str, Entry] = {}

Own = TypeVar("Own", bound=Entry)


def entry(function: Own) -> Own:
    """Register a function by its name, which is the system's: Inputs -> SymbolicSystem."""
    ENTRIES[function.__name__] = function
    return function
