"""RWKV-6 (Finch): gated linear attention that reads before it writes, with a bonus."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._heads import check_divides, split_heads
from dsf.models._projections import HeadNorm, LowRank
from dsf.models._rwkv import previous, read_before_write
from dsf.models._windowed import WindowedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "rwkv6"


def rwkv6_recurrence(
    receptance: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head state"],
    log_decay: Float[Tensor, "#batch #time head state"],
    bonus: Float[Tensor, "head state"],
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "batch head state channel"] | None = None,
) -> Recurrence:
    """The time mixing core of RWKV-6 over values (batch, time, head, channel).

        y_t = scale r_t.(S_{t-1} + diag(u) k_t v_t^T),   S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

    w = log_decay <= 0 (-inf forgets a channel), u = bonus, S_0 = initial_state. The row reads the
    state before its own write: 2 x state x channel numbers a head, A_t = [[e^(w_{t-1}), 1], [0,
    0]] by channel; see `read_before_write`. The layer has scale 1, the released reference
    state^(-1/2) by default. Source: Peng et al. (2024), eqs. 18-19.
    """
    query = scale * receptance
    return read_before_write(SYSTEM, query, key, log_decay, query * bonus, initial_state)


class DataDependentShift(nn.Module):
    """n inputs x_t + m_i (x_{t-1} - x_t), m_i = lambda_i + tanh((x_t + mu (x_{t-1} - x_t)) A) B_i.

    Source: Peng et al. (2024), eqs. 14-16.
    """

    def __init__(self, width: int, n: int, rank: int) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.rand(width))
        self.base = nn.Parameter(torch.rand(n, width))
        self.down = nn.Linear(width, n * rank, bias=False)
        self.up = nn.Parameter(torch.randn(n, rank, width) * 0.1 * rank**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, time, width) -> n of them."""
        change = previous(x) - x
        low = torch.tanh(self.down(x + change * self.mu)).unflatten(-1, self.up.shape[:2])
        mix = self.base + torch.einsum("btnr,nrw->btnw", low, self.up)
        return tuple(x + change * m for m in mix.unbind(2))


class Rwkv6(WindowedMixer):
    """The time mixing layer of RWKV-6.

        w_t = -exp(W_2 tanh(W_1 x^w_t) + b),   y_t = W_o (GroupNorm(o_t) * SiLU(W_g x^g_t))

    r, k, v, w and g have their own data-dependent token shift. Cost O(length x width^2 /
    n_head), state 2 width^2 / n_head and the last two inputs. Source: Peng et al. (2024).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "[[e^wₜ₋₁, 1], [0, 0]], per channel", "B": "[0, kₜ]", "C": "[rₜ, u⊙rₜ]ᵀ", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Peng et al. (2024), arXiv 2404.05892, eqs. 14-19"
    n_past = 2

    def __init__(
        self, width: int, n_head: int = 4, *, mix_rank: int = 32, decay_rank: int = 64,
        norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        check_divides("Rwkv6", "n_head", n_head, "width", width)
        self.n_head = n_head
        self.shift = DataDependentShift(width, 5, mix_rank)
        self.receptance, self.key, self.value, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.decay = LowRank(width, width, decay_rank, activation="tanh")
        nn.init.uniform_(self.decay.up.bias, -6.0, -1.0)
        self.bonus = nn.Parameter(torch.zeros(n_head, width // n_head))
        self.norm = HeadNorm(width, n_head, norm_eps)

    @classmethod
    def small(cls, width: int) -> Rwkv6:
        """Four heads, low-rank parts of rank 4."""
        return cls(width, 4, mix_rank=4, decay_rank=4)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        for_r, for_w, for_k, for_v, _ = self.shift(x)
        r, w, k, v = (
            split_heads(part, self.n_head) for part in (
                self.receptance(for_r), self.decay(for_w), self.key(for_k), self.value(for_v))
        )  # fmt: skip
        return rwkv6_recurrence(r, k, -w.exp(), self.bonus), v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Group norm a head, SiLU gate, output projection."""
        return self.out(self.norm(y) * functional.silu(self.gate(self.shift(x)[-1])))


LAYER = Rwkv6
