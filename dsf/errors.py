"""The errors dsf raises, each with a standard parent, so that `except ValueError` still works.

A message reads `dsf.<function>: <argument>: expected <...>, got <...>. <What to do>.`
"""

from __future__ import annotations


class DsfError(Exception):
    """Base of every error raised on purpose by dsf."""


class DsfValueError(DsfError, ValueError):
    """An argument has the right kind but an impossible value."""


class DsfShapeError(DsfValueError):
    """Axes, sizes, dtypes or devices do not fit together."""


class DsfTypeError(DsfError, TypeError):
    """An argument is of the wrong kind."""


class DsfMemoryError(DsfError, MemoryError):
    """A request would not fit in memory; raised before anything is allocated."""


class DsfIntegrityError(DsfError, OSError):
    """A file on disk is damaged, incomplete or not what it says it is."""


class DsfFidelityError(DsfError, RuntimeError):
    """A recurrence does not reproduce the layer it was built from."""


class DsfUnsupportedError(DsfError, NotImplementedError):
    """The layer, structure or backend is not covered; the message says what is."""
