"""From a map to states: the smallest recurrence that makes it, and the error of a smaller one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.map_blocks import Form, Side, square
from dsf.maps import materialise
from dsf.memory import require_memory
from dsf.predictor_forms import Predictor
from dsf.recurrence import Recurrence
from dsf.shapes import Float, Inexact
from dsf.transitions import Dense
from dsf.wrappers import Anticausal, Bidirectional

Realised: TypeAlias = Recurrence | Anticausal | Bidirectional | Predictor
Gauge = Literal["input-normal", "balanced"]
Steps: TypeAlias = list[tuple[Tensor, Tensor, Tensor]]
"""A_t (n_t, n_{t-1}), B_t (n_t, 1) and the row that is read of every step."""


def realise(
    attention_map: Inexact[Tensor, "batch head query key"],
    tolerance: float = 1e-12,
    *,
    form: Form = "current",
    gauge: Gauge = "input-normal",
    side: Side | Literal["both"] | None = None,
    budget: float | None = None,
    max_state: int | Sequence[int] | None = None,
) -> tuple[Realised, Float[Tensor, "batch head"]]:
    """The smallest system whose map is a given one, and its exact error in Frobenius norm.

    Sequential singular value decompositions per head, in current form

        G_t = [ Y_{t-1} without first row | M[t:, t] ],  G_t = U S Z^H,
        [A_t B_t] = Z_k^H,  Y_t = G_t Z_k,  C_t = first row of Y_t

    Parameters
    ----------
    attention_map: M. A causal one gives a Recurrence, an anticausal one an Anticausal, any other
        a Bidirectional, whose anticausal half is strict; `side` asks for one part ("lower" with
        the diagonal, "upper" with it) or for "both".
    tolerance: singular values above tolerance times the norm of the triangle are kept.
    form: "current" y_t = C_t h_t, states rank M[t:, :t] (1-based, ends included); "predictor"
        y_t = C_t h_{t-1} + D_t u_t, states rank M[t+1:, :t], the fewest, returned as a
        `Predictor` (causal maps only); "direct" y_t = C_t h_t + D_t u_t, the predictor's states,
        and one more only in steps where the old state is read and lost at once.
    gauge: "input-normal" (A_t A_t^H + B_t B_t^H = I) or "balanced", one decomposition of the
        whole block a step, O(length^4).
    budget: instead of the tolerance: as few states as keep ||E||_F within budget, certified
        (of each half of a bidirectional map: budget / sqrt 2).
    max_state: at most so many states; a sequence gives the number at each step.

    States per step vary; they are padded with zeros to the largest (`states_kept` counts them).
    Returns the system and ||M - its map||_F over the part asked for, (batch, head). Input-normal,
    the discarded singular values give it exactly, sqrt(sum_t sum_{k>n_t} sigma_k(G_t)^2), at most
    sqrt(length) times what any system of these sizes leaves; balanced, it is measured on the map.
    Cost O(length^2 n^2) time, O(length n^2) memory, n the largest order. Raises DsfShapeError
    unless the map is square, DsfValueError on impossible options.
    Source: Dewilde and van der Veen (1998), chapter 3; van der Veen (1993).
    """
    length = square("dsf.realise", attention_map)
    _check(tolerance, form, gauge, side, budget, max_state, length)
    wide = torch.complex128 if attention_map.is_complex() else torch.float64
    require_memory(
        "dsf.realise", "map", ("batch", "head", "query", "key"), attention_map.shape, wide,
        device=attention_map.device, advice="Realise fewer heads, or dsf.reduce the system.",
    )  # fmt: skip
    M = attention_map.detach().to(wide)
    used = side or _sides(M)
    rule = _Rule(tolerance, budget, max_state, gauge)
    if used == "lower":
        return _causal(M.tril(), form, rule)
    if form == "predictor":
        raise DsfValueError(
            f"dsf.realise: form: expected current or direct for a map with entries above the "
            f"diagonal ({used}), got predictor. Pass side='lower'."
        )
    if used == "upper":
        found, error = _causal(M.triu().flip(-1, -2), form, rule.reversed())
        return Anticausal(_recurrence(found).flip_time()), error
    if budget is not None:
        rule = rule.half()
    causal, first = _causal(M.tril(), form, rule)
    later, second = _causal(M.triu(1).flip(-1, -2), "direct", rule.reversed())
    back = _recurrence(later).replace(D=None).flip_time()
    both = Bidirectional(_recurrence(causal), Anticausal(back, strict=True))
    return both, torch.hypot(first, second)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How many singular values to keep: by tolerance, budget and largest sizes."""

    tolerance: float
    budget: float | None
    max_state: int | Sequence[int] | None
    gauge: Gauge

    def keep(self, sigma: Tensor, floor: float, lost: float, t: int) -> tuple[int, float]:
        """The number to keep at step t and the sum of squares lost with the rest."""
        tails = torch.flip(torch.cumsum(torch.flip(sigma**2, (0,)), 0), (0,))
        if self.budget is None:
            keep = int((sigma > floor).sum())
        else:
            keep = int((tails > max(self.budget**2 - lost, 0.0) * (1 - 1e-12)).sum())
        if self.max_state is not None:
            most = self.max_state if isinstance(self.max_state, int) else self.max_state[t]
            keep = min(keep, most)
        return keep, float(tails[keep]) if keep < len(tails) else 0.0

    def half(self) -> _Rule:
        assert self.budget is not None
        return dataclasses.replace(self, budget=self.budget / math.sqrt(2))

    def reversed(self) -> _Rule:
        """The same sizes counted from the last step."""
        sizes = self.max_state
        if sizes is None or isinstance(sizes, int):
            return self
        return dataclasses.replace(self, max_state=list(sizes)[::-1])


