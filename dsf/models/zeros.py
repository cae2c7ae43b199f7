"""ZeroS: zero-sum linear attention, softmax's orders reweighted, times a cosine."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfValueError
from dsf.models._heads import check_divides, check_query_key, merge_heads, split_heads
from dsf.models._mixer import SequenceMixer
from dsf.models._zeros_core import REALISATIONS, Gates, PrefixSums, coefficients
from dsf.recurrence import Recurrence
from dsf.rotary import rotary_tables, rotate
from dsf.shapes import Float
from dsf.transitions import BlockDiagonal, Diagonal, Identity
from dsf.wrappers import Anticausal, Bidirectional, System

SYSTEM = "zeros"
_BLOCKS = {
    "raw": "raw sums (F, G, H)", "running_max": "running-max sums (F, G, H)",
    "normalised": "means (F, G, H)",
}  # fmt: skip


def zeros_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time head width"],
    logits: Float[Tensor, "batch time head"],
    first_gate: Float[Tensor, "batch time head"],
    higher_gate: Float[Tensor, "batch time head"],
    zero_gate: Float[Tensor, "batch time head"] | None = None,
    *,
    realisation: str = "normalised",
    causal: bool = True,
) -> System:
    """ZeroS over values (batch, time, head, channel) from unit queries and keys, logits and gates.

        M_tj = r_tj q_t.k_j,   r_tj = g1_t d_tj / t + gh_t (p_tj - 1/t - d_tj / t) + g0_t / t

    with p_tj = softmax of the logits s_1..s_t, d_tj = s_j - their mean; over all tokens if not
    causal. r sums to zero over j (to g0_t with the zero order), M in general does not. State:
    three moments a key channel, index = 3 x key channel + moment; with a, b, c of size 3
    A_t = I ⊗ a_t, B_t = k_t ⊗ b_t, C_t = q_t^T ⊗ c_t^T:

        raw          F = sum e^s k v, G = sum s k v, H = sum k v; A = I (overflows as e^s does)
        running_max  F over e^m, m the largest logit so far; diagonal a = (e^(m_(t-1) - m_t), 1, 1)
        normalised   softmax mean, covariance with s, plain mean: a shared 3 x 3 block, bounded

    No row of any of them depends on a later token. Queries and keys are used as they come. Gates
    are numbers (after sigmoid or tanh). Cost O(length x width x channel). Raises DsfShapeError,
    DsfValueError. Source: Lu et al. (2025), sections 3.2-3.4.
    """
    check_query_key("dsf.zeros_recurrence", query, key)
    gates = Gates(first_gate, higher_gate, _or_zero(zero_gate, logits))
    return _system(query, key, logits, gates, realisation, causal)


def zeros_radial_recurrence(
    logits: Float[Tensor, "batch time head"],
    first_gate: Float[Tensor, "batch time head"],
    higher_gate: Float[Tensor, "batch time head"],
    zero_gate: Float[Tensor, "batch time head"] | None = None,
    *,
    realisation: str = "normalised",
    causal: bool = True,
) -> System:
    """The radial weights r_tj alone, without the cosine: three states, rows that sum to zero.

    This is the map on which zero-sum holds exactly; see `zeros_recurrence`.
    """
    one = torch.ones_like(logits[..., None])
    gates = Gates(first_gate, higher_gate, _or_zero(zero_gate, logits))
    return _system(one, one, logits, gates, realisation, causal)


def deviation_logits(
    u: Float[Tensor, "batch time head width"],
    prior_mean: Float[Tensor, "#batch #time #head width"],
    prior_log_tau: Float[Tensor, "#batch #time #head 1"],
    *,
    causal: bool = True,
) -> Float[Tensor, "batch time head"]:
    """s_j = -u_j . ubar_j / sqrt(width), ubar_j = (e^tau mu + sum_{i<=j} u_i) / (e^tau + j).

    Not causal, as released: the sum runs over all tokens, the divisor keeps the position j. tau is
    clipped to [-50, 30]. Source: Lu et al. (2025), section 3.3.
    """
    weight = torch.exp(prior_log_tau.clamp(-50, 30))
    position = torch.arange(1, u.shape[1] + 1, dtype=u.dtype, device=u.device)[:, None, None]
    total = u.cumsum(1) if causal else u.sum(1, keepdim=True)
    mean = (weight * prior_mean + total) / (weight + position)
    return -(u * mean).sum(-1) * u.shape[-1] ** -0.5


def _or_zero(gate: Tensor | None, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits) if gate is None else gate


def _system(
    query: Tensor, key: Tensor, logits: Tensor, gates: Gates, realisation: str, causal: bool
) -> System:
    if realisation not in REALISATIONS:
        raise DsfValueError(
            f"dsf.zeros_recurrence: realisation: expected one of {list(REALISATIONS)}, "
            f"got {realisation!r}."
        )
    # The coefficients are a few numbers a token: made in float64, so that a float32 layer loses
    # no digits in log sums and differences of means; the scan itself stays in the input's dtype.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    logits, gates = logits.to(wide), Gates(*(g.to(wide) for g in gates))
    anchor = logits[:, :1].detach()
    past = PrefixSums.of(logits, anchor)
    if causal:
        return _recurrence(query, key, past, past, gates, realisation)
    rows = past.totals()
    ahead = PrefixSums.of(logits.flip(1), anchor)
    back = _recurrence(query.flip(1), key.flip(1), ahead, rows, gates.flip(), realisation)
    return Bidirectional(
        _recurrence(query, key, past, rows, gates, realisation),
        Anticausal(back.flip_time(), strict=True),
    )


def _recurrence(
    query: Tensor, key: Tensor, past: PrefixSums, rows: PrefixSums, gates: Gates, realisation: Any
) -> Recurrence:
    a, b, c = coefficients(past, rows, gates, realisation)
    width = key.shape[-1]
    a, b, c = None if a is None else a.to(key.dtype), b.to(key.dtype), c.to(key.dtype)
    if a is None:
        A = Identity(3 * width)
    elif a.shape[-2:] == (3, 3) and realisation == "normalised":
        A = BlockDiagonal(a.unsqueeze(3), n_block=width)
    else:
        A = Diagonal(a[..., None, :].expand(*a.shape[:-1], width, 3).flatten(-2))
    B = (key[..., :, None] * b[..., None, :]).flatten(-2)
    C = (query[..., :, None] * c[..., None, :]).flatten(-2)
    gauge = f"{_BLOCKS[realisation]} of each key channel, index = 3 x key channel + moment"
    return Recurrence(A, B[..., None], C[..., None, :], system=SYSTEM, gauge=gauge)


class ZeroSState(NamedTuple):
    """What `step` keeps, beside the number of tokens seen.

    u_sum (batch, head, width), log_total = log sum e^s and mean of s (batch, head), and the means
    F, G, H of the normalised form (batch, head, width, channel).
    """

    count: int
    u_sum: Tensor
    log_total: Tensor
    mean: Tensor
    moments: tuple[Tensor, Tensor, Tensor]


class ZeroS(SequenceMixer):
    """The ZeroS layer as released: deviation logits, rotary map, unit q and k, LayerNorm a head.

    rotary: "release" (the code's tables, not a rotation), "rotation" (consistent), None. The zero
    order (zero_order=True, for a first layer) has the gate tanh. Parameter names are those of the
    release; `gate` gives (first, higher, zero) a head. Every realisation gives the same output;
    running_max is the fast one, normalised the most accurate. Cost O(length x width^2 / n_head),
    `step` O(width^2 / n_head) with 3 width^2 / n_head + width + 2 n_head numbers of state. Source:
    Lu et al. (2025), sections 3.3, 3.4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I ⊗ aₜ   (I, diagonal or 3 × 3 blocks)", "B": "k̂ₜ ⊗ bₜ, raw: bₜ = (e^sₜ, sₜ, 1)",
        "C": "q̂ₜᵀ ⊗ cₜᵀ, raw: cₜ = (σʰ/Eₜ, (σ¹−σʰ)/t, γₜ)", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "rows sum to 0 (radial part)"
    source: ClassVar[str] = "Lu et al. (2025), sections 3.2-3.4"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        causal: bool = True,
        zero_order: bool = False,
        rotary: str | None = "release",
        rope_base: float = 10000.0,
        use_norm: bool = True,
        norm_eps: float = 1e-5,
        bias: bool = True,
        realisation: str = "running_max",
    ) -> None:
        super().__init__()
        check_divides("ZeroS", "n_head", n_head, "width", width)
        self.n_head, self.is_causal, self.zero_order = n_head, causal, zero_order
        self.rotary, self.rope_base, self.realisation = rotary, rope_base, realisation
        self.use_norm, self.norm_eps = use_norm, norm_eps
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.u = nn.Linear(width, width, bias=bias)
        self.gate = nn.Linear(width, 3 * n_head, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self.prior_mu = nn.Parameter(torch.zeros(1, 1, n_head, width // n_head))
        self.prior_log_tau = nn.Parameter(torch.zeros(1, 1, n_head, 1))

    @classmethod
    def small(cls, width: int) -> ZeroS:
        """Four heads, the released rotary map where the width of a head is even."""
        return cls(width, 4, rotary="release" if width // 4 % 2 == 0 else None)

    def unit_query_key(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and keys after the rotary map and L2 norm, (batch, time, head, width)."""
        q, k = split_heads(self.q(x), self.n_head), split_heads(self.k(x), self.n_head)
        if self.rotary is not None:
            tables = rotary_tables(
                x.shape[1], q.shape[-1], base=self.rope_base, start=start, tables=self.rotary,
                dtype=x.dtype, device=x.device,
            )  # fmt: skip
            q, k = rotate(q, *tables), rotate(k, *tables)
        return nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)

    def gates(self, x: Tensor) -> Gates:
        """First, higher and zero order; the zero order's is 0 unless it is switched on."""
        first, higher, zero = split_heads(self.gate(x), self.n_head).unbind(-1)
        zero = torch.tanh(zero) if self.zero_order else torch.zeros_like(zero)
        return Gates(torch.sigmoid(first), torch.sigmoid(higher), zero)

    def logits(self, x: Tensor) -> Tensor:
        """The deviation logits s, (batch, time, head)."""
        u = split_heads(self.u(x), self.n_head)
        return deviation_logits(u, self.prior_mu, self.prior_log_tau, causal=self.is_causal)

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system and the values (batch, time, head, channel)."""
        query, key = self.unit_query_key(x)
        system = zeros_recurrence(
            query, key, self.logits(x), *self.gates(x), realisation=self.realisation,
            causal=self.is_causal,
        )  # fmt: skip
        return system, split_heads(self.v(x), self.n_head)

    def radial_recurrence(self, x: Tensor) -> System:
        """The weights without the cosine: the map on which zero-sum holds."""
        return zeros_radial_recurrence(
            self.logits(x), *self.gates(x), realisation=self.realisation, causal=self.is_causal
        )

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """LayerNorm a head without weights, heads merged, output projection."""
        if self.use_norm:
            y = nn.functional.layer_norm(y, y.shape[-1:], eps=self.norm_eps)
        return self.out_proj(merge_heads(y))

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, ZeroSState]:
        """One token by the normalised form; state as in ZeroSState."""
        x = x_t[:, None]
        t = 1 if state is None else state.count + 1
        q, k = (part[:, 0] for part in self.unit_query_key(x, t - 1))
        v, u = (split_heads(part(x_t), self.n_head) for part in (self.v, self.u))
        first, higher, zero = (g[:, 0] for g in self.gates(x))
        u_sum = u if state is None else state.u_sum + u
        weight = torch.exp(self.prior_log_tau.clamp(-50, 30))[0]
        u_mean = (weight * self.prior_mu[0] + u_sum) / (weight + t)
        s = -(u * u_mean).sum(-1) * u.shape[-1] ** -0.5
        moments, log_total, mean = _advance(state, t, s, k[..., None] * v[..., None, :])
        softmax_mean, covariance, plain = moments

        def of(gate: Tensor) -> Tensor:
            return gate[..., None, None]

        mixed = (of(higher) * (softmax_mean - plain) + of(first - higher) * covariance
                 + of(zero) * plain)  # fmt: skip
        y = (q[..., None, :] @ mixed).squeeze(-2)
        new = ZeroSState(t, u_sum, log_total, mean, moments)
        return self.readout(y[:, None], x)[:, 0], new


def _advance(
    state: ZeroSState | None, t: int, s: Tensor, outer: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The means F, G, H with one more token, and log sum e^s and the mean of s."""
    if state is None:
        return (outer, torch.zeros_like(outer), outer), s, s
    log_total = torch.logaddexp(state.log_total, s)
    log_write = (s - log_total)[..., None, None]
    deviation = (s - state.mean)[..., None, None] / t
    softmax_mean, covariance, plain = state.moments
    moments = (
        torch.exp(log_write) * outer - torch.expm1(log_write) * softmax_mean,
        (1 - 1 / t) * (covariance + deviation * (outer - plain)),
        plain + (outer - plain) / t,
    )
    return moments, log_total, state.mean + (s - state.mean) / t


LAYER = ZeroS
