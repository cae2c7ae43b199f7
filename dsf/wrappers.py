"""Systems that one causal recurrence cannot say: backwards in time, both ways, gated outputs."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from torch import Tensor

from dsf.errors import DsfShapeError
from dsf.factors import MixingRows, OneHot
from dsf.recurrence import Recurrence
from dsf.shapes import Inexact
from dsf.transitions import Identity
from dsf.transitions._base import register, static


@register
@dataclasses.dataclass(frozen=True)
class Anticausal:
    """A recurrence that runs from the last step to the first, coefficients in natural order.

        h_t = A_t h_{t+1} + B_t u_t,    y_t = C_t h_t + D_t u_t,    h_{L+1} = initial_state

    `strict` leaves the token itself out: y_t = C_t A_t h_{t+1} + D_t u_t, the strict upper
    triangle of a map.
    """

    recurrence: Recurrence
    strict: bool = static(default=False)


@register
@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """The sum of a causal and an anticausal recurrence: mixers that see the future.

    With a strict anticausal part the two share no entry of the map.
    """

    causal: Recurrence
    anticausal: Anticausal

    @classmethod
    def from_rows(cls, recurrence: Recurrence) -> Bidirectional:
        """Both halves of one full map whose rows are C (softmax of an encoder).

        D and the initial state stay with the causal half, so that each counts once.
        """
        later = recurrence.replace(D=None, initial_state=None)
        return cls(recurrence, Anticausal(later, strict=True))

    @property
    def is_one_map(self) -> bool:
        """Whether the halves share their rows, so that one pass over the full map gives both."""
        one, two = self.causal, self.anticausal.recurrence
        caches = self.anticausal.strict and is_cache(one) and is_cache(two)
        return caches and one.C is two.C and bool(one.B == two.B)


@register
@dataclasses.dataclass(frozen=True)
class Gated:
    """y_t = gate_t * (output of `system`), gate (batch, time, head, channel) or with size 1s.

    A factor per channel would take A, B, C apart by channel; the wrapper keeps them shared.
    """

    system: Recurrence | Bidirectional | Anticausal
    gate: Tensor = dataclasses.field(repr=False)


System: TypeAlias = Recurrence | Anticausal | Bidirectional | Gated
"""Anything that `dsf.scan` runs and `dsf.materialise` draws."""


def core(system: System) -> Recurrence:
    """The (causal) recurrence inside, for labels and sizes."""
    if isinstance(system, Gated):
        return core(system.system)
    if isinstance(system, Bidirectional):
        return system.causal
    return system.recurrence if isinstance(system, Anticausal) else system


def is_cache(recurrence: Recurrence) -> bool:
    """Whether the state is a cache of values read by the rows of a map: attention as it is."""
    r = recurrence
    rows, slots = isinstance(r.C, MixingRows), isinstance(r.B, OneHot)
    return rows and slots and isinstance(r.A, Identity)


def recurrences(system: System) -> list[Recurrence]:
    """Every recurrence inside, the causal one first."""
    if isinstance(system, Gated):
        return recurrences(system.system)
    if isinstance(system, Bidirectional):
        return [system.causal, system.anticausal.recurrence]
    return [system.recurrence if isinstance(system, Anticausal) else system]


def gated(gate: Inexact[Tensor, "*shape"], system: System) -> System:
    """A per-token factor on the output: gate (batch, time, head, channel or 1).

    A gate shared by all channels goes into C and D of a recurrence with dense C; any other keeps
    its own wrapper. Raises DsfShapeError on other axes.
    """
    if gate.ndim != 4:
        raise DsfShapeError(
            f"dsf.gated: gate: expected axes (batch, time, head, channel), "
            f"got {tuple(gate.shape)}."
        )
    shared = gate.shape[-1] == 1 and not gate.is_complex()  # Re(g C h) is not g Re(C h)
    if shared and isinstance(system, Recurrence) and isinstance(system.C, Tensor):
        D = None if system.D is None else gate[..., None] * system.D
        return system.replace(C=gate[..., None] * system.C, D=D)
    if isinstance(system, Gated):
        return Gated(system.system, gate * system.gate)
    return Gated(system, gate)


def anticausal(recurrence: Recurrence, *, strict: bool = False) -> Anticausal:
    """The recurrence run backwards; `strict` leaves out the diagonal of its map."""
    return Anticausal(recurrence, strict)


def total_length(system: System, values: Tensor | None = None) -> int:
    """Number of steps, taken from the values when every coefficient is time-invariant.

    Raises DsfShapeError when the parts of the system do not agree.
    """
    lengths = {"recurrence": core(system).length}
    if isinstance(system, Gated):
        lengths["gate"] = system.gate.shape[1]
        system = system.system
    if isinstance(system, Bidirectional):
        lengths["anticausal"] = system.anticausal.recurrence.length
    fixed = {n for n in lengths.values() if n != 1}
    if len(fixed) > 1:
        raise DsfShapeError(
            f"dsf.Recurrence: time: expected one length in all parts, got {lengths}."
        )
    if fixed:
        return fixed.pop()
    return 1 if values is None else int(values.shape[1])
