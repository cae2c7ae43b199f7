"""LRU: a time-invariant diagonal complex system with many inputs and outputs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError
from dsf.models._hippo import as_parameter
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float, Inexact
from dsf.transitions import Diagonal


def lru_recurrence(
    nu_log: Float[Tensor, " state"],
    theta_log: Float[Tensor, " state"],
    gamma_log: Float[Tensor, " state"],
    B: Inexact[Tensor, "_state input"],
    C: Inexact[Tensor, "_output _state"],
    D: Float[Tensor, " _input"] | None = None,
) -> Recurrence:
    """The linear recurrent unit as one head of `state` complex states, time-invariant.

        A = diag(exp(-exp(nu) + i exp(theta))),  B = diag(exp(gamma)) B~,  y = Re(C h) + D u

    Values (batch, time, 1, input, 1). |A| = exp(-exp(nu)) is below 1 for every parameter. Cost
    O(length x state x (input + output)). Raises DsfShapeError. Source: Orvieto et al. (2023),
    arXiv 2303.06349, section 3 and appendix A.
    """
    n = nu_log.shape[0]
    if B.shape[0] != n or C.shape[1] != n:
        raise DsfShapeError(
            f"dsf.lru_recurrence: B, C: expected axes (state={n}, input) and (output, state={n}), "
            f"got {tuple(B.shape)} and {tuple(C.shape)}; state is fixed by nu_log."
        )
    A = Diagonal(
        -torch.exp(nu_log)[None, None, None], phase=torch.exp(theta_log)[None, None, None]
    )
    return Recurrence(
        A, (torch.exp(gamma_log)[:, None] * B)[None, None, None], C[None, None, None],
        None if D is None else torch.diag(D)[None, None, None], real_output=True, system="lru",
    )  # fmt: skip


class Lru(SequenceMixer):
    """The LRU layer, y = Re(C h) + D x: no gate, no nonlinearity (its block adds them).

    Eigenvalues start uniform on the ring r_min <= |A| <= r_max, phases below max_phase; gamma
    starts at sqrt(1 - |A|^2), which keeps the state's variance. Source: Orvieto et al. (2023).
    """

    system: ClassVar[str] = "lru"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag exp(−e^ν + i e^θ), constant", "B": "diag(γ) B̃", "C": "Re C", "D": "diag D",
    }  # fmt: skip
    source: ClassVar[str] = "Orvieto et al. (2023), arXiv 2303.06349"

    def __init__(
        self,
        width: int,
        *,
        n_state: int = 64,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        squared = (torch.rand(n_state) * (r_max**2 - r_min**2) + r_min**2).clamp(1e-8, 1 - 1e-7)
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(squared)))
        phase = (max_phase * torch.rand(n_state)).clamp(min=1e-6)
        self.theta_log = nn.Parameter(torch.log(phase))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-squared))
        complex_normal = torch.randn(n_state, width, dtype=torch.cfloat)
        self.B = as_parameter(complex_normal * width**-0.5)
        self.C = as_parameter(torch.randn(width, n_state, dtype=torch.cfloat) * n_state**-0.5)
        self.D = nn.Parameter(torch.randn(width))

    @classmethod
    def small(cls, width: int) -> Lru:
        """16 states."""
        return cls(width, n_state=16)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The same system for every input, driven by the input: (batch, time, 1, width, 1)."""
        system = lru_recurrence(
            self.nu_log, self.theta_log, self.gamma_log, torch.view_as_complex(self.B),
            torch.view_as_complex(self.C), self.D,
        )  # fmt: skip
        return system, x[:, :, None, :, None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """The outputs themselves."""
        return y[:, :, 0, :, 0]

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is h (batch, 1, state, 1), complex."""
        system, u = self.recurrence(x_t[:, None])
        y, h = step(system, u[:, 0], state)
        return y[:, 0, :, 0], h


LAYER = Lru
