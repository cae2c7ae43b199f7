"""ZeroS's radial coefficients a_t, b_t, c_t in three realisations, causal and over all tokens."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Gates of the first, the higher and the zero order, each (batch, time, head)."""

    first: Tensor
    higher: Tensor
    zero: Tensor

    def flip(self) -> Gates:
        """In reverse order of time."""
        return Gates(*(g.flip(1) for g in self))


@dataclasses.dataclass(frozen=True)
class PrefixSums:
    """What the weights of row t need of the logits 1..t; each (batch, time, head).

    Logits are counted from an anchor (the first one) on, so that a common offset costs no digits:
    `shifted` = s - anchor, `log_total` = log sum_{j<=t} exp(shifted_j), `mean` and `top` their
    mean and maximum, `count` = t. Anchor and maximum are gauges: the weights do not depend on
    them, so they carry no gradient.
    """

    anchor: Tensor
    shifted: Tensor
    log_total: Tensor
    mean: Tensor
    top: Tensor
    count: Tensor

    @classmethod
    def of(cls, logits: Tensor, anchor: Tensor) -> PrefixSums:
        """The running sums of logits (batch, time, head) in the order given."""
        shifted = logits - anchor
        count = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
        count = count[None, :, None]
        return cls(
            anchor, shifted, torch.logcumsumexp(shifted, 1), shifted.cumsum(1) / count,
            torch.cummax(shifted.detach(), 1).values, count,
        )  # fmt: skip

    def totals(self) -> PrefixSums:
        """The sums over all tokens, for every row (encoder)."""
        return PrefixSums(*(getattr(self, f.name)[:, -1:] for f in dataclasses.fields(self)))


def coefficients(
    past: PrefixSums, rows: PrefixSums, gates: Gates, realisation: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """a_t (None: identity; (..., 3): log decays; (..., 3, 3): blocks), b_t and c_t (..., 3).

    a and b run over `past`; the row's own sums, in c, are those of `rows`: the same prefix sums
    when causal, the totals of all tokens in an encoder.
    """
    a, b, c = REALISATIONS[realisation](past, rows, gates)
    if rows is past:
        # A row that sees itself alone: its higher orders cancel exactly, F = H and G = 0. Written
        # as zeros, so that no round-off is left for a LayerNorm to amplify.
        alone = torch.zeros_like(c[:, :1])
        alone[..., 2] = gates.zero[:, :1]
        c = torch.cat([alone, c[:, 1:]], dim=1)
    return a, b, c


def _shared(past: PrefixSums, rows: PrefixSums, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
    """s, and beta and gamma of the raw weights alpha e^s + beta s + gamma."""
    beta = (gates.first - gates.higher) / rows.count
    gamma = (gates.zero - gates.higher) / rows.count - beta * (rows.mean + rows.anchor)
    return past.shifted + past.anchor, beta, gamma


def _raw(past: PrefixSums, rows: PrefixSums, gates: Gates) -> tuple[Tensor | None, Tensor, Tensor]:
    s, beta, gamma = _shared(past, rows, gates)
    alpha = gates.higher * torch.exp(-(rows.log_total + rows.anchor))
    b = torch.stack([torch.exp(s), s, torch.ones_like(s)], -1)
    return None, b, torch.stack([alpha, beta, gamma], -1)


def _running_max(
    past: PrefixSums, rows: PrefixSums, gates: Gates
) -> tuple[Tensor | None, Tensor, Tensor]:
    s, beta, gamma = _shared(past, rows, gates)
    alpha = gates.higher * torch.exp(past.top - rows.log_total)
    before = torch.cat([torch.full_like(past.top[:, :1], -torch.inf), past.top[:, :-1]], dim=1)
    none = torch.zeros_like(past.top)
    log_decay = torch.stack([before - past.top, none, none], -1)
    b = torch.stack([torch.exp(past.shifted - past.top), s, torch.ones_like(s)], -1)
    return log_decay, b, torch.stack([alpha, beta, gamma], -1)


def _normalised(
    past: PrefixSums, rows: PrefixSums, gates: Gates
) -> tuple[Tensor | None, Tensor, Tensor]:
    n = past.count
    log_write = past.shifted - past.log_total
    mean_before = torch.cat([torch.zeros_like(past.mean[:, :1]), past.mean[:, :-1]], dim=1)
    plain = ((n - 1) / n).expand_as(log_write)
    cross = plain * (past.shifted - mean_before) / n
    none = torch.zeros_like(log_write)
    blocks = torch.stack([
        torch.stack([-torch.expm1(log_write), none, none], -1),
        torch.stack([none, plain, -cross], -1),
        torch.stack([none, none, plain], -1),
    ], -2)  # fmt: skip
    b = torch.stack([torch.exp(log_write), cross, (1 / n).expand_as(cross)], -1)
    share, difference = n / rows.count, gates.first - gates.higher
    c = torch.stack([
        gates.higher * torch.exp(past.log_total - rows.log_total),
        difference * share,
        share * (gates.zero - gates.higher + difference * (past.mean - rows.mean)),
    ], -1)  # fmt: skip
    return blocks, b, c


REALISATIONS = {"raw": _raw, "running_max": _running_max, "normalised": _normalised}
