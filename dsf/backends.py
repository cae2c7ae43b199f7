"""Which of its paths a scan would take."""

from __future__ import annotations

from torch import Tensor

from dsf.factors import SoftmaxRows
from dsf.kernel_scans import kernel_gap
from dsf.validation import check_run, check_values
from dsf.wrappers import System, is_cache, recurrences


def which_backend(system: System, values: Tensor) -> str:
    """What `dsf.scan(system, values)` would run, and if not a Triton kernel, why not.

    For example "triton", "fused attention", "chunked (the kernels need CUDA tensors, ...)"; the
    parts of a Bidirectional are joined by " + ". Raises as `scan`. Cost: the checks of a scan.
    """
    check_run("dsf.which_backend", system, values, allow_nonfinite=False)
    found = []
    for r in recurrences(system):
        u = check_values("dsf.which_backend", r, values)
        if is_cache(r):
            found.append("fused attention" if isinstance(r.C, SoftmaxRows) else "rows of the map")
        elif u.shape[1] == 1:
            found.append("one step of the loop")
        else:
            gap = kernel_gap(r, u)
            found.append(f"chunked ({gap})" if gap else "triton")
    return " + ".join(dict.fromkeys(found))
