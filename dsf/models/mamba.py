"""Mamba: the selective state space model S6, and the whole block around it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.algebra import gated, series
from dsf.discretize import exponential_euler
from dsf.errors import DsfShapeError, DsfTypeError
from dsf.models._mixer import SequenceMixer
from dsf.models._step_size import initial_step_bias, step_sizes
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float, Inexact
from dsf.short_convolution import (
    short_convolution,
    short_convolution_recurrence,
    short_convolution_step,
    with_constant,
)


def mamba_recurrence(
    step_size: Float[Tensor, "batch time channel"],
    A: Inexact[Tensor, "_channel state"],
    B: Inexact[Tensor, "*_axes"],
    C: Inexact[Tensor, "*_axes"],
    D: Float[Tensor, " channel"] | None = None,
    *,
    step_bias: Float[Tensor, " channel"] | None = None,
    softplus: bool = False,
    initial_state: Inexact[Tensor, "batch channel state"] | None = None,
) -> Recurrence:
    """The S6 core as a system: every channel a head of N states with one value channel.

        A_t = exp(s_t A),  B_t = s_t b_t,  C_t = c_t,  D;  s_t = softplus(step_size + step_bias)

    The values are the channels after the convolution, (batch, time, channel, 1). A (channel,
    state), negative (real part) for decay. B and C: (batch, time, state); (batch, time, group,
    state), group g serving channels g*channel/group onwards; or (channel, state), constant. With
    complex A the states stand for conjugate pairs, y_t = 2 Re(c_t h_t) + D u_t, c not conjugated.
    Without `softplus`, step_size + step_bias is the step itself. Elementwise; memory of B_t is
    batch x length x channel x state. Raises DsfShapeError, DsfTypeError.
    Source: Gu and Dao (2023), section 3; Sieber et al. (2024), equation 19.
    """
    channel = step_size.shape[2]
    if A.shape[0] != channel:
        raise DsfShapeError(
            f"dsf.mamba_recurrence: A: expected axes (channel={channel}, state), got "
            f"{tuple(A.shape)}; channel is fixed by step_size."
        )
    if (B.is_complex() or C.is_complex()) and not A.is_complex():
        raise DsfTypeError(
            "dsf.mamba_recurrence: B, C: expected real, as A is, got complex. Pass a complex A."
        )
    s = step_sizes(step_size, step_bias, softplus)[..., None]
    decay, gain = exponential_euler(A[None, None], s)
    b = _by_channel("B", B, channel, A.shape[1])
    c = _by_channel("C", C, channel, A.shape[1])
    c = 2 * c if A.is_complex() else c
    return Recurrence(
        decay, (gain * b)[..., None], c[..., None, :],
        None if D is None else D[None, None, :, None, None],
        None if initial_state is None else initial_state[..., None],
        real_output=A.is_complex(), system="mamba",
    )  # fmt: skip


def _by_channel(name: str, x: Tensor, channel: int, n_state: int) -> Tensor:
    """(batch, time, head, state) with the groups spread over their channels; one group stays."""
    group = {2: x.shape[0], 3: 1, 4: x.shape[-2]}.get(x.ndim, 0)
    fits = group == channel if x.ndim == 2 else group > 0 and channel % group == 0
    if not fits or x.shape[-1] != n_state:
        raise DsfShapeError(
            f"dsf.mamba_recurrence: {name}: expected axes (batch, time, state={n_state}), (batch, "
            f"time, group, state={n_state}) with group dividing {channel}, or "
            f"(channel={channel}, state={n_state}), got {tuple(x.shape)}."
        )
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x[:, :, None]
    return x if group == 1 else x.repeat_interleave(channel // group, dim=2)


def mamba_block_recurrence(
    core: Recurrence,
    convolved: Float[Tensor, "batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None = None,
    gate: Float[Tensor, "batch time channel"] | None = None,
) -> Recurrence:
    """Convolution, SiLU, scan, skip and gate of a Mamba block as one system along its trajectory.

        y = SiLU(z) * core(sigmoid(k) * k),    k = convolution of x;   SiLU(k) = sigmoid(k) k

    The gains sigmoid(k_t) and SiLU(z_t), like s_t, b_t, c_t, are frozen at the values this input
    gives them, so its scan on x reproduces the block up to the output projection, exactly. core:
    `mamba_recurrence` of this input; convolved: k, before the activation; gate: z, before its
    SiLU, None for no gate. Heads are channels, states kernel + state of the core (twice those if
    complex). The values are x (batch, time, channel, 1), with a second input of ones when there is
    a bias (`with_constant`). The transition is dense: memory length x channel x states^2.
    """
    gain = torch.sigmoid(convolved)[..., None]
    front = gated(gain, short_convolution_recurrence(weight, bias))
    assert isinstance(front, Recurrence)
    whole = series(core, front)
    if gate is not None:
        gated_whole = gated(functional.silu(gate)[..., None], whole)
        assert isinstance(gated_whole, Recurrence)
        whole = gated_whole
    return whole.replace(system="mamba_block", mode="exact_along_trajectory")


class Mamba(SequenceMixer):
    """The Mamba block: projection, short convolution, S6 scan, gate, projection.

    Parameter names are those of the released layers (mamba_ssm, transformers), so that their
    state dicts load. Source: Gu and Dao (2023), figure 3.
    """

    system: ClassVar[str] = "mamba"
    equations: ClassVar[dict[str, str]] = {
        "A": "exp(Δₜ A), diagonal per channel", "B": "Δₜ bₜ", "C": "cₜᵀ", "D": "diag(D)",
    }  # fmt: skip
    source: ClassVar[str] = "Gu and Dao (2023), arXiv 2312.00752; Sieber et al. (2024), eq. 19"

    def __init__(
        self,
        width: int,
        *,
        expand: int | float = 2,
        n_state: int = 16,
        conv_kernel: int = 4,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        step_min: float = 1e-3,
        step_max: float = 0.1,
    ) -> None:
        super().__init__()
        self.inner, self.n_state = int(expand * width), n_state
        self.rank = math.ceil(width / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.inner, self.inner, conv_kernel, groups=self.inner, bias=conv_bias)  # fmt: skip
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * n_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias = nn.Parameter(initial_step_bias(self.inner, step_min, step_max))
        self.A_log = nn.Parameter(torch.arange(1.0, n_state + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=bias)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The S6 system of this input, driven by the activated convolution's output."""
        scanned = functional.silu(self._convolved(x))
        return self._core(scanned), scanned[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """out_proj(y * SiLU(z)); y (batch, time, channel, 1)."""
        return self.out_proj(y[..., 0] * functional.silu(self._half(x, 1)))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is (convolution cache, h)."""
        cache, h = (None, None) if state is None else state
        k, cache = short_convolution_step(
            self._half(x_t, 0), self.conv1d.weight[:, 0], self.conv1d.bias, cache)  # fmt: skip
        u = functional.silu(k)
        y, h = step(self._core(u[:, None]), u[..., None], h)
        return self.readout(y, x_t), (cache, h)

    def block_recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The block from the first projection to the last as one system, and its values.

        Its scan, pushed through `out_proj`, is `forward(x)`. See `mamba_block_recurrence`.
        """
        k = self._convolved(x)
        system = mamba_block_recurrence(
            self._core(functional.silu(k)), k, self.conv1d.weight[:, 0], self.conv1d.bias,
            gate=self._half(x, 1),
        )  # fmt: skip
        values = self._half(x, 0)[..., None]
        return system, values if self.conv1d.bias is None else with_constant(values)

    def _half(self, x: Tensor, which: int) -> Tensor:
        """One half of in_proj: 0 the scanned branch, 1 the gate z."""
        rows = slice(which * self.inner, (which + 1) * self.inner)
        bias = self.in_proj.bias
        return functional.linear(
            x, self.in_proj.weight[rows], None if bias is None else bias[rows]
        )

    def _convolved(self, x: Tensor) -> Tensor:
        return short_convolution(self._half(x, 0), self.conv1d.weight[:, 0], self.conv1d.bias)

    def _core(self, u: Tensor) -> Recurrence:
        low, b, c = self.x_proj(u).split([self.rank, self.n_state, self.n_state], dim=-1)
        return mamba_recurrence(
            functional.linear(low, self.dt_proj.weight), -self.A_log.exp(), b, c, self.D,
            step_bias=self.dt_proj.bias, softplus=True,
        )  # fmt: skip


LAYER = Mamba
