"""Maps by the Triton kernels of `dsf_kernels`: which systems they cover, and the layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsf.kernel_scans import HAS_TRITON, INTERPRETED, TYPES, WIDEST, kernel_dtype
from dsf.shapes import Inexact
from dsf.transitions import Diagonal, Identity, Scalar
from dsf.transitions._base import is_traced

if TYPE_CHECKING:
    from dsf.recurrence import Recurrence


def map_gap(r: Recurrence) -> str:
    """Why no kernel can make the map of a recurrence; "" when one can.

    They have no gradient, so a map that wants one is left to the scans.
    """
    if not HAS_TRITON or not (r.device.type == "cuda" or INTERPRETED):
        return "the kernels need CUDA tensors and triton"
    if is_traced() or torch.compiler.is_compiling():
        return "maps have no kernel under the transforms of torch.func or torch.compile"
    if not isinstance(r.A, Identity | Scalar | Diagonal) or r.A.is_complex:
        return f"no kernel makes maps of the structure {r.structure!r}, or complex ones"
    if not isinstance(r.B, Tensor) or not isinstance(r.C, Tensor) or r.D is not None:
        return "a kernel's map has B and C as tensors, and no D"
    if (r.n_input, r.n_output) != (1, 1) or r.n_state > WIDEST:
        return f"a kernel's map has one input and output a head, and at most {WIDEST} states"
    if r.B.shape[-2] == 0 or kernel_dtype(r.B, r.C) not in TYPES or r.dtype not in TYPES:
        return f"the kernels read {', '.join(str(t) for t in TYPES)}"
    decay = None if isinstance(r.A, Identity) else r.A
    if decay is not None and decay.sign is not None:
        return "no kernel makes maps of negative decays"
    given = [r.B, r.C] if decay is None else [r.B, r.C, decay.log_decay]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "a kernel's map has no gradient"
    return ""


def kernel_map(r: Recurrence, rows: range, cols: range) -> Inexact[Tensor, "batch head query key"]:
    """The rows and columns of the map, in float32.

    With one decay a state B and C are read in float32, as decayed 16-bit keys would be rounded.
    """
    from dsf_kernels.map_tiles import map_tiles

    batch, length, head = r.lead_shape()
    length = max(length, rows.stop, cols.stop)
    dtype = torch.float32 if isinstance(r.A, Diagonal) else kernel_dtype(r.B, r.C)  # type: ignore[arg-type]
    key, query = r.B.squeeze(4).to(dtype), r.C.squeeze(3).to(dtype)  # type: ignore[union-attr]
    shape = (batch, length, head, r.n_state)
    decay = None
    if isinstance(r.A, Diagonal):
        decay = r.A.log_decay.expand(shape)
    elif isinstance(r.A, Scalar):
        decay = r.A.log_decay.expand(shape[:3])
    return map_tiles(query.expand(shape), key.expand(shape), decay, queries=rows, keys=cols)
