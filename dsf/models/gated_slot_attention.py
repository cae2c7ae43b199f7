"""Gated slot attention: a decaying memory of slots, read by a softmax over the slots."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._heads import check_query_key, share_groups, split_heads
from dsf.models._projections import HeadedMixer
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.shapes import Float
from dsf.transitions import Diagonal

SYSTEM = "gated_slot_attention"


def slot_memory(
    log_decay: Float[Tensor, "#batch #time #head slot"],
    write: Float[Tensor, "batch time #head slot"] | None = None,
    initial_state: Float[Tensor, "#batch #head slot width"] | None = None,
) -> Recurrence:
    """H_t = diag(exp(g_t)) H_{t-1} + s_t x_t^T: what each slot holds of x, all slots put out.

    write s is 1 - exp(g) unless given. Values (batch, time, head, width), output (batch, time,
    head, slot, width).
    """
    write = -torch.expm1(log_decay) if write is None else write
    every = torch.eye(log_decay.shape[-1], dtype=write.dtype, device=write.device)
    return Recurrence(
        Diagonal(log_decay), write[..., None], every[None, None, None],
        initial_state=initial_state, system=SYSTEM,
    )  # fmt: skip


def bounded_memory_log_decay(
    slot_logit: Float[Tensor, "batch time head slot"],
) -> Float[Tensor, "batch time head slot"]:
    """log decays with which gated slot attention is ABC attention (bounded memory control).

    Each slot holds the mean of the keys and values so far with weights exp(s_j): its decay is
    z_{t-1}/z_t with z_t = sum_{j<=t} exp(s_j), and what it writes, exp(s_t)/z_t, is one minus
    that. Source: Peng et al. (2022), eq. 9.
    """
    log_sum = torch.logcumsumexp(slot_logit, dim=1)
    before = torch.cat([torch.full_like(log_sum[:, :1], -torch.inf), log_sum[:, :-1]], dim=1)
    return before - log_sum


def gated_slot_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    log_decay: Float[Tensor, "batch time group slot"],
    *,
    write: Float[Tensor, "batch time group slot"] | None = None,
    scale: float | None = None,
    initial_key_state: Float[Tensor, "batch group slot width"] | None = None,
    initial_state: Float[Tensor, "batch group slot channel"] | None = None,
) -> Recurrence:
    """Gated slot attention over values (batch, time, head, channel): two recurrences in a chain.

        K_t = diag(exp(g_t)) K_{t-1} + s_t k_t^T,   p_t = softmax over slots (scale K_t q_t)
        A_t = diag(exp(g_t)),   B_t = s_t,   C_t = p_t^T,   D = 0

    The first chain (`slot_memory`) has no value in it, so the second is exact and linear in v.
    write s is 1 - exp(g) unless given; scale is width^(-1/2) unless given; groups of keys, decays
    and states serve consecutive heads. Memory O(length slot width) while K is made; state: slot x
    (width + channel) a head. Raises DsfShapeError. Source: Zhang et al. (2024), eqs. 5-7.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    n_head = query.shape[2]
    memory = slot_memory(log_decay, write, initial_key_state)
    held = share_groups(scan(memory, key), n_head)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = (held @ query[..., None]).squeeze(-1)
    log_decay, B = (share_groups(x, n_head) for x in (log_decay, memory.dense_input_output()[0]))
    if initial_state is not None:
        initial_state = initial_state.repeat_interleave(n_head // initial_state.shape[1], dim=1)
    return Recurrence(
        Diagonal(log_decay), B, torch.softmax(logits, -1)[..., None, :],
        initial_state=initial_state, system=SYSTEM,
    )  # fmt: skip


class SlotState(NamedTuple):
    """What `step` keeps: key memory (batch, group, slot, width), value memory, past inputs."""

    key: Tensor
    value: Tensor
    inputs: Tensor


class GatedSlotAttention(HeadedMixer):
    """The GSA layer: SiLU on q, k, v, forget gates of slots, SiLU and RMS norm on the output.

        g_t = logsigmoid(W_f x_t) / temperature,   y_t = W_o RMSNorm(SiLU(o_t))

    The layer's scale is 1, as released. Cost O(length x n_slot x width), state 2 n_slot x width.
    Source: Zhang et al. (2024), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag αₜ, αₜ = σ(xₜW_f)^(1/8)", "B": "1 − αₜ", "C": "softmax(Kₜqₜ)ᵀ over slots",
        "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp, over slots"
    source: ClassVar[str] = "Zhang et al. (2024), arXiv 2409.07146, eqs. 5-7"

    def __init__(
        self, width: int, n_head: int = 4, *, n_slot: int = 64, temperature: float = 8.0,
        scale: float = 1.0, conv_size: int = 0, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, conv_size=conv_size, activation="silu", norm="all", norm_eps=norm_eps
        )
        self.temperature, self.scale = temperature, scale
        self.forget = nn.Linear(width, n_head * n_slot, bias=False)

    @classmethod
    def small(cls, width: int) -> GatedSlotAttention:
        """Four heads of eight slots."""
        return cls(width, 4, n_slot=8)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The second recurrence, with the first one's softmax in C, and the values."""
        q, k, v = self.project(x)
        return self._system(q, k, x), v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """SiLU, norm, output projection."""
        return super().readout(functional.silu(y), x)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, SlotState]:
        """One token through both memories."""
        x = x_t[:, None] if state is None else torch.cat([state.inputs, x_t[:, None]], dim=1)
        now = x[:, -1:]
        q, k, v = (part[:, -1:] for part in self.project(x))
        before = (None, None) if state is None else (state.key, state.value)
        memory = slot_memory(self._log_decay(now), None, before[0])
        _, keys = scan(memory, k, return_state=True)
        y, values = scan(self._system(q, k, now, *before), v, return_state=True)
        past = x[:, max(x.shape[1] - self.n_past, 0) :]
        return self.readout(y, now)[:, 0], SlotState(keys, values, past)

    def _log_decay(self, x: Tensor) -> Tensor:
        logits = split_heads(self.forget(x), self.n_head)
        return functional.logsigmoid(logits) / self.temperature

    def _system(
        self, q: Tensor, k: Tensor, x: Tensor, keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Recurrence:  # fmt: skip
        return gated_slot_attention_recurrence(
            q, k, self._log_decay(x), scale=self.scale, initial_key_state=keys,
            initial_state=values,
        )  # fmt: skip


LAYER = GatedSlotAttention