def _causal(
    lower: Tensor, form: Form, rule: _Rule
) -> tuple[Recurrence | Predictor, Tensor]:  # fmt: skip
    batch, head, length = lower.shape[:3]
    strict = form != "current"
    one = _sequential if rule.gauge == "input-normal" else _balanced
    heads = [one(lower[b, h], strict, rule) for b in range(batch) for h in range(head)]
    A, B, C = _padded([steps for steps, _ in heads], batch, head, length, lower)
    error = torch.tensor([e for _, e in heads], dtype=torch.float64).reshape(batch, head)
    if not strict:
        found: Recurrence | Predictor = Recurrence(
            Dense(A), B, C, system="realised", gauge=rule.gauge)  # fmt: skip
    else:
        D = lower.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None, None]
        found = Predictor(A, B, C, D)
        found = found.recurrence() if form == "direct" else found
    if rule.gauge == "balanced":
        gap = materialise(_recurrence(found)) - lower
        error = torch.linalg.matrix_norm(gap).to(torch.float64)
    return found, error.to(lower.device)


def _recurrence(found: Recurrence | Predictor) -> Recurrence:
    return found.recurrence() if isinstance(found, Predictor) else found


def _sequential(lower: Tensor, strict: bool, rule: _Rule) -> tuple[Steps, float]:
    """Input-normal steps and the error's norm; with `strict` in predictor form."""
    length = lower.shape[0]
    floor = rule.tolerance * _norm(lower.tril(-1) if strict else lower)
    Y = lower.new_zeros(length + (0 if strict else 1), 0)
    steps, lost = [], 0.0
    for t in range(length):
        before = Y[:1]
        G = torch.cat([Y[1:], lower[t + strict :, t : t + 1]], dim=1)
        _, sigma, Zh = torch.linalg.svd(G, full_matrices=False)
        keep, more = rule.keep(sigma, floor, lost, t)
        lost += more
        Z = Zh[:keep]
        Y = G @ Z.mH
        steps.append((Z[:, :-1], Z[:, -1:], before if strict else Y[:1]))
    return steps, math.sqrt(lost)


def _balanced(lower: Tensor, strict: bool, rule: _Rule) -> tuple[Steps, float]:
    """Balanced steps: both Gramians of step t are the singular values of its block."""
    length = lower.shape[0]
    floor = rule.tolerance * _norm(lower.tril(-1) if strict else lower)
    seen = lower.new_zeros(length + (0 if strict else 1), 0)
    steps, lost = [], 0.0
    for t in range(length):
        U, sigma, Zh = torch.linalg.svd(lower[t + strict :, : t + 1], full_matrices=False)
        keep, more = rule.keep(sigma, floor, lost, t)
        lost += more if rule.budget is not None else 0.0
        root = sigma[:keep].sqrt().to(lower.dtype)
        A = (U[:, :keep] / root).mH @ seen[1:]
        B = root[:, None] * Zh[:keep, -1:]
        before, seen = seen[:1], U[:, :keep] * root
        steps.append((A, B, before if strict else seen[:1]))
    return steps, math.nan


def _padded(
    heads: list[Steps], batch: int, head: int, length: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of different sizes in one array each, (batch, time, head, ...), zeros at the end."""
    n = max([1, *(a.shape[0] for steps in heads for a, _, _ in steps)])
    require_memory(
        "dsf.realise", "transitions", ("batch", "time", "head", "state", "state"),
        (batch, length, head, n, n), like.dtype, device=like.device,
        advice="Pass max_state= or a larger tolerance, or fewer heads.",
    )  # fmt: skip
    A = like.new_zeros(batch * head, length, n, n)
    B, C = like.new_zeros(batch * head, length, n, 1), like.new_zeros(batch * head, length, 1, n)
    for i, steps in enumerate(heads):
        for t, (a, b, c) in enumerate(steps):
            A[i, t, : a.shape[0], : a.shape[1]] = a
            B[i, t, : b.shape[0]] = b
            C[i, t, :, : c.shape[1]] = c

    def spread(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, head)).transpose(1, 2)

    return spread(A), spread(B), spread(C)


def _norm(lower: Tensor) -> float:
    """No block's largest singular value is above the triangle's, which is cheap to have."""
    return float(torch.linalg.matrix_norm(lower, 2)) if lower.numel() else 0.0


def _sides(M: Tensor) -> Side | Literal["both"]:
    above = bool((M.triu(1) != 0).any())
    below = bool((M.tril(-1) != 0).any())
    return "lower" if not above else "both" if below else "upper"


def _check(
    tolerance: float, form: str, gauge: str, side: str | None, budget: float | None,
    max_state: int | Sequence[int] | None, length: int,
) -> None:  # fmt: skip
    if not 0 <= tolerance < 1:
        raise DsfValueError(f"dsf.realise: tolerance: expected in [0, 1), got {tolerance}.")
    for name, given, known in (
        ("form", form, ("current", "direct", "predictor")),
        ("gauge", gauge, ("input-normal", "balanced")),
        ("side", side, (None, "lower", "upper", "both")),
    ):
        if given not in known:
            raise DsfValueError(f"dsf.realise: {name}: expected one of {known}, got {given!r}.")
    if budget is not None and (budget < 0 or gauge == "balanced"):
        raise DsfValueError(
            f"dsf.realise: budget: expected at least 0 and gauge='input-normal', whose error is "
            f"known step by step, got {budget} with {gauge}."
        )
    sizes = [max_state] if isinstance(max_state, int) else list(max_state or [])
    several = max_state is not None and not isinstance(max_state, int)
    if any(n < 0 for n in sizes) or (several and len(sizes) != length):
        raise DsfValueError(
            f"dsf.realise: max_state: expected one number of states or {length} of them, none "
            f"negative, got {max_state}."
        )
