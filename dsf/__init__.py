"""dsf: every sequence-mixing layer as one state-space recurrence, and the tools to study it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
from dsf.backends import which_backend
from dsf.factors import ExplicitRows, MixingRows, OneHot, SoftmaxRows
from dsf.maps import attention_map, materialise
from dsf.recurrence import Recurrence
from dsf.scanning import scan, step
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, anticausal, gated

if TYPE_CHECKING:
    from dsf import measures, models
    from dsf.blocks import Block
    from dsf.coefficient_forms import coefficient_dynamics
    from dsf.coefficients import CoefficientDynamics
    from dsf.comparison import compare
    from dsf.decoding import trace_decoding
    from dsf.gramians import gramian
    from dsf.hankel import hankel_singular_values, stationary_hankel_values
    from dsf.predictor_forms import Predictor, predictor_form, states_kept
    from dsf.realisation import realise
    from dsf.reduction import Reduction, balance, reduce
    from dsf.rollouts import Rollout
    from dsf.stacks import rollout
    from dsf.tracing import LayerTrace, from_layer, trace

_LATER = {
    "models": "dsf.models", "measures": "dsf.measures", "plot": "dsf.plot",
    "compare": "dsf.comparison", "from_layer": "dsf.tracing", "trace": "dsf.tracing",
    "LayerTrace": "dsf.tracing", "CoefficientDynamics": "dsf.coefficients",
    "coefficient_dynamics": "dsf.coefficient_forms", "Block": "dsf.blocks",
    "Rollout": "dsf.rollouts", "rollout": "dsf.stacks",
    "trace_decoding": "dsf.decoding", "realise": "dsf.realisation", "reduce": "dsf.reduction",
    "balance": "dsf.reduction", "Reduction": "dsf.reduction", "gramian": "dsf.gramians",
    "hankel_singular_values": "dsf.hankel", "stationary_hankel_values": "dsf.hankel",
    "Predictor": "dsf.predictor_forms", "predictor_form": "dsf.predictor_forms",
    "states_kept": "dsf.predictor_forms", "symbolic": "dsf.symbolic",
}  # fmt: skip
"""Loaded on first use, so that `import dsf` stays light."""

__all__ = [
    "Anticausal", "Bidirectional", "Block", "CoefficientDynamics", "ExplicitRows", "Gated",
    "LayerTrace", "MixingRows", "OneHot", "Predictor", "Recurrence", "Reduction", "Rollout",
    "SoftmaxRows", "System", "anticausal", "attention_map", "balance", "change_of_basis",
    "coefficient_dynamics", "compare", "concatenate_time", "from_layer", "gated", "gramian",
    "hankel_singular_values", "materialise", "measures", "models", "parallel", "predictor_form",
    "realified", "realise", "reduce", "rollout", "scan", "series", "skip", "slice_time",
    "states_kept", "stationary_hankel_values", "step", "trace", "trace_decoding", "transitions",
    "which_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'dsf' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return module if _LATER[name] == f"dsf.{name}" else getattr(module, name)
