"""S5: one diagonal state space model with many inputs and outputs, from continuous time."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.discretize import discretized
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._heads import check_divides
from dsf.models._hippo import as_parameter, legs_pairs
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float, Inexact

ACTIVATIONS = ("gelu", "half_glu", "full_glu")


def s5_recurrence(
    step_size: Float[Tensor, " state"],
    A: Inexact[Tensor, " state"],
    B: Inexact[Tensor, "_state input"],
    C: Inexact[Tensor, "_output _state"],
    D: Float[Tensor, " _input"] | None = None,
    *,
    rule: str = "zero_order_hold",
    conjugate_pairs: bool = True,
) -> Recurrence:
    """The discretised S5 as one head of `state` complex states, time-invariant.

        A = exp(s a),   B = (exp(s a) - 1)/a B~,   y = 2 Re(C~ h) + D u     (zero-order hold)

    Values (batch, time, 1, input, 1); each state stands for itself and its conjugate, hence the 2
    (1 without conjugate_pairs). `rule` names a rule of `dsf.discretize` (S5 offers zero_order_hold
    and bilinear). Cost O(length x state x (input + output)). Raises DsfShapeError. Source: Smith,
    Warrington and Linderman (2023), arXiv 2208.04933, equations 5 and 6.
    """
    n = A.shape[0]
    if step_size.shape[0] != n or B.shape[0] != n or C.shape[1] != n:
        raise DsfShapeError(
            f"dsf.s5_recurrence: step_size, B, C: expected state={n}, got "
            f"{tuple(step_size.shape)}, {tuple(B.shape)}, {tuple(C.shape)}; state is fixed by A."
        )
    decay, gain = discretized(A[None, None, None], step_size[None, None, None], rule)
    factor = 2 if conjugate_pairs and A.is_complex() else 1
    return Recurrence(
        decay, gain[..., None] * B, (factor * C)[None, None, None],
        None if D is None else torch.diag(D)[None, None, None], real_output=A.is_complex(),
        system="s5",
    )  # fmt: skip


class S5(SequenceMixer):
    """The S5 layer: the system, GELU, and a gate (half_glu: y sigmoid(W gelu(y)), as released).

    n_state counts both members of a pair; n_block blocks of HiPPO-N start the diagonal. The steps
    are log-uniform in [step_min, step_max]. Source: Smith et al. (2023), section 3, appendix G.
    """

    system: ClassVar[str] = "s5"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag exp(Δ a), complex, constant", "B": "(exp(Δ a) − 1)/a · B̃", "C": "2 Re C̃",
        "D": "diag D",
    }  # fmt: skip
    source: ClassVar[str] = "Smith, Warrington and Linderman (2023), arXiv 2208.04933"

    def __init__(
        self,
        width: int,
        *,
        n_state: int = 64,
        n_block: int = 1,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        rule: str = "zero_order_hold",
        activation: str = "half_glu",
    ) -> None:
        super().__init__()
        check_divides("S5", "2 n_block", 2 * n_block, "n_state", n_state)
        if activation not in ACTIVATIONS:
            raise DsfValueError(
                f"dsf.S5: activation: expected one of {list(ACTIVATIONS)}, got {activation!r}."
            )
        self.rule, self.activation = rule, activation
        legs = legs_pairs(n_state // n_block)
        eigenvalues = legs.eigenvalues.repeat(n_block)
        basis = torch.block_diag(*[legs.basis] * n_block)
        self.A_real = nn.Parameter(eigenvalues.real.float())
        self.A_imag = nn.Parameter(eigenvalues.imag.float())
        B = torch.randn(n_state, width, dtype=torch.float64) * width**-0.5
        C = torch.randn(width, n_state, dtype=torch.float64) * n_state**-0.5
        self.B = as_parameter(basis.conj().mT @ B.to(basis.dtype))
        self.C = as_parameter(C.to(basis.dtype) @ basis)
        self.D = nn.Parameter(torch.randn(width))
        low, high = math.log(step_min), math.log(step_max)
        self.log_step = nn.Parameter(torch.rand(n_state // 2) * (high - low) + low)
        self.out1 = nn.Linear(width, width) if activation == "full_glu" else None
        self.out2 = nn.Linear(width, width) if activation != "gelu" else None

    @classmethod
    def small(cls, width: int) -> S5:
        """16 states: 8 pairs."""
        return cls(width, n_state=16)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The same system for every input, driven by the input: (batch, time, 1, width, 1)."""
        system = s5_recurrence(
            self.log_step.exp(), torch.complex(self.A_real, self.A_imag),
            torch.view_as_complex(self.B), torch.view_as_complex(self.C), self.D, rule=self.rule,
        )  # fmt: skip
        return system, x[:, :, None, :, None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """GELU and the gate; y (batch, time, 1, width, 1)."""
        y = y[:, :, 0, :, 0]
        mixed = functional.gelu(y)
        if self.out2 is None:
            return mixed
        gate = torch.sigmoid(self.out2(mixed))
        return gate * (y if self.out1 is None else self.out1(mixed))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is h (batch, 1, pair, 1), complex."""
        system, u = self.recurrence(x_t[:, None])
        y, h = step(system, u[:, 0], state)
        return self.readout(y[:, None], x_t[:, None])[:, 0], h


LAYER = S5
