"""A model's own pass with its mixers frozen: from the input of its layers to their output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsf._frozen_layers import constant, frozen_output, frozen_run, without_start
from dsf._mlps import gates_free, mlps
from dsf.adapters._contract import first_tensor
from dsf.adapters._selection import listed
from dsf.adapters._session import quiet, replaced
from dsf.derivatives import Derivative, parameters_constant
from dsf.errors import DsfFidelityError, DsfUnsupportedError, DsfValueError
from dsf.freezing import Frozen
from dsf.scanning import scan
from dsf.tracing import TOLERANCE, LayerTrace, relative_error
from dsf.wrappers import core

_SAME = 1e-2
"""Relative difference of two runs of one thing in any precision; two things differ by about 1."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Traced layers that one residual stream goes through, and where they are in their model.

    `members` hold the mixers, `others` are the mixers of the model outside them.
    """

    traces: list[LayerTrace]
    model: nn.Module
    path: str
    members: list[nn.Module]
    others: list[nn.Module]
    float64: bool


@dataclasses.dataclass
class Replay:
    """One frozen pass: `output` on the graph of the leaves `input` and `other`.

    `other` is what cross-attention reads, if there is any. `error`, where MLPs are constant: the
    output against its derivative applied to everything it is made of, which is the input, the
    other sequence, biases, what MLPs made, and what initial states add.
    """

    input: Tensor
    other: Tensor | None
    output: Tensor
    error: float | None = None


def replay(stack: Stack, end: str, *, mlps_constant: bool) -> Replay:
    """Run the traced pass once more, mixers replaced by their recurrences, norms held fixed."""
    source = stack.traces[0].source
    assert source is not None
    state = _State(stack.traces)
    with parameters_constant(stack.model, but_biases=True) as biases:
        result = _run(state, source.call, stack, mlps_constant)
        output = state.output if end == "layers" else _first(result)
        if state.input is None or output is None or any(state.queues.values()):
            left = [t.name for queue in state.queues.values() for t in queue]
            raise DsfValueError(
                f"dsf.rollout: traces: expected mixers that run on this pass, got {listed(left)}."
            )
        if end == "model" and state.followed:
            raise DsfValueError(
                f"dsf.rollout: end: expected 'layers' for {stack.path}, got 'model': other layers "
                f"run between this stack and the model's output."
            )
        error = None
        if mlps_constant:  # while the biases are on the graph
            seen = [x for x in (state.input, state.other) if x is not None]
            leaves = (*seen, *biases, *state.constants)
            made = Derivative(leaves, output).apply(*(x.detach() for x in leaves))
            error = relative_error(made, output)
    return Replay(state.input, state.other, output, error)


def _run(state: _State, call: Callable[[], Any], stack: Stack, mlps_constant: bool) -> Any:
    frozen = Frozen(gates=True)
    with contextlib.ExitStack() as opened, quiet(stack.model, float64=stack.float64), frozen:
        for member in stack.members:
            opened.callback(member.register_forward_pre_hook(state.enter, with_kwargs=True).remove)
            opened.callback(member.register_forward_hook(state.leave).remove)
        for module in stack.others:
            opened.callback(module.register_forward_pre_hook(state.outside).remove)
        for first, last in mlps(stack.members, state.mixers):
            if mlps_constant:
                opened.callback(last.register_forward_hook(state.hold).remove)
            else:
                before, after = gates_free(frozen)
                opened.callback(first.register_forward_pre_hook(before).remove)
                opened.callback(last.register_forward_hook(after).remove)
        for module in {id(m): m for m in state.mixers}.values():
            opened.enter_context(replaced(module.__dict__, "forward", state.mixer(module)))
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
        read = next((x for x in map(other_sequence, traces) if x is not None), None)
        self.other = None if read is None else read.detach().clone().requires_grad_()
        self.input: Tensor | None = None
        self.copies: list[Tensor] = []
        self.output: Tensor | None = None
        self.constants: list[Tensor] = []
        self.followed = False

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """The first layer's stream becomes the leaf that rows are taken to.

        So does a copy of it that is handed to later layers (Zamba's embeddings). The other
        sequence becomes a leaf of its own.
        """
        given = args, kwargs
        if self.other is not None:
            read = self.other
            given = pytree.tree_map(lambda x: read if _near(x, read) else x, given)
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

    def outside(self, module: nn.Module, args: Any) -> None:
        """Whether a mixer outside the stack runs behind it."""
        self.followed = self.followed or self.output is not None

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
        run = frozen_run(trace, args, kwargs)
        system = constant(trace.recurrence)
        values = run.values
        if values.ndim == 5 and core(system).system == "short_convolution":
            x, one = values.split(1, dim=3)  # what drives its bias
            values = torch.cat([x, self._leaf(one)], dim=3)
        y = scan(without_start(system), values, "chunked")
        if core(system).initial_state is not None:
            rest = torch.zeros_like(values)
            y = y + self._leaf(scan(system, rest, "chunked"))
        made = frozen_output(trace, run, y)
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


# -- what is what ------------------------------------------------------------------------------


def other_sequence(trace: LayerTrace) -> Tensor | None:
    """What a layer of cross-attention was given next to its queries; None of any other layer."""
    assert trace.source is not None
    n_key, visit = trace.attrs.get("n_key"), trace.source.visit
    if n_key is None and not isinstance(visit.module, nn.MultiheadAttention):
        return None
    given = pytree.tree_leaves((visit.args, visit.kwargs))
    own, *others = [
        x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3
    ]
    fits = (x for x in others if not _equal(x, own) and n_key in (None, x.shape[1]))
    return next(fits, None)


def _stream(given: Any) -> Tensor:
    for x in pytree.tree_leaves(given):
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3:
            return x
    raise DsfUnsupportedError(
        "dsf.rollout: expected layers whose first input is (batch, time, features), got none."
    )


def _equal(x: Any, stream: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == stream.shape and torch.equal(x, stream)


def _near(x: Any, read: Tensor) -> bool:
    """Whether it is the other sequence, made once more under frozen norms, which round anew."""
    return (isinstance(x, Tensor) and x.shape == read.shape
            and relative_error(x, read) <= _SAME)  # fmt: skip


def _with(old: Tensor, new: Tensor, tree: Any) -> Any:
    """The same structure with one tensor in another's place."""
    return pytree.tree_map(lambda x: new if x is old else x, tree)


def _first(result: Any) -> Tensor:
    return first_tensor(result.to_tuple() if hasattr(result, "to_tuple") else result)
