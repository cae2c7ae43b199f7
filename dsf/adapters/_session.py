"""One forward pass with open taps: which layer is running, what it was given, what it made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsf.adapters._contract import Adapter, TappedCall, Visit
from dsf.precision import Float64Throughout

_running: ContextVar[tuple[object, ...]] = ContextVar("dsf_running_sessions", default=())


class Session:
    """Visits of the asked layers during one pass, in the order in which they ended."""

    def __init__(self, *, gradients: bool) -> None:
        self.gradients = gradients
        self.visits: list[Visit] = []
        self.past: int | None = None
        self._stack: list[Visit] = []

    @property
    def listening(self) -> bool:
        """False while another pass or a replay runs inside this one."""
        return _running.get()[-1:] == (self,)

    def record(self, module: nn.Module | list[nn.Module] | None, call: TappedCall) -> None:
        """File a tapped call under the running layer: `module`, or the innermost one.

        A list: under the innermost one if it is in the list. Another adapter's layer may call the
        same function for a part of its own.
        """
        if not self.listening:
            return
        if isinstance(module, list):
            at = [v for v in self._stack[-1:] if any(v.module is m for m in module)]
        else:
            at = [v for v in self._stack if module is None or v.module is module]
        if not at:
            return
        if not self.gradients:  # parameters are handed over as they are
            call.args, call.kwargs = pytree.tree_map(_detached, (call.args, call.kwargs))
        if self.past is not None:  # a cache is written on in place
            call.args, call.kwargs = pytree.tree_map(_copied, (call.args, call.kwargs))
        at[-1].taps.append(call)

    @contextlib.contextmanager
    def hooked(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Keep a stack of the layers that are running: pushed before, popped after each."""
        with contextlib.ExitStack() as stack:
            for path, module in layers.items():
                before = module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(self._leave, prepend=True, always_call=True)
                stack.callback(after.remove)
            yield

    def _enter(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.listening:
                args, kwargs = self._kept((args, kwargs))
                self._stack.append(Visit(path, module, args, kwargs, past=self.past))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.listening and self._stack and self._stack[-1].module is module:
            visit = self._stack.pop()
            visit.output = self._kept(output)
            self.visits.append(visit)

    def _kept(self, tree: Any) -> Any:
        """Copies, since models add residuals in place; on the graph if gradients are wanted."""

        def keep(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.clone() if self.gradients else x.detach().clone()

        return pytree.tree_map(keep, tree)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def cache_has_seen(tokens: int) -> None:
    """Said inside a pass, before the model is called: so many tokens are in its cache."""
    session = _running.get()[-1]
    assert isinstance(session, Session)
    session.past = tokens


def run_pass(
    model: nn.Module,
    call: Callable[[], Any],
    layers: Mapping[str, tuple[nn.Module, Adapter]],
    *,
    gradients: bool,
    float64: bool,
) -> list[Visit]:
    """Run `call` with the taps of `layers` open; everything is closed again whatever happens."""
    session = Session(gradients=gradients)
    by_adapter: dict[int, tuple[Adapter, list[nn.Module]]] = {}
    for module, adapter in layers.values():
        by_adapter.setdefault(id(adapter), (adapter, []))[1].append(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(model, float64=float64, inner=session))
        for adapter, modules in by_adapter.values():
            stack.enter_context(adapter.tap(modules, session.record))
        stack.enter_context(session.hooked({path: m for path, (m, _) in layers.items()}))
        stack.enter_context(torch.set_grad_enabled(gradients))
        call()
    return session.visits


@contextlib.contextmanager
def quiet(model: nn.Module, *, float64: bool, inner: object = None) -> Iterator[None]:
    """Evaluation mode, torch's fused attention off (it hides hooks), outer sessions deaf."""
    training = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    token = _running.set((*_running.get(), inner))
    try:
        for module, _ in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with Float64Throughout() if float64 else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training:
            module.training = mode
        _running.reset(token)


@contextlib.contextmanager
def replaced(namespace: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """A name of a module or an instance replaced for a while, whatever its kind.

    A name that was not there, such as a method's on its instance, is taken away again.
    """
    there, original = name in namespace, namespace.get(name)
    namespace[name] = value
    try:
        yield
    finally:
        if there:
            namespace[name] = original
        else:
            del namespace[name]
