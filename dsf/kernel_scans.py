"""Scans by the Triton kernels of `dsf_kernels`: what they cover, and the layouts in between.

A structure that has a kernel says so in `triton_gap` and runs it in `scan_triton`; both call this
file. The kernels take B, C and the values in one type of 16 or 32 bits, each as it lies in
memory, keep the state in float32, and have first derivatives.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsf.transitions._base import is_traced

if TYPE_CHECKING:
    from dsf.recurrence import Recurrence
    from dsf.transitions import Diagonal, DiagonalLowRank, Householder, Scalar

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels then run on the CPU, slowly
TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
"""States, or channels, of one head that a matrix state may have."""
WIDEST_LOW_RANK = 128
"""The same for a transition of diagonal plus rank 1."""


def kernel_dtype(*tensors: Tensor) -> torch.dtype:
    """The type in which a kernel would read B, C and the values: their common one."""
    dtype = tensors[0].dtype
    for other in tensors[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def kernel_gap(r: Recurrence, values: Tensor) -> str:
    """Why no kernel can run the recurrence on `values` (input axis in full); "" when one can."""
    if not (values.is_cuda or INTERPRETED):
        return f"the kernels need CUDA tensors, the values are on {values.device}"
    if not HAS_TRITON:
        return "triton is not installed (the extra `kernels`)"
    if is_traced() and not torch.compiler.is_compiling():
        return "the kernels have no rule for vmap and the transforms of torch.func"
    dtype = kernel_dtype(values, *(x for x in (r.B, r.C) if isinstance(x, Tensor)))
    if dtype not in TYPES and not (dtype == torch.complex64 and r.A.is_complex):
        return f"the kernels read {', '.join(str(t) for t in TYPES)}, not {dtype}"
    if (r.n_input, r.n_output) != (1, 1):
        return f"the kernels have one input and output a head, not {r.n_input} and {r.n_output}"
    return r.A.triton_gap(values.shape[-1])


def decay_gap(A: Any, n_channel: int) -> str:
    """Why the kernels cannot run an identity, scalar or diagonal A; "" when they can."""
    if getattr(A, "phase", None) is not None:
        if A.structure != "diagonal" or n_channel > 1 or A.sign is not None:
            return (
                "complex decays have a kernel for diagonal A without signs and one channel alone"
            )
        wide = torch.float64 in (A.log_decay.dtype, A.phase.dtype)
        return "the kernel of complex decays reads them in float32" if wide else ""
    if n_channel > 1 or A.structure != "diagonal":
        if getattr(A, "sign", None) is not None:
            return "a matrix state has no kernel for negative decays"
        if max(A.n_state, n_channel) > WIDEST:
            return f"a matrix state may be {WIDEST} x {WIDEST} at most"
    return ""


def low_rank_gap(A: Any, n_channel: int) -> str:
    """Why the kernels cannot run a Householder or diagonal plus low rank A; "" when they can."""
    if any(x.is_complex() for x in A.tensors()) or getattr(A, "phase", None) is not None:
        return "a transition of diagonal plus low rank has no kernel for complex numbers"
    if getattr(A, "sign", None) is not None:
        return "a transition of diagonal plus low rank has no kernel for negative decays"
    if A.structure == "diagonal_low_rank" and (A.left.shape[-1], A.right.shape[-1]) != (1, 1):
        return f"the kernels take a low rank of 1, not {max(A.left.shape[-1], A.right.shape[-1])}"
    dtype = kernel_dtype(*A.tensors())
    if dtype not in TYPES:
        return f"the kernels read {', '.join(str(t) for t in TYPES)}, A is {dtype}"
    if max(A.n_state, n_channel) > WIDEST_LOW_RANK:
        widest = WIDEST_LOW_RANK
        return f"a state under diagonal plus low rank may be {widest} x {widest} at most"
    return ""


def scan_scalar(
    A: Scalar | None, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """C_t h_t (batch, time, head, 1, channel) and h_L, for one decay a head (None: no decay)."""
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    batch, length, n_head = values.shape[:3]
    key, query = _tokens(B.squeeze(4), values), _tokens(C.squeeze(3), values)
    decay = None if A is None else A.log_decay.expand(batch, length, n_head)
    y, last = scalar_decay_scan(query, key, values.squeeze(3), decay, state.float())
    return y.unsqueeze(3), last


def scan_diagonal(
    A: Diagonal, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for one decay a state; with one channel a head each state is scanned by itself."""
    if A.phase is not None:
        return _scan_complex(A, B, C, values, state)
    batch, length, n_head, _, n_channel = values.shape
    shape = (batch, length, n_head, A.n_state)
    if n_channel > 1:
        from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

        key, query = _tokens(B.squeeze(4), values), _tokens(C.squeeze(3), values)
        decay = A.log_decay.expand(shape)
        y, last = diagonal_decay_scan(query, key, values.squeeze(3), decay, state.float())
        return y.unsqueeze(3), last
    from dsf_kernels.diagonal_scan import diagonal_scan

    write = (B.squeeze(4) * values.squeeze(3)).expand(shape)
    decay = A.log_decay if A.sign is None else A.sign * A.log_decay.exp()
    start = state.squeeze(3).float()
    h, last = diagonal_scan(decay.expand(shape), write, start, log=A.sign is None)
    return C @ h[..., None], last[..., None]


