"""How much memory is free, and the refusal of what would not fit, before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from dsf.axes import named_sizes
from dsf.errors import DsfMemoryError

FREE_SHARE = 0.8
"""The share of free memory that one result may take unless `max_memory` says otherwise."""


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes free on a device; on the CPU the smaller of the system's and the container's."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [math.inf]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free.append(int(rows["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            free.append(max(int(text) - int(Path(used).read_text()), 0))
    smallest = min(free)
    return 2**62 if math.isinf(smallest) else int(smallest)


def require_memory(
    function: str,
    what: str,
    axes: Sequence[str],
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    max_memory: int | None = None,
    advice: str,
) -> int:
    """Return the bytes `shape` takes, or raise DsfMemoryError with size, cap and a way out."""
    needed = math.prod(shape) * dtype.itemsize
    cap = int(FREE_SHARE * available_bytes(device)) if max_memory is None else max_memory
    if needed > cap:
        origin = "max_memory" if max_memory is not None else f"{FREE_SHARE:.0%} of what is free"
        raise DsfMemoryError(
            f"{function}: {what}: {named_sizes(axes, shape)} {str(dtype).removeprefix('torch.')} "
            f"needs {needed / 2**30:.3g} GiB, the cap is {cap / 2**30:.3g} GiB ({origin}). {advice}"
        )
    return needed
