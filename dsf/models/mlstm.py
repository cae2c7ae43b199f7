"""mLSTM: the matrix memory of xLSTM, exponential input gates and a bounded divisor."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._exponential_gates import in_units_of, running_maximum
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models._projections import HeadedMixer
from dsf.models._windowed import divided_by_row_sums
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "mlstm"


def mlstm_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    input_gate: Float[Tensor, "batch time head"],
    forget_gate: Float[Tensor, "batch time head"],
    *,
    scale: float | None = None,
    normalise: bool = True,
    eps: float = 0.0,
    stabilised: bool = False,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
    initial_key_sum: Float[Tensor, "#batch #head state"] | None = None,
    initial_maximum: Float[Tensor, "#batch #head"] | None = None,
) -> Recurrence:
    """mLSTM over values (batch, time, head, channel), from the gates' preactivations i and f.

        A_t = sigmoid(f_t) I,   B_t = exp(i_t) k_t,   C_t = scale q_t^T / eta_t,   D = 0
        eta_t = max(|scale q_t.n_t|, 1) + eps exp(m_t),   n_t = A_t n_{t-1} + B_t
        m_t = max(m_{t-1} + logsigmoid(f_t), i_t),   m_0 = initial_maximum or 0

    scale is state^(-1/2) unless given. eps (1e-6 in the released code, which adds it to the
    stabilised divisor; 0 in the paper). exp(i) must fit the type; stabilised = True takes states
    divided by exp(m_t) instead: the same map, A_t = sigmoid(f_t) exp(m_{t-1} - m_t), any gates.
    normalise=False sets eta = 1. Both initial values are given in units of exp(m_0). State: state
    x (channel + 1) a head. Raises DsfShapeError.
    Source: Beck et al. (2024), eqs. 19-27.
    """
    log_decay, log_write = functional.logsigmoid(forget_gate), input_gate
    m = running_maximum(log_decay, log_write, 0.0 if initial_maximum is None else initial_maximum)
    if stabilised:
        log_decay, log_write = in_units_of(m, log_decay, log_write)
    elif initial_maximum is not None:
        unit = initial_maximum.exp()[..., None]
        initial_key_sum = None if initial_key_sum is None else unit * initial_key_sum
        initial_state = None if initial_state is None else unit[..., None] * initial_state
    r = gated_linear_recurrence(SYSTEM, query, key, log_decay, scale, initial_state)
    gauge = "divided by exp(m_t)" if stabilised else "as given"
    assert isinstance(r.B, Tensor)
    r = r.replace(B=log_write.exp()[..., None, None] * r.B, gauge=gauge)
    if not normalise:
        return r
    top = m[:, 1:, :, None]

    def divisor(sums: Tensor) -> Tensor:
        if stabilised:
            return torch.maximum(sums.abs(), torch.exp(-top)) + eps
        sums = sums.abs().clamp(min=1.0)
        return sums + eps * torch.exp(top) if eps else sums

    return divided_by_row_sums(r, divisor, query.shape[1], initial_key_sum)


class Mlstm(HeadedMixer):
    """The mLSTM layer of xLSTM-7B: soft-capped gates, layer norm a head, sigmoid output gate.

        i_t = c tanh((W_i x_t + b)/c),   f_t likewise,   y_t = W_o (LN(o_t) * sigmoid(W_g x_t))

    Queries and keys have half the width. Cost O(length x key_width x width / n_head), state
    key_width x (width / n_head + 1). Source: Beck et al. (2024), section 2.3; Beck et al. (2025).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "σ(fₜ) I", "B": "e^iₜ kₜ", "C": "qₜᵀ/(√N ηₜ), ηₜ = max(|qₜ·nₜ|/√N, 1)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "max(|q·n|, 1)"
    source: ClassVar[str] = "Beck et al. (2024), arXiv 2405.04517, eqs. 19-27"
    is_divided = True

    def __init__(
        self, width: int, n_head: int = 4, *, key_width: int | None = None,
        gate_cap: float = 15.0, norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, key_width=width // 2 if key_width is None else key_width, norm="group",
            gate="sigmoid", norm_eps=norm_eps,
        )  # fmt: skip
        self.gate_cap = gate_cap
        self.input_gate, self.forget_gate = (nn.Linear(width, n_head) for _ in range(2))
        nn.init.constant_(self.input_gate.bias, -10.0)
        with torch.no_grad():
            self.forget_gate.bias.copy_(torch.linspace(3.0, 6.0, n_head))

    @classmethod
    def small(cls, width: int) -> Mlstm:
        """Four heads, keys as wide as the values, input gates open at the start."""
        layer = cls(width, 4, key_width=width)
        nn.init.zeros_(layer.input_gate.bias)
        return layer

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The undivided system and the values."""
        q, k, v = self.project(x)
        i, f = (self.gate_cap * torch.tanh(gate(x) / self.gate_cap)
                for gate in (self.input_gate, self.forget_gate))  # fmt: skip
        return mlstm_recurrence(q, k, i, f, normalise=False), v

    def divisor(self, sums: Tensor) -> Tensor:
        """max(|q.n|, 1)."""
        return sums.abs().clamp(min=1.0)


LAYER = Mlstm
