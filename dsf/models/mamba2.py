"""Mamba-2: state space duality, one decay per head shared by its channels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.errors import DsfShapeError
from dsf.models._mixer import SequenceMixer
from dsf.models._projections import GatedRmsNorm
from dsf.models._step_size import initial_step_bias, step_sizes
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Bool, Float
from dsf.short_convolution import short_convolution, short_convolution_step
from dsf.transitions import Scalar


def ssd_recurrence(
    log_decay: Float[Tensor, "#batch #time head"],
    B: Float[Tensor, "#batch time group state"],
    C: Float[Tensor, "#batch time _group _state"],
    D: Float[Tensor, " head"] | Float[Tensor, "head channel"] | None = None,
    *,
    write_strength: Float[Tensor, "#batch #time head"] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    initial_state: Float[Tensor, "batch head state channel"] | None = None,
) -> Recurrence:
    """The SSD system from decays that are already discrete.

        A_t = exp(log_decay_t) I,   B_t = write_strength_t b_t,   C_t = c_t,   D

    The values are x (batch, time, head, channel); group g of B and C serves heads g*head/group
    onwards. `reset` is True where the state is forgotten before the step (a new document). D per
    channel takes the channels of a head apart: every channel is then a head of its own, head
    h*channel + p, and the values are (batch, time, head*channel, 1). Raises DsfShapeError.
    Source: Dao and Gu (2024), section 5.
    """
    head, group = log_decay.shape[2], B.shape[2]
    if group == 0 or head % group or C.shape[2:] != B.shape[2:]:
        raise DsfShapeError(
            f"dsf.ssd_recurrence: B, C: expected axes (batch, time, group, state) with group "
            f"dividing head={head}, got {tuple(B.shape)} and {tuple(C.shape)}."
        )
    if group > 1:
        B, C = (x.repeat_interleave(head // group, dim=2) for x in (B, C))
    if write_strength is not None:
        B = write_strength[..., None] * B
    if reset is not None:
        log_decay = log_decay.expand(*reset.shape, head)
        log_decay = log_decay.masked_fill(reset[..., None], -torch.inf)
    if D is not None and D.ndim == 2:
        channel = D.shape[1]
        log_decay = log_decay.repeat_interleave(channel, dim=2)
        B, C = (x if x.shape[2] == 1 else x.repeat_interleave(channel, dim=2) for x in (B, C))
        D = D.flatten()
        if initial_state is not None:
            initial_state = initial_state.permute(0, 1, 3, 2).flatten(1, 2)[..., None]
    return Recurrence(
        Scalar(log_decay, n_state=B.shape[-1]), B[..., None], C[..., None, :],
        None if D is None else D[None, None, :, None, None], initial_state, system="mamba2",
    )  # fmt: skip


def mamba2_recurrence(
    step_size: Float[Tensor, "batch time head"],
    A: Float[Tensor, " head"],
    B: Float[Tensor, "#batch time group state"],
    C: Float[Tensor, "#batch time _group _state"],
    D: Float[Tensor, " head"] | Float[Tensor, "head channel"] | None = None,
    *,
    step_bias: Float[Tensor, " head"] | None = None,
    softplus: bool = False,
    limits: tuple[float, float] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    initial_state: Float[Tensor, "batch head state channel"] | None = None,
) -> Recurrence:
    """The core of Mamba-2 from the tensors that enter its scan.

        A_t = exp(s_t A) I,   B_t = s_t b_t,   C_t = c_t,   D,
        s_t = clamp(softplus(step_size + step_bias), limits)

    A negative, one number per head; the softplus and the clamp only if asked for. The rest as in
    `ssd_recurrence`. Elementwise; memory of B_t is batch x length x head x state.
    Source: Dao and Gu (2024), section 7; Sieber et al. (2024), section 3.2.2.
    """
    s = step_sizes(step_size, step_bias, softplus, limits)
    return ssd_recurrence(
        s * A, B, C, D, write_strength=s, reset=reset, initial_state=initial_state)  # fmt: skip


class Mamba2(SequenceMixer):
    """The Mamba-2 block: one projection, convolution of x, B, C, scan, gated norm, projection.

    Parameter names are those of the released layers (mamba_ssm, transformers), so that their
    state dicts load. Source: Dao and Gu (2024), figure 6.
    """

    system: ClassVar[str] = "mamba2"
    equations: ClassVar[dict[str, str]] = {
        "A": "exp(Δₜ a) I, per head", "B": "Δₜ bₜ", "C": "cₜᵀ", "D": "D",
    }  # fmt: skip
    source: ClassVar[str] = "Dao and Gu (2024), arXiv 2405.21060, section 7"

    def __init__(
        self,
        width: int,
        n_head: int | None = None,
        *,
        expand: int | float = 2,
        head_width: int = 64,
        n_state: int = 128,
        n_group: int = 1,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        limits: tuple[float, float] = (0.0, math.inf),
        step_min: float = 1e-3,
        step_max: float = 0.1,
        decay_range: tuple[float, float] = (1.0, 16.0),
    ) -> None:
        super().__init__()
        self.inner, self.n_state, self.n_group = int(expand * width), n_state, n_group
        self.n_head = self.inner // head_width if n_head is None else n_head
        if self.n_head < 1 or self.inner % self.n_head or self.n_head % n_group:
            raise DsfShapeError(
                f"dsf.models.Mamba2: n_head: expected a divisor of {self.inner} (expand * width) "
                f"and a multiple of n_group={n_group}, got {self.n_head}."
            )
        self.limits = limits
        mixed = self.inner + 2 * n_group * n_state
        self.parts = [self.inner, mixed, self.n_head]
        self.in_proj = nn.Linear(width, sum(self.parts), bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, conv_kernel, groups=mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(initial_step_bias(self.n_head, step_min, step_max))
        self.A_log = nn.Parameter(torch.empty(self.n_head).uniform_(*decay_range).log())
        self.D = nn.Parameter(torch.ones(self.n_head))
        self.norm = GatedRmsNorm(
            self.inner, n_group=n_group, eps=norm_eps, norm_before_gate=norm_before_gate
        )
        self.out_proj = nn.Linear(self.inner, width, bias=bias)

    @classmethod
    def small(cls, width: int) -> Mamba2:
        """Heads of 16 channels (or the largest common divisor with the inner width), 16 states."""
        return cls(width, head_width=math.gcd(16, 2 * width), n_state=16)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The SSD system of this input, driven by the activated convolution's x part."""
        _, mixed, raw = self.in_proj(x).split(self.parts, dim=-1)
        k = short_convolution(mixed, self.conv1d.weight[:, 0], self.conv1d.bias)
        return self._core(functional.silu(k), raw)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """out_proj(gated norm of y and z); y (batch, time, head, channel)."""
        bias = None if self.in_proj.bias is None else self.in_proj.bias[: self.inner]
        z = functional.linear(x, self.in_proj.weight[: self.inner], bias)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is (convolution cache, h)."""
        cache, h = (None, None) if state is None else state
        _, mixed, raw = self.in_proj(x_t).split(self.parts, dim=-1)
        k, cache = short_convolution_step(
            mixed, self.conv1d.weight[:, 0], self.conv1d.bias, cache)  # fmt: skip
        system, values = self._core(functional.silu(k)[:, None], raw[:, None])
        y, h = step(system, values[:, 0], h)
        return self.readout(y, x_t), (cache, h)

    def _core(self, mixed: Tensor, raw: Tensor) -> tuple[Recurrence, Tensor]:
        size = self.n_group * self.n_state
        u, b, c = mixed.split([self.inner, size, size], dim=-1)
        b, c = (t.unflatten(-1, (self.n_group, self.n_state)) for t in (b, c))
        system = mamba2_recurrence(
            raw, -self.A_log.exp(), b, c, self.D,
            step_bias=self.dt_bias, softplus=True, limits=self.limits,
        )  # fmt: skip
        return system, u.unflatten(-1, (self.n_head, -1))


LAYER = Mamba2
