"""The derivative of a recorded computation as a linear map: forwards, backwards, row by row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dsf.errors import DsfValueError

_ROW_ENTRIES = 2**22
"""How many entries of rows are held at once on their way backwards."""


@dataclasses.dataclass(frozen=True)
class Derivative:
    """d output / d inputs at one point, kept as the autograd graph that made `output`.

    `inputs` are leaves of the graph. Nothing of size output x input is stored: a product costs
    one or two backward passes.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor

    def transposed(self, direction: Tensor) -> tuple[Tensor, ...]:
        """`direction`, shaped as the output, times the derivative: one tensor for each input."""
        if not self.output.requires_grad:
            return tuple(torch.zeros_like(x) for x in self.inputs)
        return torch.autograd.grad(
            self.output, self.inputs, direction, retain_graph=True, materialize_grads=True
        )

    def apply(self, *directions: Tensor) -> Tensor:
        """The derivative times one direction for each input: what the transpose is dual to."""
        if not self.output.requires_grad:
            return torch.zeros_like(self.output)
        probe = torch.zeros_like(self.output, requires_grad=True)
        rows = torch.autograd.grad(
            self.output, self.inputs, probe, create_graph=True, materialize_grads=True
        )
        pairs = zip(rows, directions, strict=True)
        total = sum((row * d).sum() for row, d in pairs if row.requires_grad)
        if not isinstance(total, Tensor):
            return torch.zeros_like(self.output)
        (found,) = torch.autograd.grad(total, probe, materialize_grads=True)
        return found

    def rows(self, seeds: Callable[[range], Tensor], count: int) -> Iterator[tuple[range, Tensor]]:
        """`count` rows, some at a time: (which, seeds(which) times the derivative).

        `seeds(which)` is (row, *output); the first input alone is meant.
        """
        size = max(self.output.numel(), self.inputs[0].numel(), 1)
        step = max(1, _ROW_ENTRIES // size)
        for start in range(0, count, step):
            which = range(start, min(start + step, count))
            yield which, self._batch(seeds(which))

    def _batch(self, seeds: Tensor) -> Tensor:
        if not self.output.requires_grad:
            return seeds.new_zeros(len(seeds), *self.inputs[0].shape)
        (found,) = torch.autograd.grad(
            self.output, self.inputs[:1], seeds, retain_graph=True, is_grads_batched=True,
            materialize_grads=True,
        )  # fmt: skip
        return found


def require_finite(function: str, name: str, x: Tensor) -> None:
    """Refuse NaN and infinity: 0 times them is NaN, so a product would have it for every token."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise DsfValueError(
            f"{function}: {name}: expected finite numbers, got {bad} NaN or infinite of "
            f"{x.numel()}, which would spread over all tokens, those before them too. Put zeros "
            f"in their place, or leave those tokens out of the traced batch."
        )


@contextlib.contextmanager
def parameters_constant(model: nn.Module, *, but_biases: bool = False) -> Iterator[list[Tensor]]:
    """No parameter of a model is on new graphs for a while, or its biases alone: those it gives.

    Inside, graphs are recorded.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    named = model.named_parameters() if but_biases else []
    biases: list[Tensor] = [p for name, p in named if "bias" in name.rsplit(".", 1)[-1]]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for bias in biases:
            bias.requires_grad_(True)
        with torch.enable_grad():
            yield biases
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
