"""Weights trained as the tokens come: what test-time training writes, and who reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dsf.recurrence import Recurrence
from dsf.transitions import BlockDiagonal, Dense, Householder, Identity


class InnerNorm(NamedTuple):
    """The layer norm of the inner loss, a head's own: weight and bias (head, channel), eps."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, z: Tensor) -> Tensor:
        """LN(z), z (batch, head, time, channel)."""
        normal = functional.layer_norm(z, z.shape[-1:], eps=self.eps)
        return self.weight[:, None] * normal + self.bias[:, None]

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None, eps: float) -> InnerNorm | None:
        """None without a weight; a bias of zeros without a bias."""
        if weight is None:
            return None
        return cls(weight, weight.new_zeros(weight.shape) if bias is None else bias, eps)

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """d/dz of |LN(z) - target|^2 / 2."""
        centred = z - z.mean(-1, keepdim=True)
        spread = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        normal, weight = centred * spread, self.weight[:, None]
        g = weight * (weight * normal + self.bias[:, None] - target)
        along = (g * normal).mean(-1, keepdim=True)
        return spread * (g - g.mean(-1, keepdim=True) - normal * along)


class Tokens(NamedTuple):
    """What the inner model is trained on and asked, (batch, head, time, width or 1).

    rate is that of the row that reads, strength that of the token that writes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rate: Tensor
    strength: Tensor

    @classmethod
    def by_head(
        cls, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, strength: Tensor
    ) -> Tokens:
        """From (batch, time, head, width), the last two (batch, time, head)."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return cls(q, k, v, rate.mT[..., None], strength.mT[..., None])

    def by_time(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `by_head` was given."""
        q, k, v = (x.transpose(1, 2) for x in self[:3])
        return q, k, v, self.rate[..., 0].mT, self.strength[..., 0].mT

    def cut(self, start: int, stop: int) -> Tokens:
        """Tokens start..stop-1."""
        q, k, v, rate, strength = (x[:, :, start:stop] for x in self)
        return Tokens(q, k, v, rate, strength)


class Trained(NamedTuple):
    """Weights of one inner layer, (batch, head, state + 1, channel), its bias in the last row.

    start: at the beginning of the mini-batch; written: the sum of what its tokens wrote so far,
    added with the rate of the row that reads, and for good with the rate of the last one.
    """

    start: Tensor
    written: Tensor

    def stepped(self, rate: Tensor) -> Trained:
        """The next mini-batch; rate (batch, head, 1, 1) of the last token."""
        return Trained(self.start + rate * self.written, torch.zeros_like(self.written))


class InnerRun(NamedTuple):
    """One stretch of tokens, (batch, head, time, ...): all of the last inner layer.

    output: before the norm; query_features and key_features: its inputs with a one appended;
    correction: minus the gradient of the loss in its output; memory: every layer afterwards.
    """

    output: Tensor
    query_features: Tensor
    key_features: Tensor
    correction: Tensor
    memory: list[Trained]


def with_one(x: Tensor) -> Tensor:
    """A one appended to the last axis: the input of the bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def train_stretch(memory: Sequence[Trained], tokens: Tokens, norm: InnerNorm | None) -> InnerRun:
    """Tokens of one mini-batch: gradients at its start, each query reading those up to its own.

        z(x) = W_n g(... g(W_1 x + c_1)) + c_n,   loss = |LN(z(k)) - (v - k)|^2 / 2
        (norm None: |z(k) - v|^2 / 2),   g = GELU (tanh)
        W_t = W_start - rate_t sum_{s <= t} strength_s dloss_s/dW

    Source: Sun et al. (2024), arXiv 2407.04620, sections 2.4 and 2.5.
    """
    query, key, value, rate, strength = tokens
    inputs, before, x = [], [], key
    for layer in memory:
        inputs.append(with_one(x))
        before.append(inputs[-1] @ layer.start)
        x = functional.gelu(before[-1], approximate="tanh")
    out = before[-1]
    gradient = out - value if norm is None else norm.gradient(out, value - key)
    gradients = [gradient]
    for i in range(len(memory) - 1, 0, -1):
        gradient = (gradient @ memory[i].start[..., :-1, :].mT) * gelu_slope(before[i - 1])
        gradients.insert(0, gradient)
    x, later, read = query, [], query
    for layer, seen, gradient in zip(memory, inputs, gradients, strict=True):
        read = with_one(x)
        wrote = -strength * gradient
        own = (read @ seen.mT).tril() @ wrote
        z = read @ layer.start + rate * (read @ layer.written + own)
        later.append(Trained(layer.start, layer.written + seen.mT @ wrote))
        x = functional.gelu(z, approximate="tanh")
    return InnerRun(z, read, inputs[-1], -gradients[-1], later)


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of GELU in its tanh form."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x)


def train_sequence(
    memory: Sequence[Trained], tokens: Tokens, norm: InnerNorm | None, mini_batch: int
) -> InnerRun:
    """`train_stretch` over mini-batch after mini-batch; memory afterwards not yet stepped."""
    runs: list[InnerRun] = []
    for start in range(0, max(tokens.query.shape[2], 1), mini_batch):
        if start:
            memory = [m.stepped(tokens.rate[:, :, start - 1 : start]) for m in memory]
        runs.append(train_stretch(memory, tokens.cut(start, start + mini_batch), norm))
        memory = runs[-1].memory
    z, q, k, u = (torch.cat(part, dim=2) for part in zip(*(r[:4] for r in runs), strict=True))
    return InnerRun(z, q, k, u, list(memory))


def written_recurrence(
    system: str, query_features: Tensor, key_features: Tensor, rate: Tensor, strength: Tensor,
    mini_batch: int, *, is_plain: bool, start: Tensor | None = None,
) -> Recurrence:  # fmt: skip
    """The weights of the last inner layer as a system; all arguments time before head.

        mini_batch 1:  W_t = W_(t-1) + B_t u_t,  B_t = rate_t strength_t k~_t,  C_t = q~_t

    with k~, q~ the features and a one. Longer mini-batches keep W at their start and the sum G of
    what was written since: C_t reads W + rate_t G, and the first token of the next one puts W +
    rate G in the place of W. u is minus the gradient of each token; is_plain (no norm) has u = v
    instead, and A_t holds what the gradient takes from W: the delta rule.
    """
    written = strength[..., None] * key_features
    n_state = key_features.shape[-1]
    mode = "exact" if is_plain else "exact_along_trajectory"
    if mini_batch == 1:
        beta = rate * strength
        one = Householder(beta, key_features) if is_plain else Identity(n_state)
        B, C = beta[..., None] * key_features, query_features
        return Recurrence(
            one, B[..., None], C[..., None, :], initial_state=start, system=system, mode=mode
        )
    steps = torch.arange(rate.shape[1], device=rate.device)
    first = ((steps % mini_batch == 0) & (steps > 0))[None, :, None]
    before = torch.nn.functional.pad(rate, (0, 0, 1, 0))[:, : rate.shape[1]]
    step = torch.where(first, before, 0.0)  # what the rate of the last mini-batch adds to W
    kept = 1.0 - first.to(rate.dtype)
    merge = torch.stack(
        [torch.ones_like(step), step, torch.zeros_like(step), kept.expand_as(step)], -1
    ).unflatten(-1, (2, 2))
    B = torch.stack([torch.zeros_like(written), written], -1).flatten(-2)[..., None]
    C = torch.stack([query_features, rate[..., None] * query_features], -1).flatten(-2)
    A: BlockDiagonal | Dense = BlockDiagonal(merge[..., None, :, :], n_state)
    if is_plain:
        # G_t = kept G + written (v - k~ W_t)
        keys = torch.stack([key_features, torch.zeros_like(key_features)], -1).flatten(-2)
        merged = A.as_dense()
        A = Dense(merged - B @ (keys[..., None, :] @ merged))
    if start is not None:
        start = torch.stack([start, torch.zeros_like(start)], 3).flatten(2, 3)
    return Recurrence(
        A, B, C[..., None, :], initial_state=start, system=system, mode=mode,
        gauge="W at the start of the mini-batch, and what was written since",
    )  # fmt: skip
