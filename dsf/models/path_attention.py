"""PaTH attention: softmax attention whose keys are reflected by every token that follows them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.coefficient_forms import cache_form, refuse_beyond_scores, scales, shared_keys
from dsf.coefficients import CoefficientDynamics
from dsf.errors import DsfShapeError
from dsf.factors import SoftmaxRows
from dsf.mixing_rows import MixingRows
from dsf.models._cached import CachedMixer, cache_recurrence
from dsf.models._fading import faded, fading
from dsf.models._heads import (
    check_at_least,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._projections import ConvolvedLinear, unit
from dsf.recurrence import Recurrence
from dsf.shapes import Bool, Float, Inexact
from dsf.transitions import DiagonalLowRank, Householder, Transition
from dsf.transitions._base import register, static

SYSTEM = "path_attention"
CHUNK = 32
"""Keys whose reflections are applied at once: length/CHUNK products a tile."""


@register
@dataclasses.dataclass(frozen=True)
class PathRows(MixingRows):
    """Rows of softmax attention with a product of reflections between query and key.

        z_tj = scale q_t.H_t H_(t-1) ... H_(j+1) k_j + sum_{j < i <= t} log f_i,
        H_i = I - beta_i w_i w_i^T

    query (batch, time, head, width); key and direction w (batch, key, group, width),
    write_strength beta (batch, key, group), log_decay = log f (batch, key, head) or None. A tile
    costs O(rows x key x (width + chunk)); keys are taken chunk by chunk, from the last to the
    first, with the products of a chunk in the WY form, so nothing is divided by. Memory O(rows x
    key). Query row r stands at position query_start + r. Tokens where key_mask (batch, key) is
    False are not read and read nothing: their rows are zero.
    """

    query: Tensor
    key: Tensor
    direction: Tensor
    write_strength: Tensor
    log_decay: Tensor | None = None
    key_mask: Tensor | None = None
    scale: float | None = static(default=None)
    query_start: int = static(default=0)
    causal: ClassVar[bool] = True

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        batch = max(self.query.shape[0], self.key.shape[0])
        return torch.Size((batch, *self.query.shape[1:3], 1, self.key.shape[1]))

    def logits(self, queries: slice) -> Inexact[Tensor, "batch head query key"]:
        """z of some rows over all keys, -inf where a key comes after the query."""
        rows = range(*queries.indices(self.query.shape[1]))
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        head = self.query.shape[2]
        q = self.query[:, rows.start : rows.stop].transpose(1, 2).to(dtype)
        k, w = (share_groups(x, head).transpose(1, 2).to(dtype)
                for x in (self.key, self.direction))  # fmt: skip
        beta = share_groups(self.write_strength[..., None], head).transpose(1, 2).to(dtype)
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + self.query_start
        tiles = []
        for start in range((max(self.n_key, 1) - 1) // CHUNK * CHUNK, -1, -CHUNK):
            cut = slice(start, min(start + CHUNK, self.n_key))
            position = torch.arange(cut.start, cut.stop, device=q.device)
            tile, q = _reflected(q, k[:, :, cut], w[:, :, cut], beta[:, :, cut], position <= at)
            tiles.insert(0, tile)
        z = torch.cat(tiles, -1) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.log_decay is not None:
            first = self.query_start
            own = slice(first + rows.start, first + rows.stop)
            z = z + fading(self.log_decay, own).to(dtype)
        if self.key_mask is not None:
            z = z.masked_fill(~self.key_mask[:, None, None], -torch.inf)
        return z.masked_fill(torch.arange(self.n_key, device=q.device) > at, -torch.inf)

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """Softmax over all keys of the asked rows, then the asked columns."""
        z = self.logits(queries)
        if self.key_mask is None:
            return torch.softmax(z, dim=-1)[..., keys]
        rows = range(*queries.indices(self.query.shape[1]))
        own = slice(self.query_start + rows.start, self.query_start + rows.stop)
        silent = ~self.key_mask[:, None, own, None]
        return torch.softmax(z.masked_fill(silent, 0.0), -1).masked_fill(silent, 0.0)[..., keys]

    def time_slice(self, start: int, stop: int) -> PathRows:
        """The rows of steps start..stop-1 over the same keys."""
        return dataclasses.replace(
            self, query=self.query[:, start:stop], query_start=self.query_start + start
        )

    def shape_faults(self) -> list[str]:
        """Those of the logits, and reflections and gates that fit keys and heads."""
        faults = SoftmaxRows(self.query, self.key).shape_faults()
        if faults:
            return faults
        batch, key, group, width = self.key.shape
        sizes = [("direction", self.direction, (batch, key, group, width)),
                 ("write_strength", self.write_strength, (batch, key, group))]  # fmt: skip
        if self.log_decay is not None:
            sizes.append(("log_decay", self.log_decay, (batch, key, self.query.shape[2])))
        if self.key_mask is not None:
            sizes.append(("key_mask", self.key_mask, (batch, key)))
        return [
            f"C.{name}: expected shape {wanted}, got {tuple(x.shape)}; query and key fix it."
            for name, x, wanted in sizes if tuple(x.shape) != wanted
        ]  # fmt: skip


def _reflected(
    q: Tensor, k: Tensor, w: Tensor, beta: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """q_t.H_t ... H_(j+1) k_j for the keys j of one chunk, and q_t.H_t ... H_first.

    q is already multiplied by the reflections after the chunk; seen (query, key) is where key <=
    query. With T = (I + strict lower part of beta w.w)^(-1) the product of steps b < ... <= a is
    I - sum w_a T_ab beta_b w_b^T. Source: Yang et al. (2025), section 3.
    """
    size, width = w.shape[-2:]
    eye = torch.eye(size, dtype=w.dtype, device=w.device)
    right = torch.cat([beta * w, (beta * (w @ k.mT)).tril(-1)], -1)
    solved = torch.linalg.solve_triangular(
        (beta * w @ w.mT).tril(-1) + eye, right, upper=False, unitriangular=True
    )
    read = (q @ w.mT).masked_fill(~seen, 0.0)
    return q @ k.mT - read @ solved[..., width:], q - read @ solved[..., :width]


@cache_form.register
def path_form(rows: PathRows) -> CoefficientDynamics:
    """A_t = I - beta_t w_t w_t^T, b = scale, phi = exp, eta its sum; gates take n + 2 coordinates.

    Raises DsfUnsupportedError on a part of the rows, DsfValueError on a gate of zero.
    """
    scores = SoftmaxRows(rows.query, rows.key, key_mask=rows.key_mask, scale=rows.scale,
                         query_start=rows.query_start)  # fmt: skip
    refuse_beyond_scores(scores)
    query, key, b = rows.query, shared_keys(scores), scales(scores)
    w, beta = (
        share_groups(x, query.shape[2]) for x in (rows.direction, rows.write_strength[..., None])
    )
    A: Transition = Householder(beta[..., 0], w)
    if rows.log_decay is not None:
        query, key, left, right = faded(query, key, b, rows.log_decay)
        w, b = functional.pad(w, (0, 2))[..., None], torch.ones_like(b)
        A = DiagonalLowRank(
            torch.zeros_like(query), left=torch.cat([beta[..., None] * w, left], -1),
            right=torch.cat([w, right], -1),
        )  # fmt: skip
    return CoefficientDynamics(A, b, key, query, readout="exp", sums_to_one=True)


def path_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    direction: Float[Tensor, "batch time group width"],
    write_strength: Float[Tensor, "batch time group"],
    *,
    log_decay: Float[Tensor, "batch time head"] | None = None,
    key_mask: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> Recurrence:
    """PaTH attention over values (batch, time, head, channel), one state per token.

        A = I,   B_t = e_t,   C_t = softmax_j(scale q_t.H_t ... H_(j+1) k_j),   D = 0
        H_i = I - beta_i w_i w_i^T

    direction w is to have length one, write_strength beta in (0, 2). log_decay = log f <= 0 adds
    sum_{j < i <= t} log f_i to the logit (PaTH-FoX); the released reference multiplies that sum by
    scale as well: pass scale x log f for its numbers. scale is width^(-1/2) unless given. Groups
    of keys serve consecutive heads. Tokens that key_mask hides are not read and read nothing
    (that they reflect nothing is for write_strength to say). Cost O(length^2 (width + chunk)),
    memory O(length width) and a block of rows. Raises DsfShapeError. Source: Yang et al. (2025),
    arXiv 2505.16381, section 3.
    """
    check_query_key(f"dsf.{SYSTEM}_recurrence", query, key)
    rows = PathRows(query, key, direction, write_strength, log_decay, key_mask, scale=scale)
    if faults := rows.shape_faults():
        raise DsfShapeError(f"dsf.{SYSTEM}_recurrence: " + "\n  ".join(faults))
    return cache_recurrence(SYSTEM, rows)


class PathState(NamedTuple):
    """What `step` keeps.

    inputs: the last ones of the convolution (batch, at most conv_size - 1, width); key: already
    reflected by every token since (batch, key, group, width); value; fading: sum of log f since
    (batch, key, head), None without a forget gate.
    """

    inputs: Tensor
    key: Tensor
    value: Tensor
    fading: Tensor | None


class PathAttention(CachedMixer):
    """The PaTH attention layer: no positions, a reflection a token and key head.

        w = unit(SiLU(conv(W_2 W_1 x))),   beta = 2 sigmoid(W_b x + b),
        log f = logsigmoid(W_f x + b) if forgets

    rank is that of W_2 W_1, None for one full matrix. Cost O(length^2 width); `step` O(cache):
    each token reflects the cached keys once. Source: Yang et al. (2025), section 3; the released
    layer of flash-linear-attention.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I (one state per token)", "B": "eₜ",
        "C": "softmaxⱼ(qₜᵀ Πᵢ(I − βᵢwᵢwᵢᵀ) kⱼ/√d), j < i ≤ t", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ exp"
    source: ClassVar[str] = "Yang et al. (2025), arXiv 2505.16381, section 3"

    def __init__(
        self, width: int, n_head: int = 4, *, n_group: int | None = None, forgets: bool = False,
        rank: int | None = 32, conv_size: int = 3, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, n_group=n_group, bias=bias)
        check_at_least("PathAttention", "conv_size", 0, conv_size)
        check_at_least("PathAttention", "rank", 1, 1 if rank is None else rank)
        inner = width // n_head * self.n_group
        self.down = nn.Identity() if rank is None else nn.Linear(width, rank, bias=False)
        self.direction = ConvolvedLinear(
            width if rank is None else rank, inner, conv_size, "silu" if conv_size else None
        )
        self.n_past = max(conv_size - 1, 0)
        self.strength = nn.Linear(width, self.n_group)
        self.forget = nn.Linear(width, n_head) if forgets else None

    def seen(self, x: Tensor) -> tuple[Tensor, ...]:
        """Keys, directions, write strengths and, if it forgets, log forget gates."""
        w = unit(split_heads(self.direction(self.down(x)), self.n_group))
        own = (*super().seen(x), w, 2 * torch.sigmoid(self.strength(x)))
        return own if self.forget is None else (*own, functional.logsigmoid(self.forget(x)))

    def rows(self, x: Tensor, query: Tensor, seen: tuple[Tensor, ...], start: int) -> MixingRows:
        """Softmax rows through the reflections."""
        key, w, beta, *gate = seen
        return PathRows(query, key, w, beta, gate[0] if gate else None, query_start=start)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, PathState]:
        """One token: it reflects every cached key, then softmax attention reads them."""
        x = recent = x_t[:, None]
        if state is not None:
            recent = torch.cat([state.inputs, x], dim=1)
        key, w, beta, *gate = (part[:, -1:] for part in self.seen(recent))
        value = split_heads(self.value(x), self.n_group)
        fade = torch.zeros_like(gate[0]) if gate else None
        if state is not None:
            turned = state.key - (beta * (state.key * w).sum(-1))[..., None] * w
            key, value = torch.cat([turned, key], 1), torch.cat([state.value, value], 1)
            if fade is not None:
                fade = torch.cat([state.fading + gate[0], fade], 1)
        rows = SoftmaxRows(
            split_heads(self.query(x), self.n_head), key,
            None if fade is None else fade.transpose(1, 2)[:, :, None],
            query_start=key.shape[1] - 1,
        )  # fmt: skip
        y = rows.mix(share_groups(value, self.n_head).transpose(1, 2)).transpose(1, 2)
        past = recent[:, max(recent.shape[1] - self.n_past, 0) :]
        return self.out(merge_heads(y))[:, 0], PathState(past, key, value, fade)


LAYER = PathAttention
