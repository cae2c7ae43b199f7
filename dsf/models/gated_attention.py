"""Gated softmax attention: a gate at one of five places, none of which is a forget gate."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfValueError
from dsf.factors import OneHot, SoftmaxRows
from dsf.models._gates import Activation, GatedRows, activation_of, gate_scores
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate
from dsf.scanning import scan
from dsf.shapes import Bool, Float
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional, System, gated

SYSTEM = "gated_attention"
POSITIONS = (None, "output", "value", "key", "query", "dense")
"""G1 to G5 of the paper, in this order; None is the ungated layer."""
NONLINEARITIES = (None, "rms_norm", "silu")


def gated_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    output_gate: Float[Tensor, "#batch time #head _channel"] | None = None,
    value_gate: Float[Tensor, "batch time _head _channel"] | None = None,
    key_gate: Float[Tensor, "batch time _group _width"] | None = None,
    query_gate: Float[Tensor, "batch time _head _width"] | None = None,
    causal: bool = True,
    bias: Float[Tensor, "#batch #head #time #time"] | None = None,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> System:
    """Softmax attention with multiplicative gates, as a cache system: A = I whatever is gated.

        output (G1)  C_t <- g_t C_t          weight g_t a_tj, per channel if g has channels
        value  (G2)  B_j <- g_j B_j          weight a_tj g_j
        key    (G3)  k_j <- g_j k_j          inside the softmax, rows still sum to one
        query  (G4)  q_t <- g_t q_t          likewise

    Gates are numbers (batch, time, head or group or 1, channel or 1). Values (batch, time, head,
    channel); an elementwise value gate (channel > 1) makes a map per channel: every channel is a
    head there and the values are (batch, time, head x channel, 1), see `channel_heads`. G5 and
    additive gates act outside the map. Raises DsfShapeError when groups do not divide heads.
    Source: Qiu et al. (2025), arXiv 2505.06708, section 2.2.
    """
    check_query_key("dsf.gated_attention_recurrence", query, key)
    query = query if query_gate is None else query * query_gate
    key = key if key_gate is None else key * key_gate
    head, length = query.shape[2], query.shape[1]
    channel = 1 if value_gate is None else value_gate.shape[-1]
    if channel > 1:
        query = query.repeat_interleave(channel, 2)
        key = share_groups(key, head).repeat_interleave(channel, 2)
        bias = bias if bias is None or bias.shape[1] == 1 else bias.repeat_interleave(channel, 1)
    rows: Any = SoftmaxRows(query, key, bias, key_mask, scale=scale, causal=causal)
    row_gate = None
    if output_gate is not None:
        output_gate = output_gate.expand(-1, -1, head, -1)
        if channel > 1:
            output_gate = output_gate.expand(-1, -1, -1, channel).flatten(2)[..., None]
        if output_gate.shape[-1] == 1:
            row_gate, output_gate = output_gate[..., 0], None
    if row_gate is not None or value_gate is not None:
        full = None if value_gate is None else value_gate.expand(-1, -1, head, -1).flatten(2)
        rows = GatedRows(rows, row_gate, full)
    r = Recurrence(
        Identity(length), OneHot(length, length), rows, system=SYSTEM, gauge="one state per token"
    )
    system: System = r if causal else Bidirectional.from_rows(r)
    return system if output_gate is None else gated(output_gate, system)


def channel_heads(
    values: Float[Tensor, "batch time head channel"],
) -> Float[Tensor, "batch time _heads 1"]:
    """Every channel a head, in the order (head, channel)."""
    return values.flatten(2)[..., None]


class GatedCache(NamedTuple):
    """What `step` keeps: gated keys and values (batch, key, group, width), tokens seen."""

    key: Tensor
    value: Tensor
    position: int


class GatedAttention(SequenceMixer):
    """Softmax attention with a gate made from the layer's input, at one of five places.

        Y' = Y * act(X W)   or, additive,   Y' = Y + act(X W)

    position: output (after mixing, the recommended one), value, key, query (after their
    projection and norm, before rotation), dense (after the output projection), None. granularity:
    elementwise or headwise (one number a head). shared averages over heads the logits or the
    scores. input_dependent=False takes learned logits, 0 at the start. nonlinearity on the mixed
    values of a head (rms_norm, silu) is not linear in them: it is part of `readout`. qk_norm is
    an RMSNorm of the heads' queries and keys; rotary_width rotates the first coordinates only.
    Cost and cache as softmax attention. Source: Qiu et al. (2025), section 2.2.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ   (G2: gₜ eₜ)",
        "C": "gₜ softmaxⱼ(qₜ·kⱼ/√d)   (G3, G4: gates inside)", "D": "0   (additive: from x)",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Qiu et al. (2025), arXiv 2505.06708, section 2.2"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        position: str | None = "output",
        granularity: str = "elementwise",
        shared: str | None = None,
        additive: bool = False,
        activation: str | Activation = "sigmoid",
        input_dependent: bool = True,
        nonlinearity: str | None = None,
        n_group: int | None = None,
        head_width: int | None = None,
        causal: bool = True,
        rope_base: float | None = 10000.0,
        rotary_width: int | None = None,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        n_group = n_head if n_group is None else n_group
        check_divides("GatedAttention", "n_group", n_group, "n_head", n_head)
        if head_width is None:
            check_divides("GatedAttention", "n_head", n_head, "width", width)
            head_width = width // n_head
        for name, value, known in [
            ("position", position, POSITIONS), ("nonlinearity", nonlinearity, NONLINEARITIES),
            ("granularity", granularity, ("elementwise", "headwise")),
        ]:  # fmt: skip
            if value not in known:
                raise DsfValueError(
                    f"dsf.GatedAttention: {name}: expected one of {list(known)}, got {value!r}."
                )
        self.n_head, self.n_group, self.head_width = n_head, n_group, head_width
        self.position, self.shared, self.additive = position, shared, additive
        self.activation, self.nonlinearity = activation_of(activation), nonlinearity
        self.is_causal, self.rope_base = causal, rope_base
        self.rotary_width = head_width if rotary_width is None else rotary_width
        self.q_proj = nn.Linear(width, n_head * head_width, bias=bias)
        self.k_proj = nn.Linear(width, n_group * head_width, bias=bias)
        self.v_proj = nn.Linear(width, n_group * head_width, bias=bias)
        self.o_proj = nn.Linear(n_head * head_width, width, bias=bias)
        self.q_norm = nn.RMSNorm(head_width, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_width, eps=norm_eps) if qk_norm else None
        self.gate_heads = {"output": n_head, "query": n_head, "dense": 1}.get(
            str(position), n_group)  # fmt: skip
        one = width if position == "dense" else head_width
        size = self.gate_heads * (one if granularity == "elementwise" else 1)
        learned = position is not None and input_dependent
        self.gate_proj = nn.Linear(width, size, bias=bias) if learned else None
        fixed = position is not None and not input_dependent
        self.gate_logits = nn.Parameter(torch.zeros(size)) if fixed else None

    @classmethod
    def small(cls, width: int) -> GatedAttention:
        """Four heads, rotary positions where the width of a head is even."""
        return cls(width, 4, rope_base=10000.0 if width // 4 % 2 == 0 else None)

    def scores(self, x: Tensor) -> Tensor | None:
        """The gate's numbers, (batch, time, head or group or 1, width or 1)."""
        if self.position is None:
            return None
        if self.gate_proj is not None:
            logits = self.gate_proj(x)
        else:
            assert self.gate_logits is not None
            logits = self.gate_logits.expand(*x.shape[:2], -1)
        logits = split_heads(logits, self.gate_heads)
        return gate_scores(logits, self.activation, self.shared)

    def project(
        self, x: Tensor, *, start: int = 0, rotation: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head and group; gated unless the system has the gate."""
        q = split_heads(self.q_proj(x), self.n_head)
        k = split_heads(self.k_proj(x), self.n_group)
        v = split_heads(self.v_proj(x), self.n_group)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position == "query":
            q = self._applied(q, x)
        elif self.position == "key":
            k = self._applied(k, x)
        elif self.position == "value" and self.additive:
            v = self._applied(v, x)
        if rotation is None and self.rope_base is not None:
            rotation = rotary_tables(
                x.shape[1], self.rotary_width, base=self.rope_base, start=start, dtype=x.dtype,
                device=x.device,
            )  # fmt: skip
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def recurrence(
        self, x: Tensor, *, key_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[System, Tensor]:  # fmt: skip
        """The gated cache system and the values; per channel for an elementwise value gate."""
        q, k, v = self.project(x, rotation=rotation)
        gates: dict[str, Any] = {}
        v = share_groups(v, self.n_head)
        if self.position in ("output", "value") and not self.additive:
            score = self.scores(x)
            assert score is not None
            if self.position == "value" and score.shape[2] == self.n_group:
                score = share_groups(score, self.n_head)
            gates[f"{self.position}_gate"] = score
            v = channel_heads(v) if self.position == "value" and score.shape[-1] > 1 else v
        system = gated_attention_recurrence(
            q, k, causal=self.is_causal, key_mask=key_mask, **gates
        )  # fmt: skip
        return system, v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Additive gate, nonlinearity, heads merged, output projection, dense gate."""
        y = y if y.shape[2] == self.n_head else split_heads(y[..., 0], self.n_head)
        if self.position == "output" and self.additive:
            y = self._applied(y, x)
        if self.nonlinearity == "rms_norm":
            y = nn.functional.rms_norm(y, y.shape[-1:], eps=1e-6)
        elif self.nonlinearity == "silu":
            y = nn.functional.silu(y)
        out = self.o_proj(merge_heads(y))
        return self._applied(out[:, :, None], x)[:, :, 0] if self.position == "dense" else out

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """(batch, time, width): gated values, attention, gated outputs. key_mask: real keys."""
        q, k, v = self.project(x, rotation=rotation)
        multiplied = not self.additive
        v = self._applied(v, x) if self.position == "value" and multiplied else v
        plain = gated_attention_recurrence(q, k, causal=self.is_causal, key_mask=key_mask)
        y = scan(plain, share_groups(v, self.n_head))
        y = self._applied(y, x) if self.position == "output" and multiplied else y
        return self.readout(y, x)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, GatedCache]:
        """One token against the cache of gated keys and values."""
        x = x_t[:, None]
        position = 0 if state is None else state.position
        q, k, v = self.project(x, start=position)
        multiplied = not self.additive
        v = self._applied(v, x) if self.position == "value" and multiplied else v
        if state is not None:
            k, v = torch.cat([state.key, k], 1), torch.cat([state.value, v], 1)
        rows = SoftmaxRows(q, k, query_start=position)
        y = rows.mix(share_groups(v, self.n_head).transpose(1, 2)).transpose(1, 2)
        y = self._applied(y, x) if self.position == "output" and multiplied else y
        return self.readout(y, x)[:, 0], GatedCache(k, v, position + 1)

    def _applied(self, y: Tensor, x: Tensor) -> Tensor:
        score = self.scores(x)
        assert score is not None
        return y + score if self.additive else y * score


LAYER = GatedAttention
