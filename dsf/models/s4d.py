"""S4D: a time-invariant diagonal state space model per channel, in complex conjugate pairs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.discretize import discretized
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float, Inexact
from dsf.transitions import Diagonal


def s4d_recurrence(
    step_size: Float[Tensor, " channel"],
    A: Inexact[Tensor, "_channel _state"],
    C: Inexact[Tensor, "_channel _state"],
    D: Float[Tensor, " channel"] | None = None,
    *,
    B: Inexact[Tensor, "channel state"] | None = None,
    rule: str = "zero_order_hold",
    initial_state: Inexact[Tensor, "batch channel state"] | None = None,
) -> Recurrence:
    """The discretised S4D as a time-invariant system: every channel a head of N complex states.

        A = exp(s A_c),   B = s phi_1(s A_c) b,   y_t = 2 Re(c h_t) + D u_t   (zero-order hold)

    Values (batch, time, channel, 1). Each state stands for itself and its conjugate, hence the 2
    (with real A, y_t = c h_t + D u_t); b is 1 if None. `rule` names a rule of `dsf.discretize`.
    Time axis 1: `dsf.materialise` takes length=. Source: Gu et al. (2022), arXiv 2206.11893,
    equations 2 and 3.
    """
    if A.shape != C.shape or A.shape[0] != step_size.shape[0]:
        raise DsfShapeError(
            f"dsf.s4d_recurrence: A, C: expected axes (channel={step_size.shape[0]}, state), got "
            f"{tuple(A.shape)} and {tuple(C.shape)}; channel is fixed by step_size."
        )
    decay, gain = discretized(A[None, None], step_size[None, None, :, None], rule)
    gain = gain.expand(1, 1, *A.shape)
    gain = gain if B is None else gain * B
    return Recurrence(
        decay, gain[..., None], ((2 * C) if A.is_complex() else C)[None, None, :, None, :],
        None if D is None else D[None, None, :, None, None],
        None if initial_state is None else initial_state[..., None],
        real_output=A.is_complex(), system="s4d",
    )  # fmt: skip


def s4d_kernel(recurrence: Recurrence, length: int) -> Tensor:
    """The convolution kernel K_l = C A^l B, (channel, length), without D and any scan.

    For any time-invariant diagonal system of one input and output; l = 0..length-1. The powers
    come from the logs, so they do not accumulate errors. Cost and memory O(channel x state x
    length). Raises DsfValueError for another system.
    """
    r = recurrence
    if not isinstance(r.A, Diagonal) or r.length != 1 or (r.n_input, r.n_output) != (1, 1):
        raise DsfValueError(
            f"dsf.s4d_kernel: recurrence: expected a time-invariant diagonal system of one input "
            f"and output, got structure {r.structure!r}, length {r.length}."
        )
    lags = torch.arange(length, device=r.device, dtype=r.A.log_decay.dtype)

    def power(x: Tensor) -> Tensor:
        return x[0, 0, ..., None] * lags

    # 0 * -inf is NaN: a zero decay to the power 0 is 1
    modulus = torch.exp(power(r.A.log_decay).masked_fill(lags == 0, 0.0))
    if r.A.sign is not None:
        odd = (lags % 2 == 1) & (r.A.sign[0, 0, ..., None] < 0)
        modulus = torch.where(odd, -modulus, modulus)
    powers = modulus
    if r.A.phase is not None:
        angle = power(r.A.phase)
        powers = modulus * torch.polar(torch.ones_like(angle), angle)
    weights = r.C[0, 0, :, 0] * r.B[0, 0, ..., 0]  # type: ignore[index]
    kernel = (weights[..., None] * powers).sum(1)
    return kernel.real if r.real_output and kernel.is_complex() else kernel


class S4dKernel(nn.Module):
    """The parameters of the continuous system: A = -exp(log_A_real) + i A_imag, steps and C.

    S4D-Lin: real part -1/2, imaginary part pi n, the limit of HiPPO-LegS; steps log-uniform.
    """

    def __init__(self, width: int, n_state: int, step_min: float, step_max: float) -> None:
        super().__init__()
        pairs = n_state // 2
        low, high = math.log(step_min), math.log(step_max)
        self.log_dt = nn.Parameter(torch.rand(width) * (high - low) + low)
        self.C = nn.Parameter(torch.view_as_real(torch.randn(width, pairs, dtype=torch.cfloat)))
        self.log_A_real = nn.Parameter(torch.full((width, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(float(pairs)).repeat(width, 1))

    def forward(self, D: Tensor) -> Recurrence:
        """The discrete system with skip D (channel,)."""
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        return s4d_recurrence(self.log_dt.exp(), A, torch.view_as_complex(self.C), D)


class S4d(SequenceMixer):
    """The S4D layer: convolution with the kernel, skip, GELU, a gated linear mix of channels.

    n_state counts both members of a conjugate pair. Parameter names are those of the released
    layer. Source: Gu et al. (2022), arXiv 2206.11893.
    """

    system: ClassVar[str] = "s4d"
    equations: ClassVar[dict[str, str]] = {
        "A": "exp(Δ a), complex, constant", "B": "(exp(Δ a) − 1)/a", "C": "2 Re cᵀ", "D": "D",
    }  # fmt: skip
    source: ClassVar[str] = "Gu, Gupta, Goel and Ré (2022), arXiv 2206.11893"

    def __init__(
        self, width: int, *, n_state: int = 64, step_min: float = 1e-3, step_max: float = 0.1
    ) -> None:
        super().__init__()
        self.kernel = S4dKernel(width, n_state, step_min, step_max)
        self.D = nn.Parameter(torch.randn(width))
        self.output_linear = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=-2))

    @classmethod
    def small(cls, width: int) -> S4d:
        """16 states: 8 conjugate pairs."""
        return cls(width, n_state=16)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The same system for every input, driven by the input itself."""
        return self.kernel(self.D), x[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """GLU(W GELU(y)); y (batch, time, channel, 1)."""
        mixed = functional.gelu(y[..., 0])
        linear = self.output_linear[0]
        return functional.glu(functional.linear(mixed, linear.weight[..., 0], linear.bias), dim=-1)  # type: ignore[arg-type]

    def convolve(self, x: Tensor) -> Tensor:
        """`forward` by one long convolution (FFT), as it is trained, in O(length log length).

        The same up to round-off, which here depends on the whole sequence, the future included.
        """
        system, length = self.kernel(self.D), x.shape[1]
        if length == 0:
            return self.forward(x)
        spectrum = torch.fft.rfft(s4d_kernel(system, length), n=2 * length)
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * length) * spectrum, n=2 * length)
        y = y[..., :length].mT + self.D * x
        return self.readout(y[..., None], x)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is h (batch, channel, pair, 1), complex."""
        y, h = step(self.kernel(self.D), x_t[..., None], state)
        return self.readout(y, x_t), h


LAYER = S4d
