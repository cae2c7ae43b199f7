"""Which output rows does a finite state tell apart? The rank of what the states have reached."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsf.gramians import reachability
from dsf.measures._softmax_queries import Finding
from dsf.measures._verdicts import NO, RANK_WORDS, UNDECIDED, YES, decide, tolerances
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.shapes import broadcast_shapes
from dsf.wrappers import Anticausal, Bidirectional, System, core

_SAME_ROW = 1e-14
"""Two rows that differ by this little in every entry are one, made in two orders."""


def reach_at(system: System, position: int) -> tuple[Tensor, Tensor]:
    """R (batch, head, state, key) with weights = c R, and the actual output row c (..., state).

    A bidirectional system whose two halves are read by the same C (to rounding) has one row for
    both; by different ones, a row of each, side by side.
    """
    if isinstance(system, Bidirectional):
        R1, c1 = reach_at(system.causal, position)
        R2, c2 = reach_at(system.anticausal, position)
        if c1.shape == c2.shape and torch.allclose(c1, c2, rtol=_SAME_ROW, atol=0.0):
            return R1 + R2, c1
        shape = broadcast_shapes(R1.shape[:2], R2.shape[:2])
        R1, R2 = R1.expand(*shape, -1, -1), R2.expand(*shape, -1, -1)
        c = torch.cat([c1.expand(*shape, -1), c2.expand(*shape, -1)], -1)
        return torch.cat([R1, R2], -2), c
    if isinstance(system, Anticausal):
        r = system.recurrence.flip_time()
        at = r.length - 1 - position
        R = reachability(r, at, strict=system.strict)
        R = torch.nn.functional.pad(R.flip(-1), (position * r.n_input, 0))
        return R, _row(r, at)
    assert isinstance(system, Recurrence)
    R = reachability(system, position)
    left = (system.length - 1 - position) * system.n_input
    return torch.nn.functional.pad(R, (0, left)), _row(system.dense_factors(), position)


def _row(r: Recurrence, position: int) -> Tensor:
    assert isinstance(r.C, Tensor)
    batch, _, head = r.lead_shape()
    c = r.C[:, position if r.C.shape[1] > 1 else 0, :, 0].detach()
    c = c.to(torch.complex128 if r.dtype.is_complex else torch.float64)
    return c.expand(batch, head, -1)


def real_map(r: Recurrence, R: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """For y = Re(C h) with complex states: the same map from (Re c, -Im c), all real."""
    if not (r.real_output and R.is_complex()):
        return R, c
    return torch.cat([R.real, R.imag], -2), torch.cat([c.real, -c.imag], -1)


def division(system: System, R: Tensor) -> list[list[bool | None]]:
    """Whether rows are divided by their own sum, for each batch and head; None: cannot be seen.

    Rows that all sum to one were divided when the row of ones is no combination of the rows of R,
    the reached states where most keys are seen: a state that counts the keys makes rows sum to
    one without dividing. With no more keys than states every row is a combination.
    """
    r = core(system)
    batch, length, head = r.lead_shape()
    if r.n_input != 1:
        return [[False] * head] * batch
    dtype = torch.promote_types(r.dtype.to_real(), torch.float32)
    ones = torch.ones(batch, length, head, 1, dtype=dtype, device=r.device)
    with torch.no_grad():
        y = scan(system, ones, allow_nonfinite=True)[..., 0]
    # a row that sums to exactly nothing had nothing to divide (no key shares a feature with it)
    to_one = (((y - 1).abs() <= math.sqrt(torch.finfo(dtype).eps)) | (y == 0)).all(1)
    to_one &= (y != 0).any(1)
    return [
        [_divides(R[b, h], math.sqrt(torch.finfo(dtype).eps)) if bool(to_one[b, h]) else False
         for h in range(head)] for b in range(batch)]  # fmt: skip


def _divides(R: Tensor, tolerance: float) -> bool | None:
    used = (R != 0).any(0)
    if int(used.sum()) <= R.shape[0]:
        return None
    scaled = _unit_rows(R)
    one = used.to(R.dtype)
    solution = torch.linalg.lstsq(scaled.T, one[:, None], driver="gelsd").solution
    left = one - (scaled.T @ solution)[:, 0]
    return float(left.abs().max()) > tolerance


def _unit_rows(R: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(R, dim=-1, keepdim=True)
    return R / norms.masked_fill(norms == 0, 1.0)


def examine_state(
    R: Tensor, c: Tensor, divided: bool | None, *, dtype: torch.dtype,
    unit_roundoff: float | None, query_width: int | None,
) -> Finding:  # fmt: skip
    """The verdict for one row of one head, R (state, key).

    Weights are c R: injective in c iff R has rank state. Rows that were divided by their own sum
    lose the length of c besides: c and 2 c collide.
    """
    n = R.shape[0]
    norms = torch.linalg.vector_norm(R, dim=-1)
    norms = norms.masked_fill(norms == 0, 1.0)
    low, high = tolerances(dtype, n, unit_roundoff)
    used = int((R != 0).any(0).sum())
    U, sigma, _ = torch.linalg.svd(_unit_rows(R), full_matrices=False)
    margin = float(sigma[-1]) if used >= n else 0.0
    if used < n:
        verdict, reason = NO, f"{used} keys, at least {n} are necessary for {n} states"
    else:
        verdict = int(decide(torch.tensor(margin), low, high))
        reason = f"rank of the reached states {RANK_WORDS[verdict]}"
    if divided:
        verdict, margin, reason = _ray_verdict(n, used, verdict, margin, reason, query_width)
    elif divided is False and verdict != NO and query_width is not None and n < query_width:
        reason = f"{n} states are fewer than the query's {query_width} entries"
        return Finding(NO, 0.0, reason, None, math.nan)
    elif divided is None and verdict == YES:
        verdict, reason = UNDECIDED, f"{reason}, but too few keys tell whether rows are divided"
    if verdict != NO:
        return Finding(verdict, margin, reason, None, math.nan)
    if divided and not bool((c @ R).sum()):  # this row has no weights; another one has
        c = R.sum(-1).conj()
    other = 2 * c if divided else c + _along(c, _unreached(U).conj() / norms)
    pair = torch.stack([c, other])
    weights = state_weights(R, pair, bool(divided))
    return Finding(verdict, margin, reason, pair, float((weights[0] - weights[1]).abs().max()))


def _unreached(U: Tensor) -> Tensor:
    """A unit vector that the columns of U (state, key) reach least; cost O(state x key).

    The last singular vector where they span everything, else one orthogonal to all of them: the
    unit vector farthest from their span, less its part in it (twice, against rounding).
    """
    if U.shape[1] >= U.shape[0]:
        return U[:, -1]
    far = int(torch.linalg.vector_norm(U, dim=1).argmin())
    v = torch.zeros_like(U[:, 0])
    v[far] = 1
    for _ in range(2):
        v = v - U @ (U.mH @ v)
        v = v / torch.linalg.vector_norm(v)
    return v


def _ray_verdict(
    n: int, used: int, verdict: int, margin: float, reason: str, query_width: int | None
) -> tuple[int, float, str]:
    if query_width is None:
        return NO, 0.0, "rows are divided by their sum: a row c and 2 c collide"
    few = [f"{count} {what}" for count, what in ((n, "features"), (used, "keys"))
           if count <= query_width]  # fmt: skip
    if few:
        reason = (f"rows are divided by their sum and {few[0]} are no more than the query's "
                  f"{query_width}: no continuous feature map is injective")  # fmt: skip
        return NO, 0.0, reason
    if verdict == YES:
        reason = f"{n} features, more than the query's {query_width}"
    return UNDECIDED, margin, f"{reason}; the feature map decides"


def _along(c: Tensor, direction: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(c)
    size = size if float(size) > 0 else torch.ones_like(size)
    return direction / torch.linalg.vector_norm(direction) * size


def state_weights(R: Tensor, rows: Tensor, divided: bool) -> Tensor:
    """Weights (pair, key) of some output rows, divided by their sums if the system does so."""
    weights = rows @ R
    return weights / weights.sum(-1, keepdim=True) if divided else weights
