"""What every transition can do, and how two different structures are multiplied."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def field_is_static(field: dataclasses.Field) -> bool:
    """Static fields (sizes, flags, labels) are not tensors: they travel in the pytree context."""
    return bool(field.metadata.get("static", False))


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the structure, not of the data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def register(cls: type) -> type:
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


class Transition:
    """A_t of one recurrence for every batch, time and head: leading axes first, then its own.

    Subclasses are frozen dataclasses whose tensors start with (batch, time, head); sizes 1
    broadcast. `apply`, `compose`, `widen` and `as_dense` also accept tensors with fewer or more
    leading axes, so a single step is a transition too.
    """

    structure: ClassVar[str] = ""
    n_state: int

    def apply(self, state: Tensor) -> Tensor:
        """A h for `state` (..., state, channel)."""
        raise NotImplementedError

    def apply_transposed(self, state: Tensor) -> Tensor:
        """A^T h (no conjugation): what the adjoint and output rows need."""
        raise NotImplementedError

    def compose(self, earlier: Self) -> Transition:
        """The product A_self A_earlier of two transitions of this type."""
        raise NotImplementedError

    def widen(self) -> Transition:
        """The same matrix in the next more general structure; Dense widens to itself."""
        raise NotImplementedError

    def as_dense(self) -> Tensor:
        """The matrix, (..., state, state), written without `apply`: the truth of the laws."""
        raise NotImplementedError

    def scan_chunked(
        self, B: Any, C: Any, values: Tensor, state: Tensor, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fast path: outputs C_t h_t and the final state. The default is the plain loop."""
        from dsf.scanning import loop

        return loop(self, B, C, values, state)

    def after(self, earlier: Transition) -> Transition:
        """The product A_self A_earlier of any two structures, widened until the types meet."""
        later: Transition = self
        seen = {type(t): t for t in _chain(earlier)}
        while type(later) not in seen:
            later = later.widen()
        return later.compose(seen[type(later)])

    def tensors(self) -> list[Tensor]:
        """The tensors this transition holds."""
        return [t for t in pytree.tree_leaves(self) if isinstance(t, Tensor)]

    def map_tensors(self, function: Any) -> Self:
        """The same structure with `function` applied to each of its tensors."""
        leaves, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten(
            [function(t) if isinstance(t, Tensor) else t for t in leaves], spec
        )

    def at(self, t: int) -> Self:
        """The transition of step t (0-based), without the time axis; size-1 time is shared."""
        return self.map_tensors(lambda x: x[:, t if x.shape[1] > 1 else 0])

    def time_slice(self, start: int, stop: int) -> Self:
        """The transitions of steps start..stop-1, time axis kept."""
        return self.map_tensors(lambda x: x[:, start:stop] if x.shape[1] > 1 else x)

    def flip_time(self) -> Self:
        """The transitions in reverse order of time."""
        return self.map_tensors(lambda x: x.flip(1) if x.shape[1] > 1 else x)

    def lead_shape(self) -> tuple[int, ...]:
        """Broadcast (batch, time, head)."""
        return tuple(torch.broadcast_shapes(*[t.shape[:3] for t in self.tensors()], (1, 1, 1)))

    @property
    def is_complex(self) -> bool:
        """Whether A has complex entries."""
        return any(t.is_complex() for t in self.tensors())


def _chain(transition: Transition) -> list[Transition]:
    chain = [transition]
    while type(wider := chain[-1].widen()) is not type(chain[-1]):
        chain.append(wider)
    return chain
