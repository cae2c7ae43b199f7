"""One readable float64 loop per kernel: the definition that every kernel is held against."""

from dsf_kernels.reference.complex_diagonal import complex_diagonal_scan_reference
from dsf_kernels.reference.delta import delta_scan_reference, solve_condition
from dsf_kernels.reference.diagonal import diagonal_scan_reference
from dsf_kernels.reference.diagonal_decay import diagonal_decay_scan_reference
from dsf_kernels.reference.diagonal_gates import gated_scan_reference, rglru_scan_reference
from dsf_kernels.reference.hierarchical import (
    hierarchical_attention_reference,
    hierarchical_stream_reference,
)
from dsf_kernels.reference.inline import inline_mix_reference, inline_scan_reference
from dsf_kernels.reference.low_rank import kda_scan_reference, low_rank_scan_reference
from dsf_kernels.reference.map import (
    linear_map_reference,
    map_statistics_reference,
    softmax_map_reference,
)
from dsf_kernels.reference.mlstm import mlstm_scan_reference
from dsf_kernels.reference.monarch import monarch_attention_reference
from dsf_kernels.reference.normalised import normalised_scan_reference
from dsf_kernels.reference.scalar_decay import scalar_decay_scan_reference
from dsf_kernels.reference.selective import selective_scan_reference
from dsf_kernels.reference.units import error_units, row_units
from dsf_kernels.reference.zeros import zeros_scan_reference

__all__ = [
    "complex_diagonal_scan_reference",
    "delta_scan_reference",
    "diagonal_decay_scan_reference",
    "diagonal_scan_reference",
    "error_units",
    "gated_scan_reference",
    "hierarchical_attention_reference",
    "hierarchical_stream_reference",
    "inline_mix_reference",
    "inline_scan_reference",
    "kda_scan_reference",
    "linear_map_reference",
    "low_rank_scan_reference",
    "map_statistics_reference",
    "mlstm_scan_reference",
    "monarch_attention_reference",
    "normalised_scan_reference",
    "rglru_scan_reference",
    "row_units",
    "scalar_decay_scan_reference",
    "selective_scan_reference",
    "softmax_map_reference",
    "solve_condition",
    "zeros_scan_reference",
]
