"""MonarchAttention: softmax attention projected onto a product of two block-diagonal matrices."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.factors import OneHot, SoftmaxRows
from dsf.mixing_rows import block_rows
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.models._monarch_core import (
    Grid,
    MonarchRows,
    Tokens,
    block_summaries,
    check_mask,
    half_steps,
    left_logits,
    objective,
    right_update,
    softmax_parts,
)
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.shapes import Bool, Float
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional, System

SYSTEM = "monarch_attention"


def monarch_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    block: int | None = None,
    steps: int = 1,
    padding: str = "after",
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> System:
    """MonarchAttention over values (batch, time, head, channel), as rows read from a cache.

        A = I,  B_t = e_t,  C_t = row t of M,   M[(l, j), (k, i)] = L_jkl R_kji

    Tokens are pairs (block, place). L and R come from `steps` steps of alternating maximisation of
    <M, S> + entropy(M), see `half_steps`. block 1 and block >= time give softmax itself. padding:
    where the last or first block is filled up. key_mask: True for real tokens; a block without any
    takes no mass, a sequence without any gives zeros. There is no finite recurrence: half-block
    ranks are full.

    causal (one step only; not in the paper): softmax jointly over the in-block keys i <= j, exact,
    and past blocks, each spread by its R, which depends on that block alone. It is the lower
    triangle of the one-step M with rows renormalised. More steps would leak and are refused.
    Cost O(time x (block + n_block) x width). Raises DsfValueError, DsfShapeError. Source: Yaras et
    al. (2025), arXiv 2505.18698; causal form derived.
    """
    check_query_key("dsf.monarch_attention_recurrence", query, key)
    check_mask(key_mask, query)
    if steps < 1 or (causal and steps > 1):
        raise DsfValueError(
            f"dsf.monarch_attention_recurrence: steps: expected at least 1, and 1 if causal (more "
            f"would let later tokens in), got {steps}."
        )
    length = query.shape[1]
    grid = Grid.of(length, block, padding)
    tokens = Tokens.of(query, share_groups(key, query.shape[2]), key_mask, grid, scale)
    sizes: dict[str, Any] = {"n_row": length, "n_column": length, "first": grid.front,
                             "front": grid.front}  # fmt: skip
    if causal:
        rows = MonarchRows(*causal_parts(tokens), causal=True, **sizes)
    else:
        *_, factors = half_steps(tokens, steps)
        rows = MonarchRows(factors.left, factors.right, **sizes)
    r = Recurrence(
        Identity(length), OneHot(length, length), rows, system=SYSTEM, gauge="one state per token"
    )
    return r if causal else Bidirectional.from_rows(r)


def causal_parts(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """left (past blocks only), right and own (the row's block, exact) of the causal variant."""
    right, log_right = right_update(tokens, None)
    m, block = tokens.query.shape[2:4]
    past = left_logits(tokens, right, log_right)  # batch head j l k
    earlier = torch.ones(m, m, dtype=torch.bool, device=past.device).tril(-1)
    past = past.masked_fill(~earlier, -torch.inf)
    own = tokens.scale * tokens.query @ tokens.key.mT  # batch head l j i
    seen = torch.ones(block, block, dtype=torch.bool, device=past.device).tril()
    seen = seen & tokens.real[:, None, :, None, :]
    own = own.masked_fill(~seen, -torch.inf)
    weights, _ = softmax_parts(torch.cat([past.transpose(2, 3), own], -1))
    left, own = weights.split([m, block], -1)
    return left.permute(0, 1, 3, 4, 2), right, own


def monarch_divergence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    block: int | None = None,
    steps: int = 1,
    padding: str = "after",
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch head"]:
    """The loss of the projection: sum over real rows of KL(M_t || softmax_t), a certificate.

        sum_t KL = sum_t LSE_t - f(M),   f(M) = <M, S> + entropy(M)

    Without M; the row LSEs cost O(time^2 width), by blocks of rows. Source: derived.
    """
    check_query_key("dsf.monarch_divergence", query, key)
    check_mask(key_mask, query)
    grid = Grid.of(query.shape[1], block, padding)
    tokens = Tokens.of(query, share_groups(key, query.shape[2]), key_mask, grid, scale)
    *_, factors = half_steps(tokens, steps)
    rows = SoftmaxRows(query, key, key_mask=key_mask, scale=scale, causal=False)
    length, size = query.shape[1], block_rows(rows)
    parts = [torch.logsumexp(rows.logits(slice(t, t + size), slice(0, length)), -1)
             for t in range(0, length, size)]  # fmt: skip
    lse = torch.cat(parts, -1)
    if key_mask is not None:
        lse = lse.masked_fill(~key_mask[:, None], 0.0)
    return lse.sum(-1) - objective(tokens, factors)


def monarch_products(length: int, block: int, steps: int, width: int) -> int:
    """Multiply-accumulates of one head, N_pad d ((2 T + 1) b + 2 T m); softmax has 2 N^2 d."""
    m = -(-length // block)
    return m * block * width * ((2 * steps + 1) * block + 2 * steps * m)


def online_minus_entropy(logits: Float[Tensor, "*lead key"], chunk: int) -> Float[Tensor, "*lead"]:
    """sum r log r of r = softmax(logits), in one pass over chunks of keys, as a tile would.

    Running maximum mu, Z = sum e^(x-mu), E = sum e^(x-mu) (x - mu); the result is E/Z - log Z.
    """
    mu = torch.full_like(logits[..., 0], -torch.inf)
    Z, E = torch.zeros_like(mu), torch.zeros_like(mu)
    for part in logits.split(chunk, -1):
        new = torch.maximum(mu, part.amax(-1))
        old = torch.where(mu == -torch.inf, 0.0, mu - new)
        shrink = torch.where(mu == -torch.inf, 0.0, torch.exp(old))
        x = part - new[..., None]
        E = shrink * (E + Z * old) + (x.exp() * x).sum(-1)
        Z = shrink * Z + x.exp().sum(-1)
        mu = new
    return E / Z - Z.log()


class MonarchState(NamedTuple):
    """What `step` keeps: the block at hand, and one summary per past token.

    query, key, value (batch, head, place, width) of the unfinished block; means (batch, head,
    place, block, width), minus_entropy (batch, head, place, block), mixed (batch, head, place,
    block, channel) of the finished ones.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    means: Tensor
    minus_entropy: Tensor
    mixed: Tensor


class MonarchAttention(SequenceMixer):
    """Multi-head MonarchAttention, the encoder of the paper or the causal one-step variant.

    block None takes the power of two near the root of the length (not causal only: a stream needs
    one block size). Cost O(length x sqrt(length) x width). `step` keeps as much as a key-value
    cache but reads only the block at hand and one summary per past block. Source: Yaras et al.
    (2025).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ", "C": "row t of Pᵀ L̄ P R̄ (Monarch)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp, by blocks"
    source: ClassVar[str] = "Yaras et al. (2025), arXiv 2505.18698; causal form derived"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        block: int | None = None,
        steps: int = 1,
        padding: str = "after",
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("MonarchAttention", "n_head", n_head, "width", width)
        if causal and (block is None or padding != "after"):
            raise DsfValueError(
                "dsf.MonarchAttention: block, padding: expected a fixed block and padding 'after' "
                f"for causal=True, got {block} and {padding!r}."
            )
        self.n_head, self.is_causal = n_head, causal
        self.block, self.steps, self.padding = block, steps, padding
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    @classmethod
    def small(cls, width: int) -> MonarchAttention:
        """Four heads, causal, blocks of four."""
        return cls(width, 4, block=4, causal=True)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head: (batch, time, head, width)."""
        q, k, v = (split_heads(f(x), self.n_head) for f in (self.query, self.key, self.value))
        return q, k, v

    def recurrence(
        self, x: Tensor, *, key_mask: Tensor | None = None
    ) -> tuple[System, Tensor]:  # fmt: skip
        """The rows as a cache system, and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = monarch_attention_recurrence(
            q, k, block=self.block, steps=self.steps, padding=self.padding, key_mask=key_mask,
            causal=self.is_causal,
        )  # fmt: skip
        return system, v

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """(batch, time, width). key_mask (batch, time) is True for real tokens."""
        return self.readout(scan(*self.recurrence(x, key_mask=key_mask)), x)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, MonarchState]:
        """One token of the causal variant: its own block and the summaries of earlier ones."""
        if not self.is_causal:
            raise DsfUnsupportedError(
                "dsf.MonarchAttention.step: causal: expected True, got False: every row of the "
                "encoder depends on all tokens."
            )
        x = x_t[:, None]
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        past = state or self._start(q, v)
        keys, values = torch.cat([past.key, k], 2), torch.cat([past.value, v], 2)
        queries, j = torch.cat([past.query, q], 2), past.key.shape[2]
        own = q.shape[-1] ** -0.5 * q @ keys.mT
        means, mixed = past.means[:, :, j], past.mixed[:, :, j]
        earlier = q @ means.mT - past.minus_entropy[:, :, j, None]
        weights = torch.softmax(torch.cat([earlier, own], -1), -1)
        y = weights @ torch.cat([mixed, values], 2)
        new = past._replace(query=queries, key=keys, value=values)
        new = self._closed(new) if j + 1 == self.block else new
        return self.readout(y.transpose(1, 2), x)[:, 0], new

    def _start(self, q: Tensor, v: Tensor) -> MonarchState:
        batch, head, _, width = q.shape
        lead = (batch, head, self.block or 1, 0)
        return MonarchState(
            q[:, :, :0], q[:, :, :0], v[:, :, :0], q.new_zeros(*lead, width), q.new_zeros(*lead),
            v.new_zeros(*lead, v.shape[-1]),
        )  # fmt: skip

    def _closed(self, s: MonarchState) -> MonarchState:
        """The block at hand is full: summarise it for every place and start the next."""
        real = torch.ones(s.key.shape[0], 1, s.key.shape[2], dtype=torch.bool, device=s.key.device)
        tokens = Tokens(s.query[:, :, None], s.key[:, :, None], real, s.query.shape[-1] ** -0.5)
        right, log_right = right_update(tokens, None)
        means, entropy = block_summaries(tokens, right, log_right)
        mixed = right @ s.value[:, :, None]
        return MonarchState(
            s.query[:, :, :0], s.key[:, :, :0], s.value[:, :, :0],
            torch.cat([s.means, means.transpose(2, 3)], 3),
            torch.cat([s.minus_entropy, entropy.mT], 3),
            torch.cat([s.mixed, mixed.transpose(2, 3)], 3),
        )  # fmt: skip


LAYER = MonarchAttention
