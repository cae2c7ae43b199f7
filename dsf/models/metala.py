"""MetaLA: no key; what a row forgets is what it writes."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models._heads import check_divides, merge_heads, split_heads
from dsf.models._mixer import SequenceMixer
from dsf.scanning import scan
from dsf.shapes import Bool, Float
from dsf.short_convolution import short_convolution
from dsf.wrappers import Bidirectional, System, anticausal

SYSTEM = "metala"
CONVENTIONS = ("code", "paper")


def metala_recurrence(
    query: Float[Tensor, "batch time head state"],
    log_decay: Float[Tensor, "batch time #head state"],
    *,
    scale: float = 1.0,
    causal: bool = True,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> System:
    """MetaLA's core over values (batch, time, head, channel).

        A_t = diag(alpha_t),   B_t = (1 - alpha_t)^T,   C_t = scale q_t,   D = 0

    log_decay = log alpha <= 0 (-inf is an exact overwrite); 1 - alpha is -expm1(log alpha). The
    released code scales by state^(-1/2), the paper does not. Row sums of the map are
    sum_c q_c (1 - prod alpha_c): what is missing sits on the zero initial state. Not causal: plus
    the same backwards without the token itself, M_tj = C_t A_t ... A_(j-1) B_j for j > t, which
    mirrors the causal half (the paper has such layers for some tasks without saying how: derived).
    State: state x channel a head and direction. Raises DsfValueError on an initial state that is
    not causal. Source: Chou et al. (2024), eqs. 13, 14, A31-A37.
    """
    if not causal and initial_state is not None:
        raise DsfValueError(
            f"dsf.{SYSTEM}_recurrence: initial_state: expected None for causal=False, got a "
            f"tensor."
        )
    write = -torch.expm1(log_decay)  # the key of HGRN2 and of every key-free gated layer
    r = gated_linear_recurrence(SYSTEM, query, write, log_decay, scale, initial_state)
    return r if causal else Bidirectional(r, anticausal(r, strict=True))


class _Parts(NamedTuple):
    """Everything made from the input, heads split: (batch, time, head, width)."""

    query: Tensor
    log_decay: Tensor
    value: Tensor
    gate: Tensor


class MetaLAState(NamedTuple):
    """What `step` keeps: the last inputs of the convolution and the memory.

    convolution (batch, conv_size - 1, width), memory (batch, head, state, channel).
    """

    convolution: Tensor
    memory: Tensor


class MetaLA(SequenceMixer):
    """The MetaLA layer, as released ("code") or as printed ("paper").

        x' = conv(x);  q = x' W_q,  alpha = sigmoid(x' W_a)^(1/temperature),  v = x' W_v
        o_t = q_t h_t + sigmoid((q_t (w ⊙ (1 - alpha_t))^T) v_t)
        y = (SiLU(x' W_g + b) ⊙ LN(o)) W_o

    The self-augmentation (the sigmoid term) is nonlinear in v: it is no part of the recurrence or
    its map and is added in `readout`, before the norm. Conventions: code has SiLU after the
    convolution, state^(-1/2) on q_t h_t (not on the augmentation) and one LayerNorm a head; paper
    has neither SiLU nor scale and one LayerNorm over all heads. conv_size 0 leaves the convolution
    out; it stays causal where the scan, with causal=False, looks both ways. Parameter names are
    those of the release. Cost O(length x key_width x width / n_head), state key_width x width /
    n_head a layer. Source: Chou et al. (2024), eqs. A31-A37.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag(αₜ), αₜ = σ(xₜW_α)^(1/16)", "B": "1 − αₜ", "C": "qₜ   (/√N as released)",
        "D": "0   (σ-augmentation in the readout)",
    }  # fmt: skip
    source: ClassVar[str] = "Chou et al. (2024), eqs. 13-15, A31-A37"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        key_width: int | None = None,
        conv_size: int = 4,
        temperature: float = 16.0,
        convention: str = "code",
        causal: bool = True,
        self_augmentation: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise DsfValueError(
                f"dsf.MetaLA: convention: expected one of {CONVENTIONS}, got {convention!r}."
            )
        key_width = width // 2 if key_width is None else key_width
        check_divides("MetaLA", "n_head", n_head, "width", width)
        check_divides("MetaLA", "n_head", n_head, "key_width", key_width)
        self.n_head, self.temperature, self.norm_eps = n_head, temperature, norm_eps
        self.convention, self.conv_size, self.is_causal = convention, conv_size, causal
        self.scale = (key_width // n_head) ** -0.5 if convention == "code" else 1.0
        self.conv1d = nn.Conv1d(
            width, width, conv_size, groups=width, padding=conv_size - 1, bias=False
        ) if conv_size else None  # fmt: skip
        self.q_proj = nn.Linear(width, key_width, bias=False)
        self.k_gate = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.aug_balance = nn.Parameter(torch.zeros(key_width)) if self_augmentation else None

    def recurrence(
        self, x: Tensor, *, key_mask: Bool[Tensor, "batch time"] | None = None
    ) -> tuple[System, Tensor]:
        """The core and its values. A masked token has the value 0 but still decays the state."""
        parts = self._parts(self._convolved(x, key_mask), key_mask)
        return self._core(parts), parts.value

    def readout(
        self, y: Tensor, x: Tensor, *, key_mask: Bool[Tensor, "batch time"] | None = None
    ) -> Tensor:
        """Self-augmentation, norm, gate and output projection."""
        return self._finish(y, self._parts(self._convolved(x, key_mask), key_mask))

    def forward(self, x: Tensor, *, key_mask: Bool[Tensor, "batch time"] | None = None) -> Tensor:
        """(batch, time, width). key_mask (batch, time) is True for real tokens."""
        parts = self._parts(self._convolved(x, key_mask), key_mask)
        return self._finish(scan(self._core(parts), parts.value), parts)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, MetaLAState]:
        """One token, with the last conv_size - 1 inputs and the memory as state.

        Raises DsfUnsupportedError for a layer that looks ahead.
        """
        if not self.is_causal:
            raise DsfUnsupportedError(
                "dsf.MetaLA.step: causal: expected a causal layer, got causal=False."
            )
        x = x_t[:, None]
        past = x.new_zeros(x.shape[0], max(self.conv_size - 1, 0), x.shape[2])
        recent = torch.cat([past if state is None else state.convolution, x], dim=1)
        parts = self._parts(self._convolved(recent)[:, -1:])
        core = self._core(parts, None if state is None else state.memory)
        y, memory = scan(core, parts.value, return_state=True)
        return self._finish(y, parts)[:, 0], MetaLAState(recent[:, 1:], memory)

    def _convolved(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        if key_mask is not None:
            x = x * key_mask[..., None].to(x.dtype)
        if self.conv1d is None:
            return x
        x = short_convolution(x, self.conv1d.weight[:, 0])
        return nn.functional.silu(x) if self.convention == "code" else x

    def _parts(self, x: Tensor, key_mask: Tensor | None = None) -> _Parts:
        value = self.v_proj(x)
        if key_mask is not None:
            value = value * key_mask[..., None].to(x.dtype)
        log_decay = nn.functional.logsigmoid(self.k_gate(x)) / self.temperature
        heads = [split_heads(p, self.n_head) for p in (self.q_proj(x), log_decay, value)]
        return _Parts(*heads, gate=nn.functional.silu(self.g_proj(x)))

    def _core(self, parts: _Parts, memory: Tensor | None = None) -> System:
        return metala_recurrence(
            parts.query, parts.log_decay, scale=self.scale, causal=self.is_causal,
            initial_state=memory,
        )  # fmt: skip

    def _finish(self, y: Tensor, parts: _Parts) -> Tensor:
        if self.aug_balance is not None:
            balance = self.aug_balance.unflatten(0, (self.n_head, -1))
            own = (parts.query * -torch.expm1(parts.log_decay) * balance).sum(-1, keepdim=True)
            y = y + torch.sigmoid(own * parts.value)
        if self.convention == "code":
            y = merge_heads(nn.functional.layer_norm(y, y.shape[-1:], eps=self.norm_eps))
        else:
            y = merge_heads(y)
            y = nn.functional.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        return self.out_proj(parts.gate * y)


LAYER = MetaLA
