"""Which ptxas turns the kernels into machine code: the newer of Triton's own and torch's.

Triton 3.6 and 3.7 carry 12.8.93, which miscompiles products of 16-bit tiles for sm_90a: illegal
accesses and wrong numbers. Wheels of torch may carry a newer one, of the CUDA they are built with,
so the driver that runs torch takes its code; torch.compile uses it by the same variable.
Importing this module chooses; the variable, set by the caller, stands.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

VARIABLE = "TRITON_PTXAS_PATH"  # read by Triton each time it compiles
LATER = "TRITON_PTXAS_BLACKWELL_PATH"  # the same for newer GPUs, and for Hopper from Triton 3.9
LEAST = (12, 9)  # the oldest release under which no kernel here was seen wrong


def choose() -> None:
    """Point Triton at torch's ptxas where that is newer than its own and the caller chose none."""
    tool = Path(torch.__file__).parent / "bin" / "ptxas"
    if VARIABLE in os.environ or not os.access(tool, os.X_OK):
        return
    try:
        from triton import knobs
    except ImportError:
        return
    try:
        carried = knobs.nvidia.ptxas.path
    except RuntimeError:  # Triton carries none
        carried = ""
    if _numbers(version_of(str(tool))) > _numbers(version_of(carried)):
        os.environ[VARIABLE] = str(tool)
        _forget_version()


def _forget_version() -> None:
    """Make Triton ask again: the version is part of the names in its cache of machine code."""
    backend = sys.modules.get("triton.backends.nvidia.compiler")
    clear = getattr(getattr(backend, "get_ptxas_version", None), "cache_clear", None)
    if clear is not None:
        clear()


@functools.cache
def version_of(path: str) -> str:
    """What a ptxas says it is, such as "13.0.88"; "" where it says nothing."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", run.stdout)
    return found.group(1) if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part)


def ptxas_version() -> str:
    """Version of the ptxas that Triton compiles with for the current GPU; "" where it has none.

    Without a GPU: for Hopper. Asked of Triton and of the tool once a value of the variables.
    """
    return _version_under(os.environ.get(VARIABLE), os.environ.get(LATER))


@functools.cache
def _version_under(*_: str | None) -> str:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return version_of(get_ptxas(10 * capability[0] + capability[1]).path)
    except (ImportError, RuntimeError):
        return ""


@torch.compiler.assume_constant_result
def sound() -> bool:
    """Whether that ptxas is 12.9 or newer; torch.compile asks once, when it traces."""
    return _numbers(ptxas_version()) >= LEAST


choose()
