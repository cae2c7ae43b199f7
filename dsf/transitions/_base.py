"""What every transition can do, and how two different structures are multiplied."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsf.errors import DsfShapeError, DsfUnsupportedError
from dsf.shapes import Inexact, broadcast_shapes

Class = TypeVar("Class", bound=type)
Own = TypeVar("Own", bound="Transition")
"""The caller's own type: typing.Self, which the shape checker of the tests does not know."""

LEAD = ("batch", "time", "head")


def field_is_static(field: dataclasses.Field) -> bool:
    """Static fields (sizes, flags, labels) are not tensors: they travel in the pytree context."""
    return bool(field.metadata.get("static", False))


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the structure, not of the data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def register(cls: Class) -> Class:
    """Make a frozen dataclass a pytree (tensors are leaves), so vmap, grad and compile see it."""
    fields = dataclasses.fields(cls)
    data = [f.name for f in fields if not field_is_static(f)]
    meta = [f.name for f in fields if field_is_static(f)]

    def present(obj: Any) -> list[str]:
        return [n for n in data if getattr(obj, n) is not None]  # None is no leaf: vmap wants none

    def context(obj: Any) -> tuple[Any, ...]:
        return (tuple(present(obj)), *(getattr(obj, n) for n in meta))

    def flatten(obj: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(obj, n) for n in present(obj)], context(obj)

    def flatten_with_keys(obj: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [(pytree.GetAttrKey(n), getattr(obj, n)) for n in present(obj)], context(obj)

    def unflatten(leaves: Any, kept: tuple[Any, ...]) -> Any:
        given = dict(zip(kept[0], leaves, strict=True))
        empty = dict.fromkeys(set(data) - set(given))
        return cls(**given, **empty, **dict(zip(meta, kept[1:], strict=True)))

    # transforms put placeholders into the fields: run-time type checkers leave them to validate()
    cls.__no_type_check__ = True
    pytree.register_pytree_node(
        cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )  # fmt: skip
    return cls


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of real and complex, or differently precise, operands."""
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return a @ b


_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32,
         torch.complex128: torch.float64}  # fmt: skip
_COMPLEX = {torch.float16: torch.complex32, torch.float64: torch.complex128}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of real parts. (torch.compile does not know `dtype.to_real`.)"""
    return _REAL.get(dtype, dtype)


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of the same precision, complex64 at least for 16-bit brain floats."""
    return dtype if dtype.is_complex else _COMPLEX.get(dtype, torch.complex64)


def is_traced() -> bool:
    """Whether the numbers cannot be looked at: under compile, vmap or the grad transforms."""
    inside = torch._C._functorch.maybe_current_level()  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or inside is not None


def time_steps(x: Tensor, length: int) -> Sequence[Tensor]:
    """The `length` steps of a coefficient, without the time axis; size-1 time is shared."""
    return x.unbind(1) if x.shape[1] != 1 else [x[:, 0]] * length


class Transition(abc.ABC):
    """A_t of one recurrence for every batch, time and head: leading axes first, then its own.

    Subclasses are frozen dataclasses whose tensors start with (batch, time, head); sizes 1 of
    these broadcast. `own_axes` names the axes that follow, field by field. `apply`, `compose`,
    `widen` and `as_dense` also accept tensors with fewer or more leading axes, so a single step
    is a transition too. `generality` orders the structures: `widen` never lowers it.
    """

    structure: ClassVar[str] = ""
    own_axes: ClassVar[dict[str, tuple[str, ...]]] = {}
    generality: ClassVar[int] = 3
    n_state: int

    @abc.abstractmethod
    def apply(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """A h for `state` (..., state, channel)."""

    @abc.abstractmethod
    def apply_transposed(
        self, state: Inexact[Tensor, "*lead state channel"]
    ) -> Inexact[Tensor, "*all state channel"]:
        """A^T h (no conjugation): what the adjoint and output rows need."""

    @abc.abstractmethod
    def compose(self: Own, earlier: Own) -> Transition:
        """The product A_self A_earlier of two transitions of this type."""

    @abc.abstractmethod
    def widen(self) -> Transition:
        """The same matrix in the next more general structure; Dense widens to itself."""

    @abc.abstractmethod
    def as_dense(self) -> Inexact[Tensor, "*lead state state"]:
        """The matrix, (..., state, state), written without `apply`: the truth of the laws."""

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fast path: outputs C_t h_t and the final state. The default is the plain loop."""
        from dsf.scanning import loop

        return loop(self, B, C, values, state)

    def triton_gap(self, n_channel: int) -> str:
        """Why no Triton kernel runs this transition on such values; "" if one does."""
        return f"structure {self.structure!r} has no Triton kernel"

    def scan_triton(self, B: Any, C: Any, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The same by a kernel, where `triton_gap` is empty: one input, one output."""
        raise DsfUnsupportedError(f"dsf.scan: {self.triton_gap(values.shape[-1])}.")

    def after(self, earlier: Transition) -> Transition:
        """The product A_self A_earlier of any two structures, widened until the types meet."""
        if self.n_state != earlier.n_state:
            raise DsfShapeError(
                f"dsf.Transition.after: earlier: expected state={self.n_state}, got "
                f"{earlier.n_state}; state is fixed by the later transition."
            )
        later: Transition = self
        like = next(iter([*self.tensors(), *earlier.tensors()]), None)
        while type(later) is not type(earlier):
            if later.generality <= earlier.generality:
                later = _widened(later, like)
            else:
                earlier = _widened(earlier, like)
        return later.compose(earlier)

    def tensors(self) -> list[Tensor]:
        """The tensors this transition holds."""
        return [t for t in pytree.tree_leaves(self) if isinstance(t, Tensor)]

    def map_tensors(self: Own, function: Callable[[Tensor], Tensor]) -> Own:
        """The same structure with `function` applied to each of its tensors."""
        leaves, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten(
            [function(t) if isinstance(t, Tensor) else t for t in leaves], spec
        )

    def at(self: Own, t: int) -> Own:
        """The transition of step t (0-based), without the time axis; size-1 time is shared."""
        return self.map_tensors(lambda x: x[:, t if x.shape[1] > 1 else 0])

    def steps(self: Own, length: int) -> list[Own]:
        """`at(t)` for every t of `length`, with the tensors taken apart once."""
        leaves, spec = pytree.tree_flatten(self)
        if not leaves:
            return [self] * length
        columns = zip(*(time_steps(x, length) for x in leaves), strict=True)
        return [pytree.tree_unflatten(row, spec) for row in columns]

    def time_slice(self: Own, start: int, stop: int) -> Own:
        """The transitions of steps start..stop-1, time axis kept."""
        return self.map_tensors(lambda x: x[:, start:stop] if x.shape[1] > 1 else x)

    def flip_time(self: Own) -> Own:
        """The transitions in reverse order of time."""
        return self.map_tensors(lambda x: x.flip(1) if x.shape[1] > 1 else x)

    def lead_shape(self) -> tuple[int, ...]:
        """Broadcast (batch, time, head)."""
        return tuple(broadcast_shapes(*[t.shape[:3] for t in self.tensors()], (1, 1, 1)))

    def shape_faults(self) -> list[str]:
        """What does not fit in the tensors' own axes, one sentence each; empty if all is well."""
        fields = [
            (n, x, a) for n, a in self.own_axes.items() if (x := getattr(self, n)) is not None
        ]
        wrong = [
            f"A.{name}: expected axes {(*LEAD, *axes)}, got shape {tuple(x.shape)}."
            for name, x, axes in fields if x.ndim != 3 + len(axes)
        ]  # fmt: skip
        if wrong:
            return wrong
        sizes = {"state": self.n_state}
        for name, x, axes in fields:
            found = tuple(x.shape[3:])
            expected = tuple(sizes.setdefault(a, s) for a, s in zip(axes, found, strict=True))
            if found != expected:
                named = ", ".join(f"{a}={s}" for a, s in zip(axes, expected, strict=True))
                wrong.append(
                    f"A.{name}: expected axes (batch, time, head, {named}), got {tuple(x.shape)}; "
                    f"the {self.structure} transition fixes them."
                )
        return wrong

    @property
    def is_complex(self) -> bool:
        """Whether A has complex entries."""
        return any(t.is_complex() for t in self.tensors())


def _widened(transition: Transition, like: Tensor | None) -> Transition:
    wider = transition.widen()
    if transition.tensors() or like is None:
        return wider
    # a structure without tensors has no dtype and device of its own: take the other's
    return wider.map_tensors(lambda x: x.to(like.device, real_dtype(like.dtype)))
