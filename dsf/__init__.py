"""dsf: every sequence-mixing layer as one state-space recurrence, and the tools to study it."""

__version__ = "0.1.0"
__distribution__ = "dsf-torch"

from dsf import transitions
from dsf.algebra import (
    change_of_basis,
    concatenate_time,
    parallel,
    realified,
    series,
    skip,
    slice_time,
)
from dsf.factors import ExplicitRows, MixingRows, OneHot, SoftmaxRows
from dsf.maps import attention_map, materialise
from dsf.recurrence import Recurrence
from dsf.scanning import scan, step
from dsf.wrappers import Anticausal, Bidirectional, Gated, anticausal, gated
