"""Several calls of the attention function by one layer: further maps, or further sequences."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsf.adapters._contract import TappedCall, Visit, first_tensor
from dsf.errors import DsfUnsupportedError
from dsf.memory import require_memory

_OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Arguments that turn a layer's attention into one over another sequence."""


class Calls(NamedTuple):
    """The calls of one visit as one: how large each one's part is, along time or along heads.

    Layers such as DiffLlama's attend several times to the same tokens: the maps are further
    heads. Vision layers attend to the images of a batch, which lie end to end, one by one: there
    the parts are stretches of time, and no token reads one of another stretch.
    """

    visit: Visit
    sizes: list[int]
    along_time: bool

    @classmethod
    def of(cls, visit: Visit) -> Calls:
        """Told apart by their lengths; calls that are neither are refused."""
        shapes = [[x.shape for x in call.args[:3]] for call in visit.taps]
        lengths = [shape[0][2] for shape in shapes]
        along_time = len(lengths) > 1 and sum(lengths) == first_tensor(visit.output).shape[-2]
        first, *others = visit.taps
        alike = all(_same(first, call) for call in others)
        if along_time:
            alike &= all(mask_of(call) is None for call in visit.taps)
            alike &= all(q[2] == k[2] for q, k, _ in shapes)
        else:
            alike &= all(shape == shapes[0] for shape in shapes)
        if not alike:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of the attention function or calls "
                f"alike, got {len(visit.taps)} that differ in shape, mask or options. Write an "
                f"adapter for this layer."
            )
        return cls(visit, lengths if along_time else [s[0][1] for s in shapes], along_time)

    def tensors(self) -> list[Tensor]:
        """Query, key, value (batch, time, head, width)."""
        axis = 2 if self.along_time else 1
        parts = zip(*(call.args[:3] for call in self.visit.taps), strict=True)
        return [_joined(part, axis).transpose(1, 2) for part in parts]

    def results(self) -> Tensor:
        """What the calls returned, (batch, time, head, channel)."""
        found = [first_tensor(call.result) for call in self.visit.taps]
        return _joined(found, 1 if self.along_time else 2)

    def split(self, y: Tensor) -> Iterator[Tensor]:
        """y call by call, contiguous as the layer's own, which may be viewed in another shape."""
        parts = y.split(self.sizes, 1 if self.along_time else 2)
        return (part.contiguous() for part in parts)

    def mask(self) -> Tensor | None:
        """That of every call; of stretches, which token is in whose: (1, 1, time, time)."""
        if not self.along_time:
            return mask_of(self.visit.taps[0])
        device = self.visit.taps[0].args[0].device
        number = torch.repeat_interleave(
            torch.arange(len(self.sizes), device=device), torch.tensor(self.sizes, device=device)
        )
        require_memory(
            "dsf.trace", "mask", ("query", "key"), (len(number), len(number)), torch.float32,
            device=device, advice="Trace fewer images at a time.",
        )  # fmt: skip
        return (number[:, None] == number)[None, None]


def mask_of(call: TappedCall) -> Any:
    """Positional, or by name."""
    return call.args[3] if len(call.args) > 3 else call.kwargs.get("attention_mask")


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _same(one: TappedCall, two: TappedCall) -> bool:
    """Whether two calls have the same mask and options."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and a == b

    rest = zip(one.args[3:], two.args[3:], strict=False)
    return all(alike(a, b) for a, b in rest) and all(
        alike(one.kwargs.get(n), two.kwargs.get(n)) for n in {*one.kwargs, *two.kwargs}
    )


def reads_another_sequence(visit: Visit) -> bool:
    """Whether the layer was given another sequence for its keys."""
    parameters = list(inspect.signature(visit.module.forward).parameters)
    given = {**dict(zip(parameters, visit.args, strict=False)), **visit.kwargs}
    return any(given.get(name) is not None for name in _OTHER_SEQUENCE)
