"""S4: a time-invariant diagonal-plus-low-rank state space model per channel, bilinear."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.discretize import bilinear
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._hippo import as_parameter, legs_pairs, with_conjugates
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float, Inexact
from dsf.transitions import DiagonalLowRank
from dsf.transitions._base import mm


def s4_recurrence(
    step_size: Float[Tensor, " channel"],
    A: Inexact[Tensor, "_channel _pair"],
    P: Inexact[Tensor, "rank _channel _pair"],
    B: Inexact[Tensor, "_channel _pair"],
    C: Inexact[Tensor, "_channel _pair"],
    D: Float[Tensor, " channel"] | None = None,
    *,
    Q: Inexact[Tensor, "rank _channel _pair"] | None = None,
) -> Recurrence:
    """The bilinear discretisation of F = diag(A) - P Q^* (Q = P if None), every channel a head.

        A_t = (I - s/2 F)^-1 (I + s/2 F),   B_t = s (I - s/2 F)^-1 B,   y_t = 2 Re(c h_t) + D u_t

    The state holds both members of every conjugate pair (2 pair states), since P Q^* couples
    them; C is that of the pairs. By Woodbury's identity A_t is again diagonal minus rank `rank`:
    with M = I - s/2 diag(A) and K = I + s/2 Q^* M^-1 P

        A_t = diag((1 + s a/2)/(1 - s a/2)) - (s M^-1 P K^-1)(Q^* M^-1)

    so nothing dense is formed. Values (batch, time, channel, 1); time-invariant:
    `dsf.materialise` takes length=. Raises DsfShapeError. Source: Gu, Goel and Re (2022), S4,
    equation 3 and theorem 2.
    """
    if not (A.shape == B.shape == C.shape == P.shape[1:] and A.shape[0] == step_size.shape[0]):
        raise DsfShapeError(
            f"dsf.s4_recurrence: A, P, B, C: expected axes (channel={step_size.shape[0]}, pair), "
            f"P with a leading rank, got {[tuple(x.shape) for x in (A, P, B, C)]}; channel is "
            f"fixed by step_size."
        )
    s = step_size[:, None].to(A.real.dtype)
    a, b, c = (with_conjugates(x) for x in (A, B, C))
    p = with_conjugates(P).permute(1, 2, 0)  # channel state rank
    q = p if Q is None else with_conjugates(Q).permute(1, 2, 0)
    decay, gain = bilinear(a[None, None], s[None, None])
    gain = gain[0, 0]  # s M^-1
    inner = torch.eye(p.shape[-1], dtype=a.dtype, device=a.device)
    inner = inner + 0.5 * mm(q.conj().mT, gain[..., None] * p)
    left = torch.linalg.solve(inner.mT, (gain[..., None] * p).mT).mT
    right = (gain / s)[..., None] * q.conj()
    B_t = gain * b
    B_t = B_t - 0.5 * s * mm(left, mm(right.mT, b[..., None])).squeeze(-1)
    return Recurrence(
        DiagonalLowRank(
            decay.log_decay, decay.sign, decay.phase, left=left[None, None],
            right=right[None, None],
        ), B_t[None, None, ..., None], c[None, None, :, None, :],
        None if D is None else D[None, None, :, None, None], real_output=True, system="s4",
        gauge="both members of every pair",
    )  # fmt: skip


def s4_kernel(recurrence: Recurrence, length: int) -> Float[Tensor, "channel length"]:
    """The convolution kernel Re(C A^l B), l = 0..length-1, by applying A again and again.

    For any time-invariant system of one input and output with dense B and C. Cost
    O(length x channel x state x rank).
    """
    r = recurrence
    if r.length != 1 or not isinstance(r.B, Tensor) or not isinstance(r.C, Tensor):
        raise DsfValueError(
            f"dsf.s4_kernel: recurrence: expected a time-invariant system, got length {r.length}."
        )
    A, h, c = r.A.at(0), r.B[:, 0], r.C[:, 0]
    taps = []
    for _ in range(length):
        taps.append(mm(c, h)[0, :, 0, 0])
        h = A.apply(h)
    kernel = torch.stack(taps, -1) if taps else mm(c, h)[0, :, 0, :0]
    return kernel.real if kernel.is_complex() else kernel


def s4_untruncated_output(
    system: Recurrence, stored: Inexact[Tensor, "channel _pair"], length: int
) -> Inexact[Tensor, "channel _pair"]:
    """C from the release's stored one, C~ = (I - A^length)^T C, which makes its kernel finite.

    `system` is that of the same A (its C is not used). The release multiplies on its first
    forward pass, with the length it was built for.
    """
    power = torch.linalg.matrix_power(system.dense_transition()[0, 0], length)
    eye = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
    full = with_conjugates(stored).to(power.dtype)
    return torch.linalg.solve((eye - power).mT, full[..., None])[..., : stored.shape[1], 0]


class S4Kernel(nn.Module):
    """The continuous system's parameters, started at HiPPO-LegS; A = -exp(A_real) - i A_imag."""

    def __init__(self, width: int, n_state: int, step_min: float, step_max: float) -> None:
        super().__init__()
        legs = legs_pairs(n_state)
        pairs = n_state // 2
        low, high = math.log(step_min), math.log(step_max)
        self.inv_dt = nn.Parameter(torch.rand(width, 1) * (high - low) + low)
        self.A_real = nn.Parameter(torch.log(-legs.eigenvalues.real).float().repeat(width, 1))
        self.A_imag = nn.Parameter(legs.eigenvalues.imag.float().repeat(width, 1))
        self.P = as_parameter(legs.low_rank.conj().repeat(1, width, 1))
        self.B = as_parameter(legs.input.conj().repeat(1, width, 1))
        self.C = as_parameter(torch.randn(1, width, pairs, dtype=torch.cfloat))

    def forward(self, D: Tensor | None = None) -> Recurrence:
        """The discrete system with skip D (channel,). C is taken as it is, not as truncated."""
        A = torch.complex(-self.A_real.exp(), -self.A_imag)
        P, B, C = (torch.view_as_complex(x) for x in (self.P, self.B, self.C))
        return s4_recurrence(self.inv_dt.exp()[:, 0], A, P, B[0], C[0], D)


