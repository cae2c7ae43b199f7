"""Layers whose scan is a call by name: replaced for one pass, recorded, and put back."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from dsf.adapters._contract import Adapter, TappedCall, Visit, first_tensor, known_class
from dsf.adapters._session import replaced
from dsf.errors import DsfUnsupportedError

OLDEST = (5, 15)
"""The first transformers release whose recurrent layers call their scan by name."""


class Place(NamedTuple):
    """Where a scan is looked up when it is called: `namespace[name]`, which is `original`."""

    namespace: dict[str, Any]
    name: str
    original: Callable


class TappedLayer(Adapter):
    """Base: one or more calls, each looked up at a `Place`, hold the whole recurrence.

    `parameters` are those of the call in order, with their defaults: names are given by them,
    since the signature of a kernel may say nothing. `states` names those that a cache may change
    in place after the call; they are recorded as copies.
    """

    parameters: ClassVar[dict[str, Any]] = {}
    states: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def places(self, module: nn.Module) -> list[Place]:
        """The places of one layer, those of functions shared with the layers of the same file."""

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Replace what is called by its name, whatever its type, and record around it."""
        require_release(self.name, modules)
        shared: dict[tuple[int, str], tuple[Place, list[nn.Module]]] = {}
        for module in modules:
            for place in self.places(module):
                key = id(place.namespace), place.name
                shared.setdefault(key, (place, []))[1].append(module)
        with contextlib.ExitStack() as stack:
            for place, layers in shared.values():
                tapped = self._recording(place, layers, record)
                stack.enter_context(replaced(place.namespace, place.name, tapped))
            yield

    def _recording(self, place: Place, layers: list[nn.Module], record: Callable) -> Callable:
        implementation = implementation_of(place.original)

        def tapped(*args: Any, **kwargs: Any) -> Any:
            given = self.named(args, kwargs, place.name)
            for name in self.states & given.keys():
                given[name] = None if given[name] is None else given[name].clone()
            result = place.original(*args, **kwargs)
            record(layers, TappedCall(place.name, (), given, result, implementation))
            return result

        tapped.inner = place.original  # type: ignore[attr-defined]
        return tapped

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """The arguments of a call by name; the parameters may depend on what was called."""
        return {**self.parameters, **dict(zip(self.parameters, args, strict=False)), **kwargs}

    def arguments(self, visit: Visit) -> dict[str, Any]:
        """The arguments of the one recorded call, by name."""
        if len(visit.taps) > 1:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of {visit.taps[0].function}, got "
                f"{len(visit.taps)}. The layer scans several parts; write an adapter for it."
            )
        return visit.taps[0].kwargs

    def readout(self, visit: Visit, result: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        """The layer run again around a given y: its own gates, norms and projections.

        `result(y, arguments, number)` is what the scan's call returns, the first with number 0.
        """
        module = visit.module

        def readout(y: Tensor) -> Tensor:
            numbers = itertools.count()

            def giving(function: str, *args: Any, **kwargs: Any) -> Any:
                return result(y, self.named(args, kwargs, function), next(numbers))

            with contextlib.ExitStack() as stack:
                for place in self.places(module):
                    instead = functools.partial(giving, place.name)
                    stack.enter_context(replaced(place.namespace, place.name, instead))
                return first_tensor(module.forward(*visit.args, **visit.kwargs))

        return readout


class ScanFunction(TappedLayer):
    """Base: a function of the modelling file, one of `functions`, holds the recurrence."""

    functions: ClassVar[tuple[str, ...]] = ()

    def namespace(self, module: nn.Module) -> dict[str, Any]:
        """The names of the file that defines the layer's class."""
        name = known_class(module, self.classes)
        assert name is not None
        return sys.modules[name.partition(":")[0]].__dict__

    def places(self, module: nn.Module) -> list[Place]:
        """The functions by their names in that file."""
        space = self.namespace(module)
        missing = [name for name in self.functions if space.get(name) is None]
        if missing:
            raise DsfUnsupportedError(
                f"dsf.trace: {self.name}: expected {space['__name__']} to have a function "
                f"{missing[0]!r}, got none. Install a release of "
                f"{space['__name__'].partition('.')[0]} that this adapter knows."
            )
        return [Place(space, name, space[name]) for name in self.functions]


def method_of(unit: nn.Module, name: str) -> Place:
    """The place of a method: it is set on the instance, in front of its class's own."""
    return Place(unit.__dict__, name, getattr(unit, name))


def transformers_classes(table: dict[str, str]) -> frozenset[str]:
    """`module:Class` names from {folder: classes separated by spaces}."""
    return frozenset(
        f"transformers.models.{folder}.modeling_{folder}:{name}"
        for folder, names in table.items() for name in names.split()
    )  # fmt: skip


def refuse_packed(visit: Visit, given: dict[str, Any]) -> None:
    """Several sequences in one row, told apart by offsets or numbers, are not one recurrence."""
    for name in ("cu_seqlens", "seq_idx"):
        if given.get(name) is not None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: {name}: expected one sequence in each row of the "
                f"batch, got packed ones. Pass them as a padded batch with its attention_mask."
            )


def refuse_inference_params(visit: Visit) -> None:
    """mamba_ssm's cache, which its layers change in place."""
    if visit.kwargs.get("inference_params") is not None:
        raise DsfUnsupportedError(
            f"dsf.trace: {visit.path}: inference_params: expected none, got a cache. Pass the "
            f"whole sequence at once."
        )


def implementation_of(function: Any) -> str:
    """Where the function that really runs comes from: torch code, a package or a hub kernel."""
    while hasattr(function, "inner"):  # a tap around a tap
        function = function.inner
    function = getattr(function, "__func__", function)
    if isinstance(function, nn.Module):
        return f"kernel {type(function).__name__}"
    if not inspect.isfunction(function):
        return type(function).__name__
    inner = inspect.getclosurevars(function).nonlocals.get("implementation", function)
    module = getattr(inner, "__module__", "unknown") or "unknown"
    return "torch" if module.startswith("transformers.") else module


def require_release(adapter: str, modules: list[nn.Module]) -> None:
    """Refuse transformers releases whose recurrent layers do not have the function yet."""
    if not any(type(m).__module__.startswith("transformers.") for m in modules):
        return
    version = sys.modules["transformers"].__version__
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        raise DsfUnsupportedError(
            f"dsf.trace: {adapter}: expected transformers >= {OLDEST[0]}.{OLDEST[1]}, got "
            f"{version}. Before that release a recurrent layer's scan was inline in its forward, "
            f"where nothing can be read. Upgrade transformers."
        )
