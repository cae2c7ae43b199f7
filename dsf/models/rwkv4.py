"""RWKV-4: per channel a weighted mean of the past, decaying, with a bonus for the token itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dsf.models._exponential_gates import in_units_of, running_maximum
from dsf.models._rwkv import previous, read_before_write
from dsf.models._windowed import WindowedMixer, divided_by_row_sums
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "rwkv4"


def rwkv4_recurrence(
    key: Float[Tensor, "batch time channel"],
    log_decay: Float[Tensor, " channel"],
    bonus: Float[Tensor, " channel"],
    *,
    normalise: bool = True,
    stabilised: bool = False,
    initial_state: Float[Tensor, "batch channel"] | None = None,
    initial_sum: Float[Tensor, "batch channel"] | None = None,
) -> Recurrence:
    """The WKV of RWKV-4 over values (batch, time, channel, 1): every channel a head.

        M_tj = exp((t-1-j) w + k_j) / eta_t  (j < t),   M_tt = exp(u + k_t) / eta_t

    w = log_decay (minus exp of the released time_decay), u = bonus, eta_t the row's sum, so that
    rows sum to one. The row reads the state before its own write: two states a channel, A =
    [[e^w, 1], [0, 0]], B_t = [0, e^k_t], C_t = [1, e^u] / eta_t; see `read_before_write`.
    normalise=False leaves eta out; initial_state and initial_sum are numerator and denominator so
    far. exp(k) must fit the type; stabilised = True takes states divided by their largest weight
    exp(m_t) instead: the same normalised map for any k. Source: Peng et al. (2023), eqs. 16-18.
    """
    query, log_bonus = torch.zeros_like(key[:1, :1, :1]), bonus[None, None]
    decay, log_write = log_decay[None, None], key
    if stabilised:
        m = running_maximum(decay, key, -torch.inf if initial_state is None else 0.0)
        decay, log_write = in_units_of(m, decay, key)
        before, after = m[:, :-1], m[:, 1:]
        top = torch.maximum(before, key + bonus)  # the largest weight of the row
        query, log_bonus = before - top, bonus + after - top
    start = None if initial_state is None else initial_state[..., None, None]
    r = read_before_write(
        SYSTEM, query.exp()[..., None], log_write.exp()[..., None], decay[..., None],
        log_bonus.exp()[..., None], start,
    )  # fmt: skip
    if stabilised:
        r = r.replace(gauge="divided by exp(m_t)")
    if not normalise:
        return r
    start = None
    if initial_sum is not None:
        start = torch.stack([torch.zeros_like(initial_sum), initial_sum], dim=-1)
    return divided_by_row_sums(r, lambda sums: sums, key.shape[1], start)


class Rwkv4(WindowedMixer):
    """The time mixing layer of RWKV-4.

        x^i_t = mu_i x_t + (1 - mu_i) x_{t-1},   y_t = W_o (sigmoid(W_r x^r_t) * wkv_t)

    Parameter names are those of the released layer (transformers): its state dict loads. Cost
    O(length x width), state 2 a channel and the last two inputs. Source: Peng et al. (2023).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "[[e^w, 1], [0, 0]], per channel", "B": "[0, e^kₜ]",
        "C": "[1, e^u]/ηₜ, ηₜ = Σⱼ weights", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Peng et al. (2023), arXiv 2305.13048, eqs. 16-18"
    n_past = 1
    is_divided = True

    def __init__(self, width: int, *, n_hidden: int | None = None) -> None:
        super().__init__()
        hidden = n_hidden or width
        self.time_decay = nn.Parameter(torch.linspace(-5.0, 3.0, hidden))
        self.time_first = nn.Parameter(torch.full((hidden,), 0.3).log())
        for name in ("key", "value", "receptance"):
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.rand(1, 1, width)))
            setattr(self, name, nn.Linear(width, hidden, bias=False))
        self.output = nn.Linear(hidden, width, bias=False)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The unnormalised system and the values, channels as heads."""
        system = rwkv4_recurrence(
            self._mixed("key", x), -self.time_decay.exp(), self.time_first, normalise=False
        )
        return system, self._mixed("value", x)[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Receptance gate and output projection; y (batch, time, channel, 1)."""
        return self.output(torch.sigmoid(self._mixed("receptance", x)) * y[..., 0])

    def _mixed(self, name: str, x: Tensor) -> Tensor:
        mix = getattr(self, f"time_mix_{name}")
        return getattr(self, name)(x * mix + previous(x) * (1 - mix))


LAYER = Rwkv4
