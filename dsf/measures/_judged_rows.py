"""What the verdicts on a system's rows share: which keys, which positions, divided or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.factors import MixingRows
from dsf.measures._state_queries import division, reach_at, real_map
from dsf.mixing_rows import Part
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core, recurrences

Division = list[list[bool | None]]
"""For each batch and head, whether rows are divided by their sum; None: it cannot be seen."""


def check_system(function: str, system: System) -> None:
    """DsfTypeError for anything but a system, DsfUnsupportedError for several outputs."""
    if not isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        raise DsfTypeError(
            f"{function}: system: expected a dsf system, got {type(system)}; a bare map does not "
            f"say how its rows depend on the query."
        )
    if core(system).n_output > 1:
        raise DsfUnsupportedError(
            f"{function}: system: expected one output, got {core(system).n_output}; select one "
            f"row of C first."
        )


def positions_of(function: str, positions: Sequence[int] | str | None, length: int) -> list[int]:
    """Query positions as 0..length-1: the last for None, each for "all". Raises DsfValueError."""
    if positions is None:
        return [length - 1]
    if isinstance(positions, str):
        if positions != "all":
            raise DsfValueError(
                f"{function}: positions: expected integers, 'all' or None, got {positions!r}."
            )
        return list(range(length))
    if any(not -length <= t < length for t in positions):
        raise DsfValueError(
            f"{function}: positions: expected within -{length}..{length - 1}, got "
            f"{list(positions)}."
        )
    return [int(t) % length for t in positions]


def part_of(system: System) -> Part:
    """The half of its rows that a system without a gate uses."""
    if isinstance(system, Anticausal):
        return "strict" if system.strict else "anticausal"
    return "causal" if isinstance(system, Recurrence) else "full"


def one_rows(system: System) -> bool:
    """Whether a system's map is one set of rows, not two halves of different ones."""
    if not isinstance(system, Bidirectional):
        return True
    halves = [pytree.tree_flatten(r.C) for r in recurrences(system)]
    (one, spec), (two, other) = halves
    return spec == other and all(map(torch.equal, one, two))


def division_of(system: System, given: bool | None) -> Division:
    """Whether rows are divided by their sum, as given or as the rows show."""
    system = system.system if isinstance(system, Gated) else system
    r = core(system)
    batch, length, head = r.lead_shape()
    if given is not None or isinstance(r.C, MixingRows):
        return [[given] * head] * batch
    most = 0 if isinstance(system, Anticausal) else length - 1
    return division(system, real_map(r, *reach_at(system, most))[0])
