"""Sequences of different lengths packed along time: their checks, and where their chunks lie.

n sequences in one row of T tokens: sequence s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
Each is cut into chunks of its own, so that no chunk holds tokens of two sequences. How many there
are is known on the device alone; the host counts with T // chunk + n, which is never too few, and
a program whose chunk no sequence owns leaves early or reads and writes nothing outside scratch.
"""

from typing import Any

import torch
from torch import Tensor

from dsf_kernels.launch import check_tensor, start_state

KINDS = (torch.int32, torch.int64)


def check_sequences(
    function: str, cu_seqlens: Any, value: Any, initial: Any, sizes: dict, cut: str = "value"
) -> None:
    """Raise unless cu_seqlens (n + 1,) can cut value (1, time, ...) into n sequences.

    Only shape, dtype and device are looked at. initial: the state before each sequence, or None;
    sizes: its axes after the first, {name: size}; cut: how `value` is called.
    """
    name = f"dsf_kernels.{function}: cu_seqlens"
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{name}: expected axes (sequence + 1,), from 1 entry, got {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.dtype not in KINDS:
        raise TypeError(f"{name}: expected int32 or int64, got {cu_seqlens.dtype}.")
    if cu_seqlens.device not in (torch.device("cpu"), value.device):
        raise ValueError(
            f"{name}: expected {value.device}, the device of {cut}, or cpu, got "
            f"{cu_seqlens.device}."
        )
    if value.shape[0] != 1:
        raise ValueError(
            f"{name}: expected {cut} of batch=1, its sequences packed along time, got "
            f"batch={value.shape[0]}."
        )
    if initial is not None:
        wanted = {"sequence": cu_seqlens.shape[0] - 1, **sizes}
        check_tensor(function, "initial_state", initial, wanted, "sequence is fixed by cu_seqlens")


def placed(function: str, cu_seqlens: Tensor, value: Tensor) -> Tensor:
    """cu_seqlens on the device of `value`; raises ValueError where its values can be seen.

    They are looked at on the CPU alone: to read them from a GPU would make the host wait for it.
    """
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        name, length = f"dsf_kernels.{function}: cu_seqlens", value.shape[1]
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if (first, last) != (0, length):
            raise ValueError(
                f"{name}: expected to start at 0 and end at time={length}, got {first} and {last}."
            )
        falls = (cu_seqlens.diff() < 0).nonzero()
        if falls.numel():
            at = int(falls[0])
            raise ValueError(
                f"{name}: expected entries that do not decrease, got {int(cu_seqlens[at])} and "
                f"then {int(cu_seqlens[at + 1])} at entry {at + 1}."
            )
    return cu_seqlens.to(value.device, non_blocking=True)


def count_rows(value: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states there are a head: rows of the batch, or sequences of a packed one."""
    return value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def results(like: Tensor, cu_seqlens: Tensor | None, shape, dtype=None) -> Tensor:
    """Where results go, of the type of `like`: zeros if tokens may belong to no sequence."""
    new = like.new_empty if cu_seqlens is None else like.new_zeros
    return new(shape, dtype=dtype)


def start_states(
    value: Tensor, n_state: int, initial: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """`start_state` of every row or sequence."""
    if cu_seqlens is not None:
        value = value[:1].expand(count_rows(value, cu_seqlens), -1, -1, -1)
    return start_state(value, n_state, initial)


def starts_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """cu_seqlens as int64, clamped to 0 .. length and made not to decrease."""
    return cu_seqlens.long().clamp(0, length).cummax(0).values


def edges(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens belong to a sequence, which begin one; the last token of every sequence, and
    whether it has one."""
    starts, count = starts_of(cu_seqlens, length), cu_seqlens.shape[0] - 1
    token = torch.arange(length, device=starts.device)
    owner = torch.searchsorted(starts[1:], token, right=True)
    owned = (token >= starts[0]) & (owner < count)
    begins = owned & (token == starts[owner.clamp(max=count - 1)])
    return owned, begins, (starts[1:] - 1).clamp(min=0), starts.diff() > 0


class Sequences:
    """Where the chunks of packed sequences lie; n and T at least 1, nothing read by the host.

    Whatever the values are, no token outside the tensors is touched: starts are clamped to 0 .. T
    and made not to decrease. Tokens before the first and after the last belong to no sequence.
    Chunk arrays hold the chunks of all sequences one after another, `bound` chunks.
    """

    def __init__(self, cu_seqlens: Tensor, length: int, chunk: int):
        self.count, self.length, self.chunk = cu_seqlens.shape[0] - 1, length, chunk
        self.bound = length // chunk + self.count
        self.starts = starts_of(cu_seqlens, length)
        counts = (self.starts.diff() + (chunk - 1)) // chunk
        self.offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.table = torch.stack([self.starts, self.offsets], 1)  # first token, first chunk

    def chunks(self) -> Tensor:
        """First token and number of tokens, 0 where no sequence owns it, of every chunk."""
        own, first, owned = self._chunks()
        tokens = (self.starts[own + 1] - first).clamp(max=self.chunk)
        return torch.stack([first, torch.where(owned, tokens, 0)], 1)

    def _chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence and first token of every chunk, and whether it is owned."""
        owner = self.owner()
        own = owner.clamp(max=self.count - 1)
        chunks = torch.arange(self.bound, device=owner.device)
        first = self.starts[own] + (chunks - self.offsets[own]) * self.chunk
        return own, first, owner < self.count

    def tiles(self) -> Tensor:
        """Of every chunk: sequence, its first token and the one after its last, which of its
        chunks this is, of how many. One that no sequence owns has first = last."""
        own, _, owned = self._chunks()
        start, before = self.starts[own], self.offsets[own]
        stop = torch.where(owned, self.starts[own + 1], start)
        place = torch.arange(self.bound, device=own.device) - before
        return torch.stack([own, start, stop, place, self.offsets[own + 1] - before], 1)

    def owner(self) -> Tensor:
        """The sequence of every chunk, n for those of none: (bound,)."""
        chunks = torch.arange(self.bound, device=self.starts.device)
        return torch.searchsorted(self.offsets[1:], chunks, right=True)

    def spread(self, tensor: Tensor) -> Tensor:
        """(1, time, ...) with every sequence from the edge of a chunk: (1, bound chunks, ...).

        Zero where a chunk goes beyond its sequence.
        """
        own, first, owned = self._chunks()
        token = first[:, None] + torch.arange(self.chunk, device=first.device)
        inside = (token < self.starts[own + 1][:, None]) & owned[:, None]
        return self._taken(tensor, token.flatten(), inside.flatten(), self.length)

    def gather(self, tensor: Tensor) -> Tensor:
        """The way back of `spread`: (1, bound chunks, ...) to (1, time, ...).

        Zero at tokens of no sequence.
        """
        token = torch.arange(self.length, device=self.starts.device)
        owner = torch.searchsorted(self.starts[1:], token, right=True)
        own = owner.clamp(max=self.count - 1)
        within = token - self.starts[own]
        place = self.offsets[own] * self.chunk + within
        inside = (within >= 0) & (owner < self.count)
        return self._taken(tensor, place, inside, self.bound * self.chunk)

    @staticmethod
    def _taken(tensor: Tensor, place: Tensor, inside: Tensor, length: int) -> Tensor:
        found = tensor.index_select(1, place.clamp(0, length - 1))
        inside = inside.view(1, -1, *[1] * (tensor.dim() - 2))
        return torch.where(inside, found, torch.zeros((), dtype=found.dtype, device=found.device))
