"""What every system in this folder offers: three faces of one layer that must agree."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.scanning import scan
from dsf.wrappers import System, core, is_cache


class SequenceMixer(nn.Module, abc.ABC):
    """A sequence-mixing layer (batch, time, width) -> (batch, time, width).

    `forward(x)` is the layer as published, `recurrence(x)` the exact system it applies to its
    values, `step` one token in constant memory (causal layers). The contract, tested for every
    system: forward(x) = readout(scan(*recurrence(x)), x) = repeated step = readout(map @ values).
    """

    system: ClassVar[str] = ""
    equations: ClassVar[dict[str, str]] = {}
    """A, B, C, D as text: the row of this system in the table of systems."""
    source: ClassVar[str] = ""
    """Authors, year, equation."""
    normalised_by: ClassVar[str] = "none"
    """What a row of the map is divided by, as text."""
    is_causal: bool = True

    @classmethod
    def small(cls, width: int) -> SequenceMixer:
        """A layer of this width with the defaults of the system, for comparisons and tests."""
        return cls(width)

    @classmethod
    def facts(cls, width: int = 64, length: int = 16) -> dict[str, str]:
        """What the system of a small layer is, for the table of systems.

        structure: of A; states: those of one head x its channels, `length` where a cache grows;
        normaliser; exact: yes, or along the trajectory. From one random input; the state of the
        random generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            system, values = cls.small(width).recurrence(torch.randn(1, length, width))
        r = core(system)
        states = "length" if is_cache(r) else str(r.n_state)
        return {
            "structure": r.structure, "states": f"{states} × {values.shape[-1]}",
            "normaliser": cls.normalised_by,
            "exact": {"exact": "yes"}.get(r.mode, r.mode.removeprefix("exact_").replace("_", " ")),
        }  # fmt: skip

    @abc.abstractmethod
    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system for this input, and the values u it is driven by."""

    @abc.abstractmethod
    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output from the scan's: gates, norms, output projection."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, (batch, time, width)."""
        return self.readout(scan(*self.recurrence(x)), x)

    @abc.abstractmethod
    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token x_t (batch, width) and the state so far (None at the start).

        A layer that looks ahead raises DsfUnsupportedError.
        """
