"""A model's own pass with its mixers frozen: from the input of its layers to their output."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsf._frozen_layers import constant, frozen_readout, frozen_values, without_start
from dsf.adapters._contract import first_tensor
from dsf.adapters._selection import layers_of, listed
from dsf.adapters._session import quiet, replaced
from dsf.derivatives import Derivative, parameters_constant
from dsf.errors import DsfFidelityError, DsfUnsupportedError, DsfValueError
from dsf.freezing import Frozen
from dsf.memory import require_memory
from dsf.scanning import scan
from dsf.tracing import TOLERANCE, LayerTrace, relative_error
from dsf.wrappers import core, is_cache

_MLP_NAMES = frozenset({
    "mlp", "mlp_block", "feed_forward", "feedforward", "intermediate", "shared_mlp",
    "block_sparse_moe",
})  # fmt: skip
_LAST_OF_MLP = {"linear2": "linear1", "ffn_output": "ffn"}
"""The last and first part of MLPs that are no module of their own: torch.nn's and ALBERT's."""
_MLP_CLASSES = re.compile(
    r"(MLP|Mlp|FeedForward|FFN|Intermediate|MoE|Moe|MoeBlock|Experts|DenseActDense|GatedActDense)$"
)


@dataclasses.dataclass
class Replay:
    """One frozen pass: `output` on the graph of the leaf `input`.

    `error`, where MLPs are constant: the output against its derivative applied to everything it
    is made of, which is the input, biases, what MLPs made, and what initial states and readouts
    add.
    """

    input: Tensor
    output: Tensor
    error: float | None = None


def replay(traces: Sequence[LayerTrace], end: str, *, mlps_constant: bool) -> Replay:
    """Run the traced pass once more, mixers replaced by their recurrences, norms held fixed."""
    model, members, float64 = _stack(traces)
    source = traces[0].source
    assert source is not None
    _require_maps(traces)
    state = _State(traces)
    with parameters_constant(model, but_biases=True) as biases:
        result = _run(state, source.call, model, members, mlps_constant, float64)
        output = state.output if end == "layers" else _first(result)
        if state.input is None or output is None or any(state.queues.values()):
            left = [t.name for queue in state.queues.values() for t in queue]
            raise DsfValueError(
                f"dsf.rollout: traces: expected mixers that run on this pass, got {listed(left)}."
            )
        error = None
        if mlps_constant:  # while the biases are on the graph
            leaves = (state.input, *biases, *state.constants)
            made = Derivative(leaves, output).apply(*(x.detach() for x in leaves))
            error = relative_error(made, output)
    return Replay(state.input, output, error)


def _run(
    state: _State, call: Callable[[], Any], model: nn.Module, members: list[nn.Module],
    mlps_constant: bool, float64: bool,
) -> Any:  # fmt: skip
    frozen = Frozen(gates=True)
    with contextlib.ExitStack() as stack, quiet(model, float64=float64), frozen:
        for member in members:
            stack.callback(member.register_forward_pre_hook(state.enter, with_kwargs=True).remove)
            stack.callback(member.register_forward_hook(state.leave).remove)
        for first, last in _mlps(members, state.mixers):
            if mlps_constant:
                stack.callback(last.register_forward_hook(state.hold).remove)
            else:
                before, after = _gates_free(frozen)
                stack.callback(first.register_forward_pre_hook(before).remove)
                stack.callback(last.register_forward_hook(after).remove)
        for module in {id(m): m for m in state.mixers}.values():
            stack.enter_context(replaced(module.__dict__, "forward", state.mixer(module)))
        return call()


class _State:
    """What the hooks of one replay share."""

    def __init__(self, traces: Sequence[LayerTrace]) -> None:
        self.queues: dict[int, list[LayerTrace]] = {}
        self.mixers: list[nn.Module] = []
        for trace in traces:
            assert trace.source is not None
            module = trace.source.visit.module
            self.mixers.append(module)
            self.queues.setdefault(id(module), []).append(trace)
        for queue in self.queues.values():
            queue.sort(key=lambda t: t.source.visit_number)  # type: ignore[union-attr]
        self.input: Tensor | None = None
        self.copies: list[Tensor] = []
        self.output: Tensor | None = None
        self.constants: list[Tensor] = []

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """The first layer's stream becomes the leaf that rows are taken to.

        So does a copy of it that is handed to later layers (Zamba's embeddings).
        """
        given = args, kwargs
        if self.input is None:
            stream = _stream(given)
            self.input = stream.detach().clone().requires_grad_()
            self.copies = [x for x in pytree.tree_leaves(given) if _equal(x, stream)]
        for copy in self.copies:
            given = _with(copy, self.input, given)
        return given

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The last layer that ran has the output of the stack."""
        self.output = first_tensor(output)

    def hold(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What an MLP made becomes a constant."""
        made = first_tensor(output)
        return _with(made, self._leaf(made), output)

    def mixer(self, module: nn.Module) -> Callable:
        """The frozen forward of a mixer: its values, its traced recurrence, its readout."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.queues[id(module)]:
                raise DsfValueError(
                    f"dsf.rollout: traces: expected a trace of every run of a layer, got fewer "
                    f"for {type(module).__name__}. Trace without layers=."
                )
            trace = self.queues[id(module)].pop(0)
            own = module.__dict__.pop("forward")
            try:
                made = self._frozen(trace, args, kwargs)
            finally:
                module.__dict__["forward"] = own
            assert trace.source is not None
            whole = trace.source.visit.output
            return _with(first_tensor(whole), made, whole)

        return forward

    def _frozen(self, trace: LayerTrace, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        values = frozen_values(trace, args, kwargs)
        system = constant(trace.recurrence)
        with parameters_constant(trace.source.visit.module):  # type: ignore[union-attr]
            y = scan(without_start(system), values, "chunked")
            if core(system).initial_state is not None:
                rest = torch.zeros_like(values)
                y = y + self._leaf(scan(system, rest, "chunked"))
            added = self._leaf(frozen_readout(trace, torch.zeros_like(y)))
            made = frozen_readout(trace, y) + (added - added.detach())
        error = relative_error(made, trace.output)
        limit = max(TOLERANCE.get(made.dtype, 1e-5), trace.attrs["tolerance"])
        if not error <= limit:
            raise DsfFidelityError(
                f"dsf.rollout: {trace.name}: expected the layer's traced output within "
                f"{limit:.3g}, got a relative difference of {error:.3g}: the model's weights "
                f"changed since the trace. Trace it again."
            )
        return made

    def _leaf(self, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        self.constants.append(leaf)
        return leaf


def _stack(traces: Sequence[LayerTrace]) -> tuple[nn.Module, list[nn.Module], bool]:
    """The model, the layers that the residual stream goes through, whether in float64."""
    if not traces or any(getattr(t, "source", None) is None for t in traces):
        raise DsfValueError(
            "dsf.rollout: traces: expected what dsf.trace returns for a model, got "
            f"{'none' if not traces else 'something else, or a trace without its pass'}."
        )
    sources = [t.source for t in traces if t.source is not None]
    model, call = sources[0].model, sources[0].call
    if any(s.model is not model or s.call is not call for s in sources):
        raise DsfValueError("dsf.rollout: traces: expected those of one pass, got several passes.")
    parts = [t.name for t in traces if t.name.split("#")[0] != t.source.visit.path]  # type: ignore[union-attr]
    if parts:
        raise DsfUnsupportedError(
            f"dsf.rollout: traces: expected modules of one layer each, got parts of one module: "
            f"{listed(parts)}."
        )
    stacks = {_container(model, s.visit.path) for s in sources}
    if len(stacks) > 1:
        raise DsfUnsupportedError(
            f"dsf.rollout: traces: expected layers of one stack, got those of "
            f"{listed(sorted(stacks))}. Give the traces of one of them."
        )
    (path,) = stacks
    container = model.get_submodule(path)
    is_list = isinstance(container, nn.ModuleList | nn.Sequential)
    given = {s.visit.path for s in sources}
    prefix = f"{path}." if path else ""
    missing = [p for p in layers_of(model) if p.startswith(prefix) and p not in given]
    if missing:
        raise DsfValueError(
            f"dsf.rollout: traces: expected every mixer of {path or 'the model'}, got none of "
            f"{listed(missing)}. Trace without layers=."
        )
    return model, list(container) if is_list else [container], sources[0].float64


def _require_maps(traces: Sequence[LayerTrace]) -> None:
    """Refuse what would not fit: the maps of softmax layers, kept on the graph."""
    caches = [core(t.recurrence) for t in traces if is_cache(core(t.recurrence))]
    if not caches:
        return
    batch, query, head, _, key = caches[0].C.shape
    require_memory(
        "dsf.rollout", "softmax maps on the graph", ("layer", "batch", "head", "query", "key"),
        (len(caches), batch, head, query, key), caches[0].dtype, device=caches[0].device,
        advice="Trace a shorter sequence or fewer sequences at a time.",
    )  # fmt: skip


def _container(model: nn.Module, path: str) -> str:
    """The outermost list of modules above a mixer; the model itself if there is none."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if isinstance(model.get_submodule(above), nn.ModuleList | nn.Sequential):
            return above
    return ""


def _gates_free(frozen: Frozen) -> tuple[Callable, Callable]:
    """Hooks around an MLP: inside, activations have their true derivatives."""

    def before(*_: Any) -> None:
        frozen.gates = False

    def after(*_: Any) -> None:
        frozen.gates = True

    return before, after


def _mlps(
    members: Sequence[nn.Module], mixers: Sequence[nn.Module]
) -> list[tuple[nn.Module, nn.Module]]:
    """First and last part (often one) of what is named like an MLP and holds no mixer."""
    known = {id(m) for m in mixers}
    found = [pair for member in members for pair in _outermost(member, known)]
    return list({id(last): (first, last) for first, last in found}.values())


def _outermost(module: nn.Module, mixers: set[int]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for name, child in module.named_children():
        if id(child) in mixers:
            continue
        known = name in _MLP_NAMES or _MLP_CLASSES.search(type(child).__name__)
        if name in _LAST_OF_MLP:
            yield getattr(module, _LAST_OF_MLP[name], child), child
        elif known and not any(id(m) in mixers for m in child.modules()):
            yield child, child
        else:
            yield from _outermost(child, mixers)


def _stream(given: Any) -> Tensor:
    for x in pytree.tree_leaves(given):
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3:
            return x
    raise DsfUnsupportedError(
        "dsf.rollout: expected layers whose first input is (batch, time, features), got none."
    )


def _equal(x: Any, stream: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == stream.shape and torch.equal(x, stream)


def _with(old: Tensor, new: Tensor, tree: Any) -> Any:
    """The same structure with one tensor in another's place."""
    return pytree.tree_map(lambda x: new if x is old else x, tree)


def _first(result: Any) -> Tensor:
    return first_tensor(result.to_tuple() if hasattr(result, "to_tuple") else result)
