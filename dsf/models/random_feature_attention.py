"""Random-feature attention (Performers): softmax's kernel sampled into a finite state."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._mixer import SequenceMixer
from dsf.models._random_features import (
    Features,
    draw_directions,
    leverage_directions,
    random_features,
)
from dsf.normalisers import kernel_sum, log_and_sign, separable_system
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.shapes import Float
from dsf.transitions import Scalar
from dsf.wrappers import System

SYSTEM = "random_feature_attention"


def random_feature_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    directions: Float[Tensor, "#head direction _width"],
    *,
    kind: str = "positive",
    log_weight: Float[Tensor, "#head direction"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    normalise: bool = True,
) -> System:
    """Attention with the sampled kernel K^ over values (batch, time, head, channel).

        M_tj = K^(q_t, k_j) / sum_{i<=t} K^(q_t, k_i)
        K^(q, k) = phi(sqrt(scale) q).phi(sqrt(scale) k)

    phi and kinds as in `random_features`; scale is width^(-1/2) by default. The state is kept
    relative to the largest key feature so far, exp(m_t): A_t = exp(m_(t-1) - m_t), B_t =
    phi(k_t) exp(-m_t), C_t = phi(q_t)^T exp(m_t)/eta_t, so that no size of the keys overflows.
    Over all tokens if not causal (A = I then). normalise=False leaves eta out. State: features x
    channel. Raises DsfShapeError, DsfValueError. Source: Choromanski et al. (2021), eqs. 5 and 6.
    """
    check_query_key("dsf.random_feature_attention_recurrence", query, key)
    if directions.shape[-1] != query.shape[-1]:
        raise DsfShapeError(
            f"dsf.random_feature_attention_recurrence: directions: expected width="
            f"{query.shape[-1]}, got {directions.shape[-1]}; width is fixed by query."
        )
    root = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    key = share_groups(key, query.shape[2])
    q, k = (random_features(root * x, directions, kind, log_weight) for x in (query, key))
    if not causal:
        top = k.log_scale.detach()
        top = top.amax(1, keepdim=True) if top.shape[1] else top
        psi = k.signed * torch.exp(k.log_scale - top)[..., None]
        if normalise:
            log_eta, sign = log_and_sign(kernel_sum(q.signed, psi, causal=False))
        else:
            log_eta, sign = -(q.log_scale + top), None
        return separable_system(q.signed, psi, log_eta, sign, causal=False, system=SYSTEM)
    top = torch.cummax(k.log_scale.detach(), 1).values
    before = torch.cat([top[:, :1], top[:, :-1]], 1)
    A = Scalar(before - top, n_state=k.signed.shape[-1])
    psi = k.signed * torch.exp(k.log_scale - top)[..., None]
    C = q.signed[..., None, :]
    r = Recurrence(A, psi[..., None], C, system=SYSTEM, gauge="largest key feature = 1")
    if not normalise:
        return r.replace(C=C * torch.exp(q.log_scale + top)[..., None, None])
    eta = scan(r, torch.ones_like(psi[..., :1]))
    return r.replace(C=(q.signed / torch.where(eta == 0, 1.0, eta))[..., None, :])


class FeatureState(NamedTuple):
    """What `step` keeps: memory and key sum relative to exp(top), top (batch, head)."""

    memory: Tensor
    key_sum: Tensor
    top: Tensor


class RandomFeatureAttention(SequenceMixer):
    """Multi-head attention by random features, drawn once, or learned.

    n_direction directions a head (2 n_direction features but for positive); orthogonal draws them
    in orthogonal blocks; learned makes directions and log weights parameters. `fit` draws them by
    leverage on this layer's own queries and keys. Cost O(length x features x channel). Source:
    Choromanski et al. (2021); leverage and learned: Nishikawa et al. (2025).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "exp(mₜ₋₁ − mₜ) I, mₜ the largest log feature (I in plain coordinates)",
        "B": "φ(kₜ) exp(−mₜ)", "C": "φ(qₜ)ᵀ exp(mₜ)/ηₜ", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ φ(q)·φ(k)"
    source: ClassVar[str] = "Choromanski et al. (2021), arXiv 2009.14794, eqs. 5-7"
    directions: Tensor
    log_weight: Tensor

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        n_direction: int = 32,
        kind: str = "positive",
        orthogonal: bool = True,
        learned: bool = False,
        causal: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("RandomFeatureAttention", "n_head", n_head, "width", width)
        self.n_head, self.kind, self.is_causal = n_head, kind, causal
        head_width = width // n_head
        drawn = draw_directions(n_direction, head_width, n_head=n_head, orthogonal=orthogonal)
        random_features(drawn.new_zeros(1, n_head, head_width), drawn, kind)  # refuses the kind
        drawn, flat = drawn.float(), torch.zeros(n_head, n_direction)
        if learned:
            self.directions, self.log_weight = nn.Parameter(drawn), nn.Parameter(flat)
        else:
            self.register_buffer("directions", drawn)
            self.register_buffer("log_weight", flat)
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    @classmethod
    def small(cls, width: int) -> RandomFeatureAttention:
        """Four heads, 8 learned directions."""
        return cls(width, 4, n_direction=8, learned=True)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head: (batch, time, head, width)."""
        q, k, v = (split_heads(f(x), self.n_head) for f in (self.query, self.key, self.value))
        return q, k, v

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        q, k, v = self.project(x)
        system = random_feature_attention_recurrence(
            q, k, self.directions, kind=self.kind, log_weight=self.log_weight,
            causal=self.is_causal,
        )  # fmt: skip
        return system, v

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads merged, output projection."""
        return self.out(merge_heads(y))

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        *,
        regularisation: float = 2.0**-8,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw every head's directions by their leverage on its queries and keys of x.

        It helps where the coordinates of q/width^(1/4) have a variance below 1/2; beyond, the
        kernel has no finite mean over Gaussian data and sampling by leverage may be worse.
        """
        q, k, _ = self.project(x)
        both = torch.cat([q, k], 1).flatten(0, 1).double() * q.shape[-1] ** -0.25
        for head in range(self.n_head):
            directions, log_weight = leverage_directions(
                both[:, head], self.directions.shape[1], regularisation=regularisation,
                generator=generator,
            )  # fmt: skip
            self.directions[head].copy_(directions[0])
            self.log_weight[head].copy_(log_weight[0])

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, FeatureState]:
        """One token: the memory is scaled down when a larger key comes."""
        x = x_t[:, None]
        q, k, v = self.project(x)
        root = q.shape[-1] ** -0.25
        fq, fk = (random_features(root * z[:, 0], self.directions, self.kind, self.log_weight)
                  for z in (q, k))  # fmt: skip
        top = fk.log_scale.detach()
        top = top if state is None else torch.maximum(top, state.top)
        written = fk.signed * torch.exp(fk.log_scale - top)[..., None]
        memory, key_sum = written[..., None] * v[:, 0, :, None], written
        if state is not None:
            kept = torch.exp(state.top - top)[..., None]
            memory, key_sum = (
                memory + kept[..., None] * state.memory,
                key_sum + kept * state.key_sum,
            )
        y = self._read(fq, memory, key_sum)
        return self.readout(y[:, None], x)[:, 0], FeatureState(memory, key_sum, top)

    @staticmethod
    def _read(q: Features, memory: Tensor, key_sum: Tensor) -> Tensor:
        eta = (q.signed * key_sum).sum(-1, keepdim=True)
        return (q.signed[..., None, :] @ memory).squeeze(-2) / torch.where(eta == 0, 1.0, eta)


LAYER = RandomFeatureAttention
