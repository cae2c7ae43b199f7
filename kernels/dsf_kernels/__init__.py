"""Triton kernels for linear recurrences: plain tensors in, plain tensors out.

Imports torch and triton alone. Every kernel has a float64 loop in `reference/` that defines it.
"""

from dsf_kernels.delta_scan import delta_scan, delta_summary
from dsf_kernels.diagonal_complex import complex_diagonal_scan
from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan, diagonal_decay_summary
from dsf_kernels.diagonal_gates import gated_scan, rglru_scan
from dsf_kernels.diagonal_scan import diagonal_scan, diagonal_summary
from dsf_kernels.hierarchical_attention import hierarchical_attention
from dsf_kernels.hierarchical_stream import hierarchical_stream
from dsf_kernels.inline_scan import inline_mix, inline_scan
from dsf_kernels.kda_scan import kda_scan
from dsf_kernels.low_rank_scan import low_rank_scan
from dsf_kernels.map_tiles import map_statistics, map_tiles
from dsf_kernels.mlstm_scan import mlstm_scan
from dsf_kernels.monarch_attention import monarch_attention
from dsf_kernels.normalised_scan import normalised_scan
from dsf_kernels.scalar_decay_scan import scalar_decay_scan, scalar_decay_summary
from dsf_kernels.selective_scan import selective_scan, selective_summary
from dsf_kernels.zeros_scan import zeros_scan

__all__ = [
    "complex_diagonal_scan",
    "delta_scan",
    "delta_summary",
    "diagonal_decay_scan",
    "diagonal_decay_summary",
    "diagonal_scan",
    "diagonal_summary",
    "gated_scan",
    "hierarchical_attention",
    "hierarchical_stream",
    "inline_mix",
    "inline_scan",
    "kda_scan",
    "low_rank_scan",
    "map_statistics",
    "map_tiles",
    "mlstm_scan",
    "monarch_attention",
    "normalised_scan",
    "rglru_scan",
    "scalar_decay_scan",
    "scalar_decay_summary",
    "selective_scan",
    "selective_summary",
    "zeros_scan",
]
