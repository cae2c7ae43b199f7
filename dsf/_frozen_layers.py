"""One traced layer run again with its gates and norms held fixed: its values, its readout."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.adapters import Built
from dsf.adapters._replay import Source
from dsf.adapters._session import quiet
from dsf.errors import DsfUnsupportedError
from dsf.freezing import Frozen
from dsf.tracing import LayerTrace
from dsf.wrappers import Anticausal, Bidirectional, Gated, System


def frozen_run(trace: LayerTrace, args: tuple, kwargs: dict[str, Any]) -> Built:
    """The layer run again on these arguments, its values on their graph, gates held fixed."""
    source = single(trace)
    with Frozen(gates=True, left_gates=source.adapter.gates_first):
        return source.rebuilt(args, kwargs)[source.part]


def frozen_values(trace: LayerTrace, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The values that the layer makes of these arguments, on their graph, gates held fixed."""
    return frozen_run(trace, args, kwargs).values


def frozen_output(trace: LayerTrace, run: Built, y: Tensor) -> Tensor:
    """A run's output made of the scan's output y, on both graphs: a residual counts, gates not."""
    source, frozen = single(trace), Frozen(gates=True)
    inside = quiet(source.visit.module, float64=source.float64)
    with frozen, frozen.follow(y), torch.enable_grad(), inside:
        return run.readout(y)


def frozen_readout(trace: LayerTrace, y: Tensor) -> Tensor:
    """The layer's output made of the scan's output y, on its graph, norms held fixed."""
    with Frozen(gates=True), torch.enable_grad():
        return trace.readout(y)


def constant(system: System) -> System:
    """The system off the graph."""
    return pytree.tree_map(held, system)


def without_start(system: System) -> System:
    """The system from a zero state: what is linear in its values."""
    if isinstance(system, Gated):
        return Gated(without_start(system.system), system.gate)  # type: ignore[arg-type]
    if isinstance(system, Bidirectional):
        return Bidirectional(
            without_start(system.causal), without_start(system.anticausal))  # type: ignore[arg-type]  # fmt: skip
    if isinstance(system, Anticausal):
        return dataclasses.replace(system, recurrence=without_start(system.recurrence))
    return system.replace(initial_state=None)


def single(trace: LayerTrace) -> Source:
    source = trace.source
    if source is None:
        raise DsfUnsupportedError(
            f"dsf.trace(...).block: {trace.name}: expected a trace with its pass (source), got "
            f"none. Make it with dsf.trace or dsf.from_layer."
        )
    if source.visit.past is not None:
        raise DsfUnsupportedError(
            f"dsf.trace(...).block: {trace.name}: expected a pass over the whole sequence, got a "
            f"step with a cache. Trace the sequence at once."
        )
    if trace.name.split("#")[0] != source.visit.path:
        raise DsfUnsupportedError(
            f"dsf.trace(...).block: {trace.name}: expected a module that is one layer, got a "
            f"part of {type(source.visit.module).__name__} at {source.visit.path!r}. Recurrent "
            f"modules of torch.nn have no block: LSTM and GRU make values of their own output. "
            f"Their recurrence and its map are in the trace."
        )
    return source


def the_input(trace: LayerTrace, values: Tensor, given: Any) -> Tensor:
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    found: tuple = (None,) * len(leaves)
    if values.requires_grad:
        seed = torch.ones_like(values)
        found = torch.autograd.grad(values, leaves, seed, retain_graph=True, allow_unused=True)
    used = [x for x, row in zip(leaves, found, strict=True) if row is not None]
    if len(used) != 1 or used[0].ndim != 3 or values.ndim != 4:
        raise DsfUnsupportedError(
            f"dsf.trace(...).block: {trace.name}: expected values (batch, time, head, channel) "
            f"made of one input (batch, time, features), got values {tuple(values.shape)} made "
            f"of {[tuple(x.shape) for x in used]}."
        )
    return used[0]


def leaf(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def held(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
