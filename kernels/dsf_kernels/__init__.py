"""Triton kernels for linear recurrences: plain tensors in, plain tensors out.

Imports torch and triton alone. Every kernel has a float64 loop in `reference/` that defines it.
"""

from dsf_kernels.delta_scan import delta_scan, delta_summary
from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan, diagonal_decay_summary
from dsf_kernels.diagonal_scan import diagonal_scan, diagonal_summary
from dsf_kernels.scalar_decay_scan import scalar_decay_scan, scalar_decay_summary
from dsf_kernels.selective_scan import selective_scan, selective_summary

__all__ = [
    "delta_scan", "delta_summary", "diagonal_decay_scan", "diagonal_decay_summary",
    "diagonal_scan", "diagonal_summary", "scalar_decay_scan", "scalar_decay_summary",
    "selective_scan", "selective_summary",
]  # fmt: skip
