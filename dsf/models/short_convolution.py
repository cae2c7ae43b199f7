"""Short convolution: a shift register of the last tokens, gated before and after."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError
from dsf.models._heads import check_at_least
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.short_convolution import (
    short_convolution,
    short_convolution_recurrence,
    short_convolution_step,
    with_constant,
)

SYSTEM = "short_convolution"


def gated_short_convolution_recurrence(
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None = None,
    *,
    input_gate: Float[Tensor, "#batch time _channel"] | None = None,
    output_gate: Float[Tensor, "#batch time _channel"] | None = None,
    cache: Float[Tensor, "batch channel past"] | None = None,
) -> Recurrence:
    """A gated causal convolution as a system: every channel a head of `kernel` states.

        A = shift,   B_t = b_t e_1,   C_t = c_t (w_(kernel-1), ..., w_0),   D_t = c_t (0, bias)

    Values (batch, time, channel, 1), with a second input of ones where there is a bias
    (`dsf.short_convolution.with_constant`). b and c are the gates, 1 if None; cache holds the
    gated inputs before the first, the oldest first. Raises DsfShapeError. Source: Liquid AI
    (2025), LFM2's double-gated convolution.
    """
    channel = weight.shape[0]
    for name, gate in (("input_gate", input_gate), ("output_gate", output_gate)):
        if gate is not None and gate.shape[2] != channel:
            raise DsfShapeError(
                f"dsf.{SYSTEM}_recurrence: {name}: expected axes (batch, time, channel={channel}),"
                f" got {tuple(gate.shape)}; channel is fixed by weight."
            )
    r = short_convolution_recurrence(weight, bias, cache)
    B, C, D = r.B, r.C, r.D
    assert isinstance(B, Tensor)
    assert isinstance(C, Tensor)
    if input_gate is not None:  # not on the constant, which reaches the output through D
        B = B * input_gate[..., None, None]
    if output_gate is not None:
        C = C * output_gate[..., None, None]
        D = None if D is None else D * output_gate[..., None, None]
    return r.replace(B=B, C=C, D=D)


class ShortConvolution(SequenceMixer):
    """The gated short convolution of LFM2: y = W_o (c * conv(b * u)), (b, c, u) = W_i x.

    gated=False is W_o conv(W_i x). Parameter names are those of the released layer. Cost
    O(length x width x (kernel + width)), state kernel x width. Source: Liquid AI (2025), LFM2.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "shift", "B": "bₜ e₁", "C": "cₜ (w_K₋₁, …, w₀)", "D": "0   (bias: cₜ b)",
    }  # fmt: skip
    source: ClassVar[str] = "Liquid AI (2025), LFM2, transformers' Lfm2ShortConv"

    def __init__(
        self, width: int, *, kernel: int = 3, gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        check_at_least("ShortConvolution", "kernel", 1, kernel)
        self.gated = gated
        self.in_proj = nn.Linear(width, 3 * width if gated else width, bias=bias)
        self.conv = nn.Conv1d(width, width, kernel, groups=width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The register with its gates, and the values u (and a constant if there is a bias)."""
        b, c, u = self._parts(x)
        system = gated_short_convolution_recurrence(
            self.conv.weight[:, 0], self.conv.bias, input_gate=b, output_gate=c
        )
        values = u[..., None]
        return system, values if self.conv.bias is None else with_constant(values)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Output projection."""
        return self.out_proj(y[..., 0])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width), by one product a lag."""
        b, c, u = self._parts(x)
        u = u if b is None else b * u
        y = short_convolution(u, self.conv.weight[:, 0], self.conv.bias)
        return self.out_proj(y if c is None else c * y)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        """One token; the state is the last kernel - 1 gated inputs (batch, channel, past)."""
        b, c, u = self._parts(x_t)
        u = u if b is None else b * u
        y, cache = short_convolution_step(u, self.conv.weight[:, 0], self.conv.bias, state)
        return self.out_proj(y if c is None else c * y), cache

    def _parts(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if not self.gated:
            return None, None, self.in_proj(x)
        b, c, u = torch.chunk(self.in_proj(x), 3, dim=-1)
        return b, c, u


LAYER = ShortConvolution
