"""What an adapter is: it recognises a layer, taps its forward pass, and builds the recurrence."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from dsf.errors import DsfUnsupportedError
from dsf.wrappers import System


@dataclasses.dataclass
class TappedCall:
    """One call of a tapped function: its arguments and what it returned."""

    function: str
    args: tuple
    kwargs: dict[str, Any]
    result: Any
    implementation: str = ""


@dataclasses.dataclass
class Visit:
    """One run of one layer on the real forward pass.

    `past` is the number of tokens that the model's cache had seen before, None without a cache.
    """

    path: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    taps: list[TappedCall] = dataclasses.field(default_factory=list)
    past: int | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """What an adapter makes of a visit; several per visit for a stacked RNN.

    `readout` maps the scan's output y to the layer's `output`. `tapped` is what the tapped
    function returned and `to_tapped` maps y to it: the error at the scan, before gates and norms.
    `suffix` tells the parts of one module apart ("l0_reverse").
    """

    system: str
    recurrence: System
    values: Tensor
    readout: Callable[[Tensor], Tensor]
    output: Tensor
    tapped: Tensor | None = None
    to_tapped: Callable[[Tensor], Tensor] | None = None
    suffix: str = ""
    layer: int | None = None
    attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Adapter(abc.ABC):
    """Base of every adapter, in this folder or in another package (entry point `dsf.adapters`).

    `name` identifies it in messages, `covers` lists in words what it recognises, `classes` the
    class names. `needs_tap` says that a visit without a tapped call is an error.
    """

    name: ClassVar[str] = ""
    covers: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[frozenset[str]] = frozenset()
    """`module:Class`, compared with every class along the layer's `__mro__`, nothing imported."""
    needs_tap: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    """Whether `build` also understands calls with a cache, for `dsf.trace_decoding`."""
    gates_first: ClassVar[bool] = False
    """Whether the left of two factors made of the input is a gate: blocks hold it fixed."""
    systems: ClassVar[tuple[str, ...]] = ()
    """The registered names it builds, and `tapped`, where it reads them: for the table of layers,
    which otherwise goes by `name`, `functions` and `needs_tap`."""
    structure: ClassVar[str] = ""
    """A in symbols, for the same table, where the system has no registered model."""
    tapped: ClassVar[str] = ""
    scope: ClassVar[str] = "exact"
    """Or "along trajectory": coefficients that depend on the layer's own state."""
    releases: ClassVar[str] = ""
    """What it was tried with ("fla 0.6.0"), where the pins of the tests do not say."""

    def recognises(self, module: nn.Module) -> bool:
        """Whether this adapter covers the layer, told from its class names alone."""
        return known_class(module, self.classes) is not None

    def tap(self, modules: list[nn.Module], record: Callable) -> contextlib.AbstractContextManager:
        """Open the taps for one pass over these layers, and close them whatever happens.

        `record(module, TappedCall)` files a call under that layer if it is running; with a list,
        under the innermost running layer if it is in the list; with None, under any innermost one.
        """
        return contextlib.nullcontext()

    @abc.abstractmethod
    def build(self, visit: Visit) -> list[Built]:
        """The recurrence, values and readout of one visit."""


def known_class(module: nn.Module, names: frozenset[str]) -> str | None:
    """The first class along the `__mro__` whose `module:Class` is in `names`."""
    for cls in type(module).__mro__:
        name = f"{cls.__module__}:{cls.__qualname__}"
        if name in names:
            return name
    return None


def first_tensor(output: Any) -> Tensor:
    """The layer's output where it returns a tuple: its first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise DsfUnsupportedError(
        f"dsf.adapters: output: expected a tensor or a tuple that starts with one, got "
        f"{type(output).__name__}."
    )
