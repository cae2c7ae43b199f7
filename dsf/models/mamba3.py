"""Mamba-3: the trapezoidal rule looks one token back, the state turns, ranks share it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._heads import (
    check_at_least,
    check_divides,
    check_shapes,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.models._projections import GatedRmsNorm
from dsf.models._step_size import initial_step_bias, step_sizes
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float
from dsf.transitions import DiagonalLowRank

SYSTEM = "mamba3"
PAIRINGS = ("neighbour", "half")


def turned(
    x: Float[Tensor, "batch time head rank state"],
    angle: Float[Tensor, "batch time #head pair"],
    pairing: str = "neighbour",
) -> Float[Tensor, "batch time head rank state"]:
    """Coordinates (2i, 2i+1), or (i, i + state/2) with pairing "half", turned by angle i.

    Coordinates beyond the last angle stay. Raises DsfValueError on an unknown pairing,
    DsfShapeError on an odd state and on more angles than pairs.
    """
    check_pairing("turned", pairing)
    n_state, n_pair = x.shape[-1], angle.shape[-1]
    if n_state % 2 or n_pair > n_state // 2:
        raise DsfShapeError(
            f"dsf.turned: angle: expected at most half as many angles as an even state, got "
            f"{n_pair} for {n_state}."
        )
    axis = -1 if pairing == "neighbour" else -2
    pairs = x.unflatten(-1, (-1, 2) if pairing == "neighbour" else (2, -1))
    one, two = pairs.unbind(axis)
    angle = functional.pad(angle, (0, one.shape[-1] - angle.shape[-1]))[:, :, :, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([one * cos - two * sin, one * sin + two * cos], axis).flatten(-2)


def check_pairing(function: str, pairing: str) -> None:
    """Raise DsfValueError on an unknown pairing."""
    if pairing not in PAIRINGS:
        raise DsfValueError(
            f"dsf.{function}: pairing: expected one of {PAIRINGS}, got {pairing!r}."
        )


def mamba3_recurrence(
    log_decay: Float[Tensor, "batch time head"],
    step_size: Float[Tensor, "batch time head"],
    trapezoid: Float[Tensor, "batch time head"],
    B: Float[Tensor, "batch time head rank state"],
    C: Float[Tensor, "batch time head _rank _state"],
    D: Float[Tensor, " head"] | None = None,
    *,
    previous: Float[Tensor, "batch head rank state"] | None = None,
    initial_state: Float[Tensor, "batch head states channel"] | None = None,
) -> Recurrence:
    """Mamba-3's core: rank inputs and outputs a head, values (batch, time, head, rank, channel).

        h_t = a_t h_(t-1) + (1 - l_t) s_t a_t B_(t-1) u_(t-1) + l_t s_t B_t u_t
        y_t = C_t^T h_t + D u_t,   a_t = exp(log_decay_t)

    s is step_size, l in (0, 1) trapezoid: 1 is the Euler rule of Mamba-2, 1/2 the trapezoid. The
    system keeps u_(t-1) in `rank` more states, so that its coefficients look back only:

        A_t = [[a_t I, (1 - l_t) s_t a_t B_(t-1)], [0, 0]],   B_t = [l_t s_t B_t; I],
        C_t = [C_t^T, 0]

    B and C come turned by the angles summed so far (`turned`): that is the complex state, in a
    gauge in which A is real. previous is B_0 (none: 0), initial_state (h_0; u_0). The rank axis
    of the values may be left out when it is 1. State: (state + rank) x channel a head. Raises
    DsfShapeError. Source: Lahoti et al. (2026), arXiv 2603.15569, section 3.
    """
    batch, length, head, rank, n_state = B.shape
    each = (batch, length, head)
    check_shapes(f"dsf.{SYSTEM}_recurrence", "B", {
        "log_decay": (log_decay, each), "step_size": (step_size, each),
        "trapezoid": (trapezoid, each), "C": (C, (*each, rank, n_state)), "D": (D, (head,)),
        "previous": (previous, (batch, head, rank, n_state)),
    })  # fmt: skip
    key, read = B.mT, C
    first = key.new_zeros(key[:, :1].shape) if previous is None else previous.mT[:, None]
    before = torch.cat([first, key], dim=1)[:, : key.shape[1]]
    weight = (1 - trapezoid) * step_size * log_decay.exp()
    held = torch.eye(rank, dtype=B.dtype, device=B.device).expand(*key.shape[:3], rank, rank)
    left = torch.cat([-weight[..., None, None] * before, torch.zeros_like(held)], -2)
    right = torch.cat([torch.zeros_like(key), held], -2)
    written = torch.cat([(trapezoid * step_size)[..., None, None] * key, held], -2)
    read = functional.pad(read, (0, rank))
    decay = log_decay[..., None].expand(*log_decay.shape, n_state)
    decay = functional.pad(decay, (0, rank), value=-math.inf)
    skip = None if D is None else D[:, None, None] * held[:1, :1]
    return Recurrence(
        DiagonalLowRank(decay, left=left, right=right), written, read, skip, initial_state,
        system=SYSTEM, gauge="turned back; the last rank states hold the last input",
    )  # fmt: skip


class Mamba3State(NamedTuple):
    """What `step` keeps.

    angle: summed so far (batch, 1, head, pair); key: the last B, turned (batch, head, rank,
    state); memory: h and the last input (batch, head, state + rank, channel).
    """

    angle: Tensor
    key: Tensor
    memory: Tensor


class _Parts(NamedTuple):
    """Everything made from one input: the system, its values, and what the next step needs."""

    system: Recurrence
    values: Tensor
    angle: Tensor
    key: Tensor


class Mamba3(SequenceMixer):
    """The Mamba-3 block: one projection, norms and biases on B and C, scan, gate, projection.

        s = softplus(s' + b),   log_decay = -max(softplus(a'), floor) s,   l = sigmoid(l')
        angle_t = angle_(t-1) + pi tanh(angle') s_t

    rank 1 is the SISO form; a larger one the MIMO form, u_r = x mimo_x_r and y = sum_r mimo_o_r
    (y_r SiLU(z mimo_z_r)). No short convolution. head_norm puts an RMS norm over each head before
    the gate. rotated is the share of the state that turns (1/2 or 1); pairing as in `turned`: the
    released MIMO kernels pair by halves. Parameter names are those of the release. Source: Lahoti
    et al. (2026), sections 3 and 4; mamba_ssm's Mamba3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "[[aₜ I, (1 − λₜ)Δₜaₜ bₜ₋₁], [0, 0]], aₜ = e^(Δₜ Aₜ)", "B": "(λₜΔₜ bₜ, 1), b turned",
        "C": "(cₜᵀ, 0), c turned", "D": "D",
    }  # fmt: skip
    source: ClassVar[str] = "Lahoti et al. (2026), arXiv 2603.15569, section 3"

    def __init__(
        self,
        width: int,
        *,
        expand: int | float = 2,
        head_width: int = 64,
        n_state: int = 128,
        n_group: int = 1,
        rank: int = 1,
        rotated: float = 0.5,
        pairing: str = "neighbour",
        head_norm: bool = False,
        decay_floor: float = 1e-4,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        inner = int(expand * width)
        check_divides("Mamba3", "head_width", head_width, "expand * width", inner)
        self.n_head, self.n_group, self.rank, self.n_state = (
            inner // head_width, n_group, rank, n_state)  # fmt: skip
        check_divides("Mamba3", "n_group", n_group, "n_head", self.n_head)
        check_at_least("Mamba3", "rank", 1, rank)
        check_pairing("Mamba3", pairing)
        self.n_pair, self.pairing = int(n_state * rotated) // 2, pairing
        if n_state % 2 or not self.n_pair or self.n_pair > n_state // 2:
            raise DsfValueError(
                f"dsf.Mamba3: n_state, rotated: expected an even number of states and a share in "
                f"(0, 1] of at least one pair, got {n_state} and {rotated}."
            )
        self.decay_floor = decay_floor
        mixed = n_state * n_group * rank
        self.parts = [inner, inner, mixed, mixed, *[self.n_head] * 3, self.n_pair]
        self.in_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(initial_step_bias(self.n_head, step_min, step_max))
        self.B_bias = nn.Parameter(torch.ones(self.n_head, rank, n_state))
        self.C_bias = nn.Parameter(torch.ones(self.n_head, rank, n_state))
        self.B_norm = nn.RMSNorm(n_state, eps=norm_eps)
        self.C_norm = nn.RMSNorm(n_state, eps=norm_eps)
        self.D = nn.Parameter(torch.ones(self.n_head))
        if rank > 1:
            one = torch.ones(self.n_head, rank, head_width)
            self.mimo_x, self.mimo_z, self.mimo_o = (
                nn.Parameter(w) for w in (one / rank, one.clone(), one / rank)
            )
        self.norm: nn.Module | None = None
        if head_norm:
            self.norm = GatedRmsNorm(
                inner, n_group=self.n_head, eps=norm_eps, norm_before_gate=True
            )
        self.out_proj = nn.Linear(inner, width, bias=False)

    @classmethod
    def small(cls, width: int) -> Mamba3:
        """Heads of 16 channels (or the largest common divisor with the inner width), 16 states."""
        return cls(width, head_width=math.gcd(16, 2 * width), n_state=16)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The system of this input, and the values (batch, time, head[, rank], channel)."""
        parts = self._core(x)
        return parts.system, parts.values

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Gate (and norm) rank by rank, ranks summed, output projection."""
        z = split_heads(self.in_proj(x).split(self.parts, -1)[0], self.n_head)
        if self.rank > 1:
            y, z = y.transpose(2, 3), z[:, :, None] * self.mimo_z.transpose(0, 1)
        if self.norm is None:
            y = y * functional.silu(z)
        else:
            y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, (self.n_head, -1))
        if self.rank > 1:
            y = (y * self.mimo_o.transpose(0, 1)).sum(2)
        return self.out_proj(y.flatten(-2))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Mamba3State]:
        """One token, from the summed angle, the last key and the memory."""
        parts = self._core(x_t[:, None], state)
        memory = None if state is None else state.memory
        y, memory = step(parts.system, parts.values[:, 0], memory)
        y = self.readout(y[:, None], x_t[:, None])[:, 0]
        return y, Mamba3State(parts.angle[:, -1:], parts.key[:, -1], memory)

    def _core(self, x: Tensor, state: Mamba3State | None = None) -> _Parts:
        _, u, b, c, dt, decay, mix, angle = self.in_proj(x).split(self.parts, dim=-1)
        s = step_sizes(dt, self.dt_bias, softplus=True)
        log_decay = -functional.softplus(decay).clamp(min=self.decay_floor) * s
        turn = math.pi * torch.tanh(angle)[:, :, None] * s[..., None]
        # in float64: a sum of many angles must keep its place on the circle
        total = turn.to(torch.float64).cumsum(1)
        total = total if state is None else total + state.angle
        b, c = (
            turned(self._heads(norm, part) + bias, total.to(x.dtype), self.pairing)
            for norm, part, bias in ((self.B_norm, b, self.B_bias), (self.C_norm, c, self.C_bias))
        )
        system = mamba3_recurrence(
            log_decay, s, torch.sigmoid(mix), b, c, self.D,
            previous=None if state is None else state.key,
        )  # fmt: skip
        u = split_heads(u, self.n_head)
        values = u if self.rank == 1 else u[:, :, :, None] * self.mimo_x
        return _Parts(system, values, total, b)

    def _heads(self, norm: nn.Module, part: Tensor) -> Tensor:
        """(batch, time, rank x group x state) -> (batch, time, head, rank, state), normed."""
        split = norm(part.unflatten(-1, (self.rank, self.n_group, self.n_state)))
        return share_groups(split.transpose(2, 3).flatten(-2), self.n_head).unflatten(
            -1, (self.rank, -1))  # fmt: skip


LAYER = Mamba3
