"""From layers of a real model to their recurrences, each with the error it was found to have."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsf import __version__
from dsf.adapters import Built, Visit, unsupported
from dsf.adapters._checkpoint import Checkpoint, compare_weights
from dsf.adapters._replay import Source
from dsf.adapters._selection import (
    Chosen,
    form_c,
    layer_call,
    layers_of,
    listed,
    model_call,
    named_layers,
    not_called,
    refuse_cache,
    refuse_compiled,
    unfaithful,
)
from dsf.adapters._session import quiet, run_pass
from dsf.errors import DsfTypeError, DsfValueError
from dsf.scanning import scan
from dsf.wrappers import System, core

if TYPE_CHECKING:
    import dsf.blocks

TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2,
}  # fmt: skip
"""Largest accepted `error`, by the dtype of the layer's output."""


@dataclasses.dataclass(frozen=True, repr=False)
class LayerTrace:
    """One layer of a real model as a recurrence.

    `readout(scan(recurrence, values))` is the layer's output up to `error`, the relative 2-norm
    difference from `output`, which the layer really produced. `name` is the module's path in the
    model ("model.layers.7.mixer"), `layer` its index there, `system` the registered name of the
    system. `readout` runs the layer's own gates, norms and projections; hooks that the user has
    put on the layer's parts fire again when it is called. attrs: scan_error (before the readout,
    where the layer has such a point), implementation, precision, class, tolerance, versions.
    `source` is the pass itself, for `block` and `dsf.rollout`.
    """

    name: str
    layer: int
    system: str
    recurrence: System
    values: Tensor
    readout: Callable[[Tensor], Tensor]
    output: Tensor
    error: float
    attrs: dict[str, Any]
    source: Source | None = None

    def __repr__(self) -> str:
        """One line of names and shapes, and the error."""
        kind = "" if self.recurrence is core(self.recurrence) else type(self.recurrence).__name__
        parts = [kind, repr(core(self.recurrence)), f"values {tuple(self.values.shape)}"]
        shown = ", ".join(part for part in parts if part)
        return f"LayerTrace({self.name!r}: {shown}, error {self.error:.2g})"

    def block(self, *, tolerance: float | None = None) -> dsf.blocks.Block:
        """The whole layer, projections, convolution, gates and norms frozen: see `dsf.Block`."""
        from dsf.blocks import block_of

        return block_of(self, tolerance=tolerance)


def from_layer(
    module: nn.Module,
    *args: Any,
    layer: str | None = None,
    inputs: Any = None,
    tolerance: float | None = None,
    precision: str = "auto",
    gradients: bool = False,
    checkpoint: Checkpoint | None = None,
    **kwargs: Any,
) -> LayerTrace:
    """The recurrence of one layer on one batch of input.

    Three forms: `from_layer(layer, x)`, `from_layer(layer, *args, **kwargs)` with the arguments
    of the layer's own forward, and `from_layer(model, layer="path.to.layer", inputs={...})`,
    which runs the model once and captures the arguments that the layer really gets. A module
    that is no layer itself but holds exactly one is taken for that one.

    Parameters
    ----------
    tolerance: largest accepted `error`; by default `dsf.tracing.TOLERANCE` of the output's dtype.
    precision: "auto" takes float32 casts out of a float64 layer for the pass
        (`dsf.precision.Float64Throughout`); "native" runs it as it is.
    gradients: keep the recurrence on the autograd graph of the layer's input and weights.
    checkpoint: a safetensors file, a folder of them or a mapping of tensors. The traced layers'
        weights are compared with it before the pass; any difference raises DsfValueError with
        the names and the largest difference.

    The pass runs in evaluation mode, without cache; modes, functions, attention implementation,
    hooks and states held by modules are put back, also after an exception.
    Raises DsfFidelityError above the tolerance, DsfUnsupportedError for layers and inputs that no
    adapter covers, DsfTypeError when an argument is missing. Cost: one pass, and one more of the
    layer for the check.
    """
    if layer is not None:
        if args or kwargs:
            raise DsfTypeError(
                "dsf.from_layer: expected the model's inputs as inputs={...} when layer= is "
                "given, got further arguments."
            )
        found = trace(module, inputs, [layer], tolerance=tolerance, precision=precision,
                      gradients=gradients, checkpoint=checkpoint)  # fmt: skip
        return _only(found, layer)
    if inputs is not None:
        kwargs = {**kwargs, "inputs": inputs}
    refuse_compiled("dsf.from_layer", module)
    layers = layers_of(module)
    if not layers:
        raise unsupported("dsf.from_layer", module)
    if len(layers) > 1:
        raise DsfValueError(
            f"dsf.from_layer: module: expected one layer, got {type(module).__name__} with "
            f"{len(layers)}: {listed(layers)}. Name one: {form_c(next(iter(layers)))}, "
            f"or use dsf.trace for all."
        )
    compare_weights(checkpoint, layers)
    call = layer_call("dsf.from_layer", module, args, kwargs)
    return _only(_trace(module, call, layers, None, tolerance, precision, gradients), "")


