"""What the released layers with heads are made of: projections, gates, norms, one base class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.errors import DsfValueError
from dsf.models._heads import check_divides, merge_heads, share_groups, split_heads
from dsf.models._windowed import WindowedMixer
from dsf.short_convolution import short_convolution

ACTIVATIONS = {
    "silu": functional.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu,
}  # fmt: skip
UNIT_EPS = 1e-6
NORMS = ("head", "all", "group", None)


def unit(x: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """x / sqrt(|x|^2 + eps) along the last axis: the released layers' L2 norm."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class ConvolvedLinear(nn.Module):
    """W x, then a causal depthwise convolution (conv_size 0: none), then an activation."""

    def __init__(
        self, width: int, out: int, conv_size: int = 0, activation: str | None = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=False)
        self.conv = nn.Conv1d(out, out, conv_size, groups=out, bias=False) if conv_size else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, out)."""
        y = self.linear(x)
        if self.conv is not None:
            y = short_convolution(y, self.conv.weight[:, 0])
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


class LowRank(nn.Module):
    """W_2 f(W_1 x) + b: the small projections of gates and decays."""

    def __init__(
        self, width: int, out: int, rank: int, *, activation: str | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        low = self.down(x)
        return self.up(low if self.activation is None else ACTIVATIONS[self.activation](low))


class HeadNorm(nn.Module):
    """One group of a group norm a head, token by token, heads merged."""

    def __init__(self, inner: int, n_head: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(n_head, inner, eps=eps)

    def forward(self, y: Tensor) -> Tensor:
        """(batch, time, head, channel) -> (batch, time, head x channel)."""
        return self.norm(merge_heads(y).flatten(0, 1)).unflatten(0, y.shape[:2])


class GatedRmsNorm(nn.Module):
    """RMS norm of y SiLU(z) in groups of channels, or of y alone with the gate after it."""

    def __init__(
        self, width: int, *, n_group: int = 1, eps: float = 1e-5, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_group, self.eps, self.norm_before_gate = n_group, eps, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., width)."""
        y = y if self.norm_before_gate else y * functional.silu(z)
        grouped = y.unflatten(-1, (self.n_group, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        y = (grouped * scale).flatten(-2) * self.weight
        return y * functional.silu(z) if self.norm_before_gate else y


class GatedOutput(nn.Module):
    """W_o (norm(y) * gate(x)): y (batch, time, head, channel) -> (batch, time, width).

    norm: "head" (RMS over the channels of a head, one weight for all heads), "all" (RMS over every
    channel), "group" (`HeadNorm`), None. gate: an activation of a projection of x, or None;
    gate_rank makes the projection low rank.
    """

    def __init__(
        self, width: int, inner: int, n_head: int, *, norm: str | None = "head",
        gate: str | None = "silu", gate_rank: int | None = None, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in NORMS:
            raise DsfValueError(f"dsf.models: norm: expected one of {NORMS}, got {norm!r}.")
        self.by_head, self.activation = norm in ("head", "group"), gate
        self.norm: nn.Module | None = None
        if norm == "group":
            self.norm = HeadNorm(inner, n_head, eps)
        elif norm is not None:
            self.norm = nn.RMSNorm(inner // n_head if self.by_head else inner, eps=eps)
        self.gate: nn.Module | None = None
        if gate is not None:
            self.gate = nn.Linear(width, inner, bias=False)
            if gate_rank is not None:
                self.gate = LowRank(width, inner, gate_rank)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Norm first, gate after."""
        if self.norm is not None and self.by_head:
            y = self.norm(y)
        y = merge_heads(y) if y.ndim == 4 else y
        if self.norm is not None and not self.by_head:
            y = self.norm(y)
        if self.gate is not None and self.activation is not None:
            y = y * ACTIVATIONS[self.activation](self.gate(x))
        return self.out(y)


class HeadedMixer(WindowedMixer):
    """Query, key and value by head, the core of a subclass, norm, gate and output projection.

    n_group key heads are shared by n_head value heads (consecutive ones); key_width and
    value_width are totals over n_group and n_head, for each of n_write keys and values a token.
    conv_size and activation are those of all three `ConvolvedLinear`, the rest `GatedOutput`'s.
    """

    def __init__(
        self, width: int, n_head: int, *, n_group: int | None = None, key_width: int | None = None,
        value_width: int | None = None, conv_size: int = 0, activation: str | None = None,
        n_write: int = 1, norm: str | None = "head", gate: str | None = None,
        gate_rank: int | None = None, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        value_width = width if value_width is None else value_width
        self.n_head, self.n_group = n_head, n_head if n_group is None else n_group
        key_width = width * self.n_group // n_head if key_width is None else key_width
        check_divides(name, "n_group", self.n_group, "n_head", n_head)
        check_divides(name, "n_group", self.n_group, "key_width", key_width)
        check_divides(name, "n_head", n_head, "value_width", value_width)
        self.key_width, self.value_width = key_width, value_width
        self.n_past = max(conv_size - 1, 0)
        self.query, self.key, self.value = (
            ConvolvedLinear(width, size, conv_size, activation)
            for size in (key_width, n_write * key_width, n_write * value_width)
        )
        self.output = GatedOutput(
            width, value_width, n_head, norm=norm, gate=gate, gate_rank=gate_rank, eps=norm_eps
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key (batch, time, head, state), groups repeated; value (..., channel)."""
        q, k = (share_groups(split_heads(part(x), self.n_group), self.n_head)
                for part in (self.query, self.key))  # fmt: skip
        return q, k, split_heads(self.value(x), self.n_head)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Norm, gate, output projection."""
        return self.output(y, x)
