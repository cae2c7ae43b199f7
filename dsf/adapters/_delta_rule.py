"""Gated delta rules as their functions take them: queries and keys not yet of length one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import ScanFunction, refuse_packed
from dsf.recurrence import Recurrence

NORM_EPS = 1e-6
"""Added to the sum of squares, inside the root, where the function makes unit queries and keys."""


class DeltaRuleFunction(ScanFunction):
    """Base: a function of q, k, v, log decay `g` and write strength `beta`, batch and time first.

        q, k -> x / sqrt(sum x^2 + 1e-6) if asked for;   scale = state^(-1/2) unless given

    Both kinds compute in float32 at least, and so is the recurrence of a 16-bit layer.
    """

    system: ClassVar[str] = ""
    parameters: ClassVar[dict[str, Any]] = {
        "q": None, "k": None, "v": None, "g": None, "beta": None, "scale": None,
        "initial_state": None, "use_qk_l2norm_in_kernel": False, "cu_seqlens": None,
    }  # fmt: skip

    states = frozenset({"initial_state"})

    @abc.abstractmethod
    def recurrence(self, query: Tensor, key: Tensor, given: dict[str, Any]) -> Recurrence:
        """From queries and keys as the rule uses them, and the other arguments."""

    def build(self, visit: Visit) -> list[Built]:
        """From the tensors that enter the function; values (batch, time, head, channel)."""
        a = self.arguments(visit)
        refuse_packed(visit, a)
        values = a["v"]
        dtype = torch.promote_types(values.dtype, torch.float32)
        a = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in a.items()}
        query, key, values = a["q"], a["k"], a["v"]
        if a["use_qk_l2norm_in_kernel"]:
            query, key = unit(query), unit(key)
        heads = values.shape[2]
        if query.shape[2] != heads:
            query = query.repeat_interleave(heads // query.shape[2], 2)
        return [Built(
            self.system, self.recurrence(query, key, a), values,
            self.readout(visit, returning_a_state(visit)), first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=lambda y: y,
        )]  # fmt: skip


def unit(x: Tensor) -> Tensor:
    """Length one along the last axis, up to the epsilon of the released functions."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def returning_a_state(visit: Visit) -> Callable[..., tuple[Tensor, None]]:
    """What a function that gives (output, final state) returns for a given y."""
    dtype = first_tensor(visit.taps[0].result).dtype

    def result(y: Tensor, *_: Any) -> tuple[Tensor, None]:
        return y.to(dtype), None

    return result
