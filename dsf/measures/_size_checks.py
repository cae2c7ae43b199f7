"""Requests that cannot fit, refused before anything is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, core

_ADVICE = "Measure fewer samples or heads at a time."


def require_states(function: str, system: Any) -> None:
    """Raise DsfMemoryError when the states of one step, in double precision, would not fit."""
    if not isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        return
    r = core(system)
    batch, _, head = r.lead_shape()
    require_memory(
        f"dsf.{function}", "states of one step", ("batch", "head", "state"),
        (batch, head, r.n_state), torch.float64, advice=_ADVICE,
    )  # fmt: skip


def require_copies(function: str, *given: Any) -> None:
    """Raise DsfMemoryError when one copy of the tensors in double precision would not fit.

    Views of few numbers may stand for very many.
    """
    for x in given:
        if isinstance(x, Tensor):
            axes = [f"axis_{i}" for i in range(x.ndim)]
            require_memory(
                f"dsf.{function}", "copy of an argument", axes, x.shape, torch.float64,
                advice=_ADVICE,
            )  # fmt: skip