class S4(SequenceMixer):
    """The S4 layer: the system, skip, GELU, a gated linear mix of channels.

    n_state counts both members of a pair. The kernel's parameter names are those of the release.
    Cost O(length x width x state), state width x state complex. Source: Gu, Goel and Re (2022).
    """

    system: ClassVar[str] = "s4"
    equations: ClassVar[dict[str, str]] = {
        "A": "(I − Δ/2 F)⁻¹(I + Δ/2 F), F = Λ − P P*, constant", "B": "(I − Δ/2 F)⁻¹ Δ b",
        "C": "2 Re cᵀ", "D": "D",
    }  # fmt: skip
    source: ClassVar[str] = "Gu, Goel and Re (2022), arXiv 2111.00396, equation 3"

    def __init__(
        self, width: int, *, n_state: int = 64, step_min: float = 1e-3, step_max: float = 0.1
    ) -> None:
        super().__init__()
        if n_state % 2:
            raise DsfValueError(f"dsf.S4: n_state: expected an even number, got {n_state}.")
        self.kernel = S4Kernel(width, n_state, step_min, step_max)
        self.D = nn.Parameter(torch.randn(width))
        self.output_linear = nn.Linear(width, 2 * width)

    @classmethod
    def small(cls, width: int) -> S4:
        """8 states: 4 pairs."""
        return cls(width, n_state=8)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The same system for every input, driven by the input itself."""
        return self.kernel(self.D), x[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """GLU(W GELU(y)); y (batch, time, channel, 1)."""
        return functional.glu(self.output_linear(functional.gelu(y[..., 0])), dim=-1)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is h (batch, channel, 2 pair, 1), complex."""
        y, h = step(self.kernel(self.D), x_t[..., None], state)
        return self.readout(y, x_t), h


LAYER = S4
