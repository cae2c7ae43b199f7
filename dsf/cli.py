"""The command `dsf`: checks what is installed, runs a command, turns errors into sentences."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

DISTRIBUTION = "dsf-torch"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 wrong use.

    Errors that dsf raises on purpose, and those of files, are printed as one sentence;
    `dsf --debug COMMAND ...` shows the traceback instead.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    foreign = foreign_package()
    if foreign:
        _fail(foreign)
    try:
        from dsf._commands import app
    except ImportError as error:
        _fail(f"the command line needs {error.name}: pip install '{DISTRIBUTION}[cli]'")
    from dsf.errors import DsfError

    if "--debug" in given:
        app(given, prog_name="dsf")
    try:
        app(given, prog_name="dsf")
    except (DsfError, ImportError, OSError, UnicodeError) as error:
        _fail(str(error))


def foreign_package() -> str:
    """A sentence if the imported `dsf` is not ours or another distribution owns it too, else ''.

    The package index has an unrelated distribution called `dsf`; whichever was installed last
    owns the folder.
    """
    import dsf

    if getattr(dsf, "__distribution__", None) != DISTRIBUTION:
        where = getattr(dsf, "__file__", "an unknown place")
        return (
            f"the package `dsf` at {where} is not {DISTRIBUTION}. "
            f"pip uninstall dsf && pip install --force-reinstall {DISTRIBUTION}"
        )
    try:
        version = importlib.metadata.version("dsf")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (
        f"the unrelated distribution `dsf` {version} is installed beside {DISTRIBUTION} and "
        f"shares its folder. pip uninstall dsf && pip install --force-reinstall {DISTRIBUTION}"
    )


def version_text() -> str:
    """`dsf-torch 0.1.0 (torch 2.13.0)`."""
    import torch

    import dsf

    return f"{dsf.__distribution__} {dsf.__version__} (torch {torch.__version__})"


def _fail(message: str) -> None:
    print(f"dsf: {message}", file=sys.stderr)
    raise SystemExit(1)
