"""RG-LRU: the real-gated linear recurrent unit of Griffin, Hawk and RecurrentGemma."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.errors import DsfShapeError
from dsf.models._mixer import SequenceMixer
from dsf.models._real_gates import DECAY_SCALE, decay_root, initial_decay_parameter
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Bool, Float
from dsf.short_convolution import short_convolution, short_convolution_step
from dsf.transitions import Diagonal


def rglru_recurrence(
    recurrence_logit: Float[Tensor, "batch time channel"],
    input_logit: Float[Tensor, "batch time channel"],
    parameter: Float[Tensor, " channel"],
    *,
    c: float = DECAY_SCALE,
    normalised: bool = True,
    epsilon: float = 0.0,
    reset: Bool[Tensor, "#batch time"] | None = None,
    initial_state: Float[Tensor, "batch channel"] | None = None,
) -> Recurrence:
    """The RG-LRU as a system: every channel a head of one state, C_t = 1.

        log a_t = -c sigmoid(recurrence_logit) softplus(parameter)
        A_t = a_t,   B_t = sqrt(1 - a_t^2 + epsilon) sigmoid(input_logit)

    The values are x, (batch, time, channel, 1). `reset` is True where a new document starts
    (position 0): there a_t is exactly 0 and the root is 1. Without `normalised` the root is 1
    everywhere. 1 - a^2 is taken from log a, so a slow decay keeps its digits; where it is exactly
    0 the root has no gradient. Source: De et al. (2024), equations 1 to 4; Sieber et al. (2024),
    equation 21.
    """
    log_decay = -c * torch.sigmoid(recurrence_logit) * functional.softplus(parameter)
    write = torch.sigmoid(input_logit)
    if normalised:
        root = decay_root(log_decay, epsilon)
        write = write * (root if reset is None else root.masked_fill(reset[..., None], 1.0))
    if reset is not None:
        log_decay = log_decay.masked_fill(reset[..., None], -torch.inf)
    return Recurrence(
        Diagonal(log_decay[..., None]), write[..., None, None],
        torch.ones(1, 1, 1, 1, 1, dtype=write.dtype, device=write.device),
        initial_state=None if initial_state is None else initial_state[..., None, None],
        system="rglru",
    )  # fmt: skip


class RgLruCore(nn.Module):
    """The gates of the unit: block-diagonal maps of its input, one block a head, and the decay."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        if n_head < 1 or width % n_head:
            raise DsfShapeError(
                f"dsf.models.Rglru: n_head: expected a divisor of {width}, got {n_head}."
            )
        size = width // n_head
        self.recurrent_param = nn.Parameter(initial_decay_parameter(width))
        for name in ("input_gate", "recurrent_gate"):
            weight = torch.randn(n_head, size, size) * size**-0.5
            setattr(self, f"{name}_weight", nn.Parameter(weight))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(n_head, size)))

    def forward(self, x: Tensor, reset: Tensor | None = None) -> Recurrence:
        """The system for x (batch, time, channel); its values are x[..., None]."""
        return rglru_recurrence(
            self._logit("recurrent_gate", x), self._logit("input_gate", x), self.recurrent_param,
            reset=reset,
        )  # fmt: skip

    def _logit(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        blocks = x.unflatten(-1, weight.shape[:2])
        return (torch.einsum("...hi,hij->...hj", blocks, weight) + bias).flatten(-2)


class Rglru(SequenceMixer):
    """The recurrent block of Griffin: two branches, convolution and RG-LRU on one, GELU the other.

        y = W_out (GELU(W_y x + b_y) * RG-LRU(short convolution of W_x x + b_x)) + b_out

    As in the released layer the first token counts as a reset (its position is 0), so its root
    is 1. Parameter names are those of the released layer (transformers): its state dict loads.
    Source: De et al. (2024), arXiv 2402.19427, section 2.
    """

    system: ClassVar[str] = "rglru"
    equations: ClassVar[dict[str, str]] = {
        "A": "diag aₜ, log aₜ = −c rₜ softplus(Λ)", "B": "√(1 − aₜ²) iₜ", "C": "I", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "De et al. (2024), arXiv 2402.19427; Sieber et al. (2024), eq. 21"

    def __init__(
        self, width: int, n_head: int = 4, *, n_hidden: int | None = None, conv_kernel: int = 4
    ) -> None:
        super().__init__()
        hidden = n_hidden or width
        self.linear_y = nn.Linear(width, hidden)
        self.linear_x = nn.Linear(width, hidden)
        self.linear_out = nn.Linear(hidden, width)
        self.conv_1d = nn.Conv1d(hidden, hidden, conv_kernel, groups=hidden)
        self.rg_lru = RgLruCore(hidden, n_head)
        nn.init.normal_(self.conv_1d.weight, std=(0.01 / conv_kernel) ** 0.5)
        for linear in (self.linear_x, self.linear_y, self.linear_out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for module in (self.conv_1d, self.linear_x, self.linear_y, self.linear_out):
            assert module.bias is not None
            nn.init.zeros_(module.bias)

    @classmethod
    def small(cls, width: int) -> Rglru:
        """Four blocks, or as many as divide the width."""
        return cls(width, math.gcd(4, width))

    def recurrence(
        self, x: Tensor, reset: Bool[Tensor, "#batch time"] | None = None
    ) -> tuple[Recurrence, Tensor]:
        """The unit's system, driven by the convolution's output; `reset` marks first tokens."""
        k = short_convolution(self.linear_x(x), self.conv_1d.weight[:, 0], self.conv_1d.bias)
        if reset is None:
            reset = (torch.arange(x.shape[1], device=x.device) == 0)[None]
        return self.rg_lru(k, reset), k[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """W_out (GELU branch * y); y (batch, time, channel, 1)."""
        branch = functional.gelu(self.linear_y(x), approximate="tanh")
        return self.linear_out(branch * y[..., 0])

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token; the state is (convolution cache, h)."""
        cache, h = (None, None) if state is None else state
        k, cache = short_convolution_step(
            self.linear_x(x_t), self.conv_1d.weight[:, 0], self.conv_1d.bias, cache)  # fmt: skip
        first = torch.full((1, 1), state is None, device=x_t.device)
        y, h = step(self.rg_lru(k[:, None], first), k[..., None], h)
        return self.readout(y, x_t), (cache, h)


LAYER = Rglru
