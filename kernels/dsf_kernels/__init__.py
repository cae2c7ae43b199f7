"""Triton kernels for linear recurrences: plain tensors in, plain tensors out.

Imports torch and triton alone. Every kernel has a float64 loop in `reference.py` that defines it.
"""

from dsf_kernels.diagonal_scan import diagonal_scan, diagonal_summary
from dsf_kernels.scalar_decay_scan import scalar_decay_scan, scalar_decay_summary

__all__ = ["diagonal_scan", "diagonal_summary", "scalar_decay_scan", "scalar_decay_summary"]
