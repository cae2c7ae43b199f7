"""Run a model with what depends on its input held constant: scales of norms, gates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_SCALES = frozenset({
    torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.norm, Tensor.norm, torch.std,
    Tensor.std, torch.linalg.norm, torch.linalg.vector_norm,
})  # fmt: skip
"""What a norm divides by."""
_POWERS = frozenset({torch.pow, Tensor.pow, Tensor.__pow__})
_GATES = frozenset({
    torch.sigmoid, Tensor.sigmoid, functional.sigmoid, functional.logsigmoid, functional.softplus,
    torch.softmax, Tensor.softmax, functional.softmax, torch.exp, Tensor.exp,
})  # fmt: skip
_ACTIVATIONS = frozenset({
    functional.silu, functional.gelu, functional.relu, torch.relu, Tensor.relu, torch.tanh,
    Tensor.tanh, functional.tanh, functional.leaky_relu, functional.mish, functional.hardswish,
})  # fmt: skip
_PRODUCTS = frozenset({
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
    torch.div, Tensor.div, Tensor.__truediv__,
})  # fmt: skip


class Frozen(TorchFunctionMode):
    """While active, derivatives treat norms, and gates if asked for, as constant factors.

        layer norm:  (x - mean x) * [1 / sqrt(var x + eps)] * weight + bias
        RMS norm:    x * [1 / sqrt(mean x^2 + eps)] * weight
        activation:  x * [f(x) / x]                               (with `gates`)
        gate:        [sigmoid(x)], [softmax(x)], [exp(x)], ...    (with `gates`)
        product:     [x] * y   of two factors on the graph        (with `left_gates`)
        product:     v * [x]   of v made of `follow`'s values     (inside `follow`)

    Brackets are constants for autograd; no value changes but for rounding. So a layer of norms,
    gates and projections becomes linear in its input and its biases together, and is equal to
    its own derivative applied to both: the test that what was frozen was enough. At x = 0 the
    factor of an activation is its right derivative. No library is patched.
    """

    def __init__(self, *, gates: bool, left_gates: bool = False) -> None:
        super().__init__()
        self.gates, self.left_gates = gates, left_gates
        self._made: dict[int, Tensor] | None = None
        """By its id, what is made of followed values; kept, so that an id stays its own."""

    @contextlib.contextmanager
    def follow(self, values: Tensor) -> Iterator[None]:
        """Inside, what multiplies something made of `values` is a constant; what is added is not.

        So a layer's readout of its scan is linear in the scan and in a residual at once.
        """
        before, self._made = self._made, {id(values): values}
        try:
            yield
        finally:
            self._made = before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) == 2:
            args = self._factors(*args)
        result = self._run(func, args, kwargs)
        if self._made is not None and any(
            id(x) in self._made for x in pytree.tree_leaves((args, kwargs))
        ):
            new = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            self._made.update({id(x): x for x in new})
        return result

    def _factors(self, left: Any, right: Any) -> tuple[Any, Any]:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return left, right
        if self._made is not None and (id(left) in self._made) != (id(right) in self._made):
            return (left, right.detach()) if id(left) in self._made else (left.detach(), right)
        if self.left_gates and left.requires_grad and right.requires_grad:
            return left.detach(), right
        return left, right

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func in (functional.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **kwargs)
        if func is functional.normalize:
            return _secant(func, *args, **kwargs)
        if func in _SCALES or (func in _POWERS and _is_root(args, kwargs)):
            return _constant(func(*args, **kwargs))
        if self.gates and func in _GATES:
            return _constant(func(*args, **kwargs))
        if self.gates and func in _ACTIVATIONS:
            return _secant(func, *args, **kwargs)
        return func(*args, **kwargs)


def _constant(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def _is_root(args: tuple, kwargs: dict[str, Any]) -> bool:
    exponent = kwargs.get("exponent", args[1] if len(args) > 1 else None)
    return isinstance(exponent, float) and abs(exponent) == 0.5


def _secant(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """f(x) as x times the constant f(x) / x."""
    small = torch.finfo(x.dtype).tiny ** 0.5
    point = x.detach().masked_fill(x.detach() == 0, small)
    return x * (func(point, *args, **kwargs) / point)


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt(centred.detach().square().mean(axes, keepdim=True) + eps)
    y = centred * scale if weight is None else centred * scale * weight
    return y if bias is None else y + bias


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.detach().square().mean(axes, keepdim=True) + eps)
    return x * scale if weight is None else x * scale * weight