def trace(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] | None = None,
    *,
    tolerance: float | None = None,
    precision: str = "auto",
    gradients: bool = False,
    checkpoint: Checkpoint | None = None,
) -> dict[str, LayerTrace]:
    """Every covered layer of a model on one pass, in the order in which the layers ran.

    inputs: a dict of keyword arguments (what a tokenizer gives), a tuple of positional ones, or
    one tensor. layers: module paths; by default all that an adapter covers. A stacked or
    bidirectional torch.nn RNN gives one trace for each layer and direction ("lstm.l1_reverse"),
    all under the path "lstm" in `layers`. A module visited again in the pass gets "#2" after its
    name. The other arguments and errors are those of `from_layer`. Memory: the coefficients of
    all traced layers; name the layers you need in a large model.
    """
    refuse_compiled("dsf.trace", model)
    chosen = layers_of(model) if layers is None else named_layers("dsf.trace", model, layers)
    if not chosen:
        raise unsupported("dsf.trace", model)
    compare_weights(checkpoint, chosen)
    call = model_call("dsf.trace", model, inputs)
    return _trace(model, call, chosen, layers, tolerance, precision, gradients)


def _only(found: dict[str, LayerTrace], name: str) -> LayerTrace:
    if name in found:
        return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise DsfValueError(
        f"dsf.from_layer: module: expected one layer, got {len(found)}: {listed(found)}. Name "
        f"one of them with layer= and give the inputs with inputs=, or use dsf.trace for all."
    )


# -- one pass ----------------------------------------------------------------------------------


def _trace(
    model: nn.Module,
    call: Callable[[], Any],
    chosen: Chosen,
    asked: Sequence[str] | None,
    tolerance: float | None,
    precision: str,
    gradients: bool,
) -> dict[str, LayerTrace]:
    if precision not in ("auto", "native"):
        raise DsfValueError(
            f"dsf.trace: precision: expected 'auto' or 'native', got {precision!r}."
        )
    dtypes = {p.dtype for p in model.parameters()}
    float64 = precision == "auto" and torch.float64 in dtypes
    visits = run_pass(model, call, chosen, gradients=gradients, float64=float64)
    missing = sorted(set(chosen) - {v.path for v in visits}) if asked is not None else []
    if missing or not visits:
        raise DsfValueError(
            f"dsf.trace: layers: expected layers that run on these inputs, got "
            f"{listed(missing or chosen)}, which did not run."
        )
    return traces_of(model, call, visits, chosen, asked, tolerance, gradients, float64)


def traces_of(
    model: nn.Module,
    call: Callable[[], Any],
    visits: list[Visit],
    chosen: Chosen,
    asked: Sequence[str] | None,
    tolerance: float | None,
    gradients: bool,
    float64: bool,
) -> dict[str, LayerTrace]:
    """A trace of each part of each visit that was asked for, checked against its output."""
    found: dict[str, LayerTrace] = {}
    counts: dict[str, int] = {}
    for visit in visits:
        counts[visit.path] = counts.get(visit.path, 0) + 1
        adapter = chosen[visit.path][1]
        refuse_cache("dsf.trace", visit.kwargs)
        if adapter.needs_tap and not visit.taps:
            raise not_called(visit, adapter)
        with quiet(visit.module, float64=float64), torch.set_grad_enabled(gradients):
            built = adapter.build(visit)
        for number, part in enumerate(built):
            name = ".".join(n for n in (visit.path, part.suffix) if n)
            name += f"#{counts[visit.path]}" if counts[visit.path] > 1 else ""
            if asked is None or {name, name.split("#")[0], visit.path} & set(asked):
                source = Source(model, call, adapter, visit, number, counts[visit.path], float64)
                found[name] = _layer_trace(name, part, len(found), tolerance, source)
    absent = [a for a in asked or () if a not in found and a not in chosen]
    if absent:
        raise DsfValueError(
            f"dsf.trace: layers: expected names of traced layers, got {listed(absent)}. "
            f"Traced: {listed(found)}."
        )
    return found


def _layer_trace(
    name: str, part: Built, order: int, tolerance: float | None, source: Source
) -> LayerTrace:
    visit, float64 = source.visit, source.float64

    def readout(y: Tensor) -> Tensor:
        with quiet(visit.module, float64=float64):
            return part.readout(y)

    limit = TOLERANCE.get(part.output.dtype, 1e-5) if tolerance is None else tolerance
    with torch.no_grad():
        y = scan(part.recurrence, part.values)
        error = relative_error(readout(y), part.output)
        scan_error = None
        if part.tapped is not None and part.to_tapped is not None:
            scan_error = relative_error(part.to_tapped(y), part.tapped)
    if not error <= limit:
        raise unfaithful(name or type(visit.module).__name__, part, error, scan_error, limit)
    attrs = {
        "scan_error": scan_error,
        "implementation": visit.taps[0].implementation if visit.taps else "torch",
        "precision": str(part.output.dtype).removeprefix("torch."),
        "float32_casts": "neutralised" if float64 else "as shipped",
        "tolerance": limit, "class": type(visit.module).__qualname__, "path": visit.path,
        "dsf_version": __version__, "torch_version": torch.__version__,
    }  # fmt: skip
    if "transformers" in sys.modules and type(visit.module).__module__.startswith("transformers"):
        attrs["transformers_version"] = sys.modules["transformers"].__version__
    index = _index(name, visit.module, order) if part.layer is None else part.layer
    return LayerTrace(name, index, part.system, part.recurrence, part.values, readout,
                      part.output, error, {**attrs, **part.attrs}, source)  # fmt: skip


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; 0 for 0/0, NaN if anything is NaN."""
    a, b = found.detach().double(), expected.detach().double()
    difference, size = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
    return float(difference) if float(difference) == 0 else float(difference / size)


def _index(path: str, module: nn.Module, order: int) -> int:
    numbers = [int(part) for part in path.split("#")[0].split(".") if part.isdigit()]
    if numbers:
        return numbers[-1]
    own = getattr(module, "layer_idx", None)
    return own if isinstance(own, int) else order
