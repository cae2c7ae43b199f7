"""Run a float64 model in float64 all the way: float32 casts inside layers are taken out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SINGLE = (torch.float32, torch.FloatTensor)


class Float64Throughout(TorchFunctionMode):
    """While active, no float64 or integer tensor is cast down to float32.

    Many layers compute their recurrence, softmax or norm in float32 whatever the model's dtype,
    so that a float64 model is good to 1e-7 only. This mode turns `Tensor.float()` and float32 in
    `.to`, `.type` and every `dtype=` keyword into float64 where an operand is float64 (for
    `.float`, `.to` and `.type` also where it is an integer: positions on their way to angles).
    float32, bfloat16 and float16 operands are left alone, and no library is patched.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and _widens(args[0]):
            return args[0].double()
        if func in (Tensor.to, Tensor.type) and _widens(args[0]):
            args = (args[0], *[_double(a) for a in args[1:]])
            kwargs = {name: _double(value) for name, value in kwargs.items()}
        elif kwargs.get("dtype") is torch.float32 and _any_double((args, kwargs)):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def casts_neutralised() -> bool:
    """Whether `Float64Throughout` is active: asked of a cast itself."""
    return torch.zeros((), dtype=torch.float64).float().dtype == torch.float64


def _widens(x: Any) -> bool:
    return isinstance(x, Tensor) and (
        x.dtype == torch.float64 or not (x.is_floating_point() or x.is_complex())
    )


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):  # Tensor.to(other) takes the other's dtype
        return x.double() if x.dtype == torch.float32 else x
    return torch.float64 if x in _SINGLE else x


def _any_double(x: Any) -> bool:
    return any(t.dtype == torch.float64 for t in _tensors(x))


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
