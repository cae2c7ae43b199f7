"""RWKV-7 (Goose): a generalised delta rule with decay, removal and replacement keys."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.models._heads import check_divides, split_heads
from dsf.models._projections import HeadNorm, LowRank
from dsf.models._rwkv import TokenShift
from dsf.models._windowed import WindowedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import DiagonalLowRank

SYSTEM = "rwkv7"
DECAY_RATE = -math.exp(-0.5)
"""The fastest decay of the layer is exp(-exp(-1/2)) = 0.545 a token."""


def rwkv7_recurrence(
    receptance: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    log_decay: Float[Tensor, "#batch #time #head state"],
    removal: Float[Tensor, "batch time head state"],
    replacement: Float[Tensor, "batch time head state"],
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """The core of RWKV-7 over values (batch, time, head, channel).

        A_t = diag(exp(w_t)) - b_t kappa_t^T,   B_t = k_t,   C_t = scale r_t^T,   D = 0

    w = log_decay, kappa = removal (of length one), b = replacement = a_t * kappa_t with a_t in
    (0, 1). With other vectors it is the released generalised delta rule (DPLR: kappa = -alpha, b
    = beta; IPLR: also w = 0). kappa reads the state before the decay. State: state x channel a
    head. Source: Peng et al. (2025), eqs. 16-17.
    """
    return Recurrence(
        DiagonalLowRank(log_decay, left=replacement[..., None], right=removal[..., None]),
        key[..., None], (scale * receptance)[..., None, :], initial_state=initial_state,
        system=SYSTEM,
    )  # fmt: skip


class _Parts(NamedTuple):
    """Everything made from the input, heads split: (batch, time, head, width)."""

    receptance: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    removal: Tensor
    rate: Tensor


class Rwkv7(WindowedMixer):
    """The time mixing layer of RWKV-7, in the form of a model's first layer.

        w_t = -exp(-1/2) sigmoid(LoRA_w(x^w)),   a_t = sigmoid(LoRA_a(x^a)),   k = W_k x^k
        kappa_t = unit(k * xi),   k~_t = k (1 + (a_t - 1) alpha),   b_t = a_t * kappa_t
        y_t = W_o ((GroupNorm(o_t) + (r_t.(rho * k~_t)) v_t) * g_t)

    Later layers of a model also mix in the first layer's values; those are an input of another
    layer and are left out. The bonus (rho) stands behind the norm, so it belongs to the readout.
    rank is that of the three LoRAs. Cost O(length x width^2 / n_head), state width^2 / n_head and
    the last input. Source: Peng et al. (2025), section 4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag e^wₜ − (aₜ⊙κₜ)κₜᵀ", "B": "kₜ", "C": "rₜᵀ", "D": "0   (bonus in the readout)",
    }  # fmt: skip
    source: ClassVar[str] = "Peng et al. (2025), arXiv 2503.14456, eqs. 3-17"
    n_past = 1

    def __init__(
        self, width: int, n_head: int = 4, *, rank: int = 32, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        check_divides("Rwkv7", "n_head", n_head, "width", width)
        self.n_head = n_head
        self.shift = TokenShift(width, 6)
        self.receptance, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.decay = LowRank(width, width, rank, activation="tanh")
        self.rate = LowRank(width, width, rank)
        self.gate = LowRank(width, width, rank, activation="sigmoid", bias=False)
        self.removal_scale = nn.Parameter(torch.full((width,), 0.71))
        self.key_rate = nn.Parameter(torch.full((width,), 1.02))
        self.bonus = nn.Parameter(torch.full((n_head, width // n_head), -0.04))
        self.norm = HeadNorm(width, n_head, norm_eps * width / n_head)

    @classmethod
    def small(cls, width: int) -> Rwkv7:
        """Four heads, low-rank parts of rank 4."""
        return cls(width, 4, rank=4)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        p = self._parts(x)
        system = rwkv7_recurrence(
            p.receptance, p.key, p.log_decay, p.removal, p.rate * p.removal)  # fmt: skip
        return system, p.value

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Group norm a head, bonus of the token itself, gate, output projection."""
        p = self._parts(x)
        own = (p.receptance * p.key * self.bonus).sum(-1, keepdim=True) * p.value
        return self.out((self.norm(y) + own.flatten(-2)) * self.gate(self.shift(x)[5]))

    def _parts(self, x: Tensor) -> _Parts:
        for_r, for_w, for_k, for_v, for_a, _ = self.shift(x)
        k, rate = self.key(for_k), torch.sigmoid(self.rate(for_a))
        removal = split_heads(k * self.removal_scale, self.n_head)
        rest = (
            self.receptance(for_r), k * (1 + (rate - 1) * self.key_rate), self.value(for_v),
            DECAY_RATE * torch.sigmoid(self.decay(for_w)),
        )  # fmt: skip
        return _Parts(
            *(split_heads(part, self.n_head) for part in rest),
            removal=nn.functional.normalize(removal, dim=-1), rate=split_heads(rate, self.n_head),
        )  # fmt: skip


LAYER = Rwkv7
