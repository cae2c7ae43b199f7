"""One readable float64 loop per kernel: the definition that every kernel is held against."""

from dsf_kernels.reference.delta import delta_scan_reference, solve_condition
from dsf_kernels.reference.diagonal import diagonal_scan_reference
from dsf_kernels.reference.diagonal_decay import diagonal_decay_scan_reference
from dsf_kernels.reference.scalar_decay import scalar_decay_scan_reference
from dsf_kernels.reference.selective import selective_scan_reference
from dsf_kernels.reference.units import error_units, row_units

__all__ = [
    "delta_scan_reference",
    "diagonal_decay_scan_reference",
    "diagonal_scan_reference",
    "error_units",
    "row_units",
    "scalar_decay_scan_reference",
    "selective_scan_reference",
    "solve_condition",
]
