"""A recurrence cut into chunks: what each adds to the rows of a map, without the map."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dsf.recurrence import Recurrence
from dsf.scanning import run_one
from dsf.wrappers import Anticausal

_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Steps start..stop-1 of a causal map; row t of it is [read_t X, local_t].

    X are the states that the keys before `start` have left, X_j = A_s ... A_(j+1) B_j, one column
    for each. read (batch, head, step, state); local (batch, head, step, step), zero above the
    diagonal; carry (batch, head, state, state) takes X over the chunk; write (batch, head, state,
    step) are the new columns. Real maps have real parts: a complex state counts as two.
    """

    steps: range
    read: Tensor
    local: Tensor
    carry: Tensor
    write: Tensor


def scannable(system: Any) -> TypeGuard[Recurrence | Anticausal]:
    """Whether a system's rows follow from chunks: one direction, one input, one output."""
    r = system.recurrence if isinstance(system, Anticausal) else system
    if not isinstance(r, Recurrence) or r.n_input != 1 or r.n_output != 1:
        return False
    return isinstance(r.B, Tensor) and isinstance(r.C, Tensor)


def chunks_of(r: Recurrence, length: int, chunk: int | None = None, *, backwards: bool = False
              ) -> Iterator[Chunk]:  # fmt: skip
    """The chunks of a recurrence in double precision, first to last or last to first.

    Each is one scan of state + chunk channels: together O(length x state x (state + chunk)) for a
    diagonal, memory O(chunk x (state + chunk)) a head.
    """
    size = max(_CHUNK, r.n_state) if chunk is None else chunk
    starts = list(range(0, length, size))
    for start in reversed(starts) if backwards else starts:
        yield _chunk(r, range(start, min(start + size, length)))


def causal_form(system: Any) -> tuple[Recurrence, bool, bool]:
    """A causal recurrence, whether it stands for the map in reverse order, and whether strictly.

    Strictly: a row does not see its own key through the state (D it still has).
    """
    if isinstance(system, Anticausal):
        return system.recurrence.flip_time(), True, system.strict
    return system, False, False


def _chunk(r: Recurrence, steps: range) -> Chunk:
    batch, _, head = r.lead_shape()
    n, size = r.n_state, len(steps)
    part = r.time_slice(steps.start, steps.stop).to(torch.float64).replace(real_output=False)
    options: dict[str, Any] = {"dtype": torch.float64, "device": r.device}
    eye = torch.eye(size, **options)
    u = torch.cat([torch.zeros(size, n, **options), eye], 1)[None, :, None, None]
    start = torch.cat([torch.eye(n, **options), torch.zeros(n, size, **options)], 1)
    complex_ = part.dtype.is_complex
    state = (start.to(torch.complex128) if complex_ else start).expand(batch, head, n, n + size)
    with torch.no_grad():
        y, end = run_one(
            part.replace(initial_state=state), u.expand(batch, size, head, 1, n + size), "chunked"
        )
    y = y.squeeze(3).transpose(1, 2)
    read, local, carry, write = y[..., :n], y[..., n:], end[..., :n], end[..., n:]
    if complex_ and r.real_output:  # Re(a b) = (Re a, -Im a) . (Re b, Im b)
        read, local = torch.cat([read.real, -read.imag], -1), local.real
        turned = torch.cat([carry.real, -carry.imag], -1), torch.cat([carry.imag, carry.real], -1)
        carry, write = torch.cat(turned, -2), torch.cat([write.real, write.imag], -2)
    return Chunk(steps, read, local, carry, write)
