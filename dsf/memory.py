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


_GROUP = "/sys/fs/cgroup/"
_CONTAINER_FILES = (
    (_GROUP + "memory.max", _GROUP + "memory.current", _GROUP + "memory.stat"),
    (
        _GROUP + "memory/memory.limit_in_bytes",
        _GROUP + "memory/memory.usage_in_bytes",
        _GROUP + "memory/memory.stat",
    ),
)


def _reclaimable(stat: Path) -> int:
    """Bytes of files that were read: counted as used, given back when asked for."""
    if not stat.exists():
        return 0
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


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
    for limit, used, cached in _CONTAINER_FILES:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            taken = int(Path(used).read_text()) - _reclaimable(Path(cached))
            free.append(max(int(text) - taken, 0))
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
    kind = str(dtype).removeprefix("torch.")
    needed = math.prod(shape) * dtype.itemsize
    cap = int(FREE_SHARE * available_bytes(device)) if max_memory is None else max_memory
    if needed > cap:
        origin = "max_memory" if max_memory is not None else f"{FREE_SHARE:.0%} of what is free"
        raise DsfMemoryError(
            f"{function}: {what}: {named_sizes(axes, shape)} {kind} needs "
            f"{needed / 2**30:.3g} GiB, the cap is {cap / 2**30:.3g} GiB ({origin}). {advice}"
        )
    return needed