def _scan_complex(
    A: Diagonal, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for complex decays and one channel a head, in complex64."""
    from dsf_kernels.diagonal_complex import complex_diagonal_scan

    assert A.phase is not None
    shape = (*values.shape[:3], A.n_state)
    write = (B.squeeze(4) * values.squeeze(3)).expand(shape).to(torch.complex64)
    log_modulus, phase = (
        x.float().expand(-1, -1, shape[2], -1).flatten(2) for x in (A.log_decay, A.phase)
    )
    start = state.squeeze(3).to(torch.complex64).flatten(1)
    h, last = complex_diagonal_scan(log_modulus, phase, write.flatten(2), start)
    return C.to(torch.complex64) @ h.view(*shape, 1), last.view(shape[0], *shape[2:], 1)


def scan_householder(
    A: Householder, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for I - beta k k^T: the delta rule where B = beta k, else x = -beta k, w = k."""
    if not _is_delta_rule(A, B):
        left = -(A.write_strength[..., None] * A.direction)
        return _scan_rank_one(left, A.direction, None, B, C, values, state)
    from dsf_kernels.delta_scan import delta_scan

    dtype = kernel_dtype(values, A.direction)
    u, query, key = (
        _tokens(x, values).to(dtype) for x in (values.squeeze(3), C.squeeze(3), A.direction)
    )
    strength = A.write_strength.expand(values.shape[:3])
    y, last = delta_scan(query, key, u, strength, None, state.float())
    return y.unsqueeze(3), last


def _is_delta_rule(A: Householder, B: Tensor) -> bool:
    """Whether B = beta k, and no gradient is wanted that would have to tell B from beta k.

    Looks at the numbers, so waits for the device: not where a graph is captured or traced.
    """
    if torch.compiler.is_compiling() or (B.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*A.tensors(), B)):
        return False
    written = (A.write_strength[..., None] * A.direction).to(B.dtype)
    return bool((written == B.squeeze(4)).all())


def scan_low_rank(
    A: DiagonalLowRank, B: Tensor, C: Tensor, values: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for diag(a) - x w^T."""
    left, right = -A.left.squeeze(-1), A.right.squeeze(-1)
    return _scan_rank_one(left, right, A.log_decay, B, C, values, state)


def _scan_rank_one(
    left: Tensor, right: Tensor, log_decay: Tensor | None, B: Tensor, C: Tensor, values: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for diag(a) + x w^T, in the widest type of B, C, values, x and w."""
    from dsf_kernels.low_rank_scan import low_rank_scan

    dtype = kernel_dtype(values, left, right)
    given = (C.squeeze(3), B.squeeze(4), values.squeeze(3), left, right)
    query, key, u, left, right = (_tokens(x, values).to(dtype) for x in given)
    if log_decay is not None:
        log_decay = log_decay.expand(*values.shape[:3], key.shape[-1])
    y, last = low_rank_scan(query, key, u, left, right, log_decay, state.float())
    return y.unsqueeze(3), last


def _tokens(x: Tensor, values: Tensor) -> Tensor:
    """Size-1 batch and time spread over those of the values; one head stays one group."""
    return x.expand(values.shape[0], values.shape[1], *x.shape[2:])
