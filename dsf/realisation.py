"""From a map to states: singular values of its blocks, and the smallest recurrence for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dsf.algebra import realified
from dsf.axes import named_sizes
from dsf.errors import DsfShapeError, DsfValueError
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.shapes import Float, Inexact
from dsf.transitions import Dense, Diagonal, Identity, Scalar
from dsf.transitions._base import mm

Side = Literal["lower", "upper"]


def block_singular_values(
    attention_map: Inexact[Tensor, "*lead query key"],
    cuts: Sequence[int] | None = None,
    *,
    side: Side = "lower",
) -> Float[Tensor, "*lead cut rank"]:
    """Singular values of the blocks map[t:, :t] (0-based), one cut t after another.

    They are the Hankel singular values of the map's causal part: a recurrence with n states at
    cut t has at most n of them non-zero there. `side="upper"` takes map[:t, t:], the part that an
    anticausal recurrence carries. `cuts` are positions in 1..length-1, by default all.

    Returns (*lead, cut, rank), in the map's real precision, falling, zero-padded to the largest
    possible rank. Cost: one SVD of a (length-t) x t block a cut and lead index. Raises
    DsfShapeError unless the map is square. Source: Dewilde and van der Veen (1998), chapter 3.
    """
    length = _square("dsf.block_singular_values", attention_map)
    chosen = _cuts("dsf.block_singular_values", cuts, length)
    lead = attention_map.shape[:-2]
    rank = max((min(t, length - t) for t in chosen), default=0)
    out = attention_map.new_zeros(
        *lead, len(chosen), rank, dtype=attention_map.dtype.to_real())  # fmt: skip
    lower = side == "lower"
    for i, t in enumerate(chosen):
        block = attention_map[..., t:, :t] if lower else attention_map[..., :t, t:]
        out[..., i, : min(t, length - t)] = torch.linalg.svdvals(block)
    return out


def hankel_singular_values(
    recurrence: Recurrence, cuts: Sequence[int] | None = None, *, max_memory: int | None = None
) -> Float[Tensor, "batch head cut state"]:
    """The same singular values from the coefficients, without any length x length array.

    At cut t the block is O_t R_t, future outputs seen from the states times states reached from
    past inputs. Both keep only their triangular factors, updated step by step,

        R: qr([R_{t-1}^T A_t^T ; B_t^T]),    O: qr([C_t ; O_t] A_t),    sigma = svd(O_t R_t^T)

    so that Gramians are never squared. Returns (batch, head, cut, state) in float64, falling; a
    complex system with `real_output` counts real states (twice as many). Cost: O(length state^3),
    memory O(cuts state^2). Raises DsfMemoryError when the factors would not fit.
    Source: Dewilde and van der Veen (1998), chapter 3.
    """
    r = realified(recurrence) if recurrence.real_output and recurrence.dtype.is_complex else (
        recurrence.dense_factors())  # fmt: skip
    r = r.to(torch.float64)
    batch, length, head = r.lead_shape()
    chosen = _cuts("dsf.hankel_singular_values", cuts, length)
    n = r.n_state
    require_memory(
        "dsf.hankel_singular_values", "factors", ("cut", "batch", "head", "state", "state"),
        (len(chosen), batch, head, n, n), r.dtype, device=r.device, max_memory=max_memory,
        advice="Pass fewer cuts=.",
    )  # fmt: skip
    reached = _reached_factors(r, set(chosen))
    seen = r.C.new_zeros(batch, head, n, n, dtype=r.dtype)  # type: ignore[union-attr]
    values = {}
    for t in range(length - 1, 0, -1):
        both = torch.cat([_at(r.C, t).expand(batch, head, -1, -1).to(seen.dtype), seen], -2)
        carried = r.A.at(t).apply_transposed(both.mT).mT
        seen = _triangle(carried.expand(batch, head, -1, -1), n)
        if t in reached:
            values[t] = torch.linalg.svdvals(mm(seen, reached[t].mT))
    if not chosen:
        return torch.zeros(batch, head, 0, n, dtype=torch.float64, device=r.device)
    return torch.stack([values[t] for t in chosen], dim=2)


def _reached_factors(r: Recurrence, chosen: set[int]) -> dict[int, Tensor]:
    """At each chosen cut t, the triangular F with F^H F = R_t^* R_t^T, R_t the reachability."""
    batch, length, head = r.lead_shape()
    n = r.n_state
    factor = torch.zeros(batch, head, n, n, dtype=r.dtype, device=r.device)
    kept = {}
    for t in range(length):
        moved = r.A.at(t).apply(factor.mT).mT.to(factor.dtype).expand(batch, head, n, n)
        written = _at(r.B, t).mT.expand(batch, head, -1, n).to(factor.dtype)
        factor = _triangle(torch.cat([moved, written], -2), n)
        if t + 1 in chosen:
            kept[t + 1] = factor
    return kept


def _triangle(x: Tensor, n: int) -> Tensor:
    """The R of a QR of x, with exactly n rows; x^H x is what it stands for."""
    triangle = torch.linalg.qr(x, mode="r").R
    return torch.nn.functional.pad(triangle, (0, 0, 0, n - triangle.shape[-2]))


def epsilon_ranks(
    singular_values: Float[Tensor, "*lead cut rank"],
    tolerance: float,
    *,
    criterion: Literal["sigma", "frobenius"] = "sigma",
    scale: Float[Tensor, "*lead"] | None = None,
) -> Float[Tensor, "*lead cut"]:
    """How many singular values of each cut count at a relative tolerance, as whole numbers.

    "sigma": those above tolerance * (the largest over all cuts). "frobenius": the smallest n with
    sqrt(sum_{k>n} sigma_k^2) <= tolerance * scale, scale by default the largest Frobenius norm of
    a cut; with scale the norm of the map's triangle, no recurrence with fewer states comes within
    `tolerance` of it (realisation bound: the error is at least the tail of any cut). A map of
    zeros has rank 0. Never relative to one block alone, which keeps noise.
    """
    s = singular_values
    if criterion == "sigma":
        top = s.amax((-2, -1)) if s.numel() else s.new_zeros(s.shape[:-2])
        return (s > tolerance * top[..., None, None]).sum(-1).to(torch.float64)
    tails = torch.flip(torch.cumsum(torch.flip(s**2, (-1,)), -1), (-1,)).sqrt()
    if scale is None:
        scale = tails[..., 0].amax(-1) if tails.numel() else s.new_zeros(s.shape[:-2])
    return (tails > tolerance * scale[..., None, None]).sum(-1).to(torch.float64)


def realise(
    attention_map: Inexact[Tensor, "batch head query key"],
    tolerance: float = 1e-12,
    *,
    budget: float | None = None,
    max_state: int | None = None,
) -> tuple[Recurrence, Float[Tensor, "batch head"]]:
    """The smallest recurrence whose map is the lower triangle of a given one, and its exact error.

    Sequential singular value decompositions, current-state form with D = 0, per head:

        G_t = [ Y_{t-1} without first row | M[t:, t] ],  G_t = U S Z^H,
        [A_t B_t] = Z_k^H,  Y_t = G_t Z_k,  C_t = first row of Y_t

    keeping k = the singular values above tolerance * (largest of the whole triangle); or, with
    `budget`, as few as keep the accumulated error within budget (an absolute Frobenius norm,
    certified); at most `max_state`. States per step vary; they are padded with zeros to the
    largest. A_t A_t^H + B_t B_t^H = I: input-normal.

    Returns the recurrence (dense A) and ||tril(M) - map||_F (batch, head), which the discarded
    singular values give exactly. Cost O(length^2 n^2) time, O(length n^2) memory, n the largest
    order. Source: Dewilde and van der Veen (1998), chapter 3; van der Veen (1993).
    """
    length = _square("dsf.realise", attention_map)
    if not 0 <= tolerance < 1:
        raise DsfValueError(f"dsf.realise: tolerance: expected in [0, 1), got {tolerance}.")
    batch, head = attention_map.shape[:2]
    wide = torch.complex128 if attention_map.is_complex() else torch.float64
    heads = [
        _realise_one(attention_map[b, h].tril().to(wide), tolerance, budget, max_state)
        for b in range(batch)
        for h in range(head)
    ]
    n = max([1, *(a.shape[0] for steps, _ in heads for a, _, _ in steps)])
    A = torch.zeros(batch * head, length, n, n, dtype=wide)
    B = torch.zeros(batch * head, length, n, 1, dtype=wide)
    C = torch.zeros(batch * head, length, 1, n, dtype=wide)
    for i, (steps, _) in enumerate(heads):
        for t, (a, b, c) in enumerate(steps):
            A[i, t, : a.shape[0], : a.shape[1]] = a
            B[i, t, : b.shape[0]] = b
            C[i, t, :, : c.shape[1]] = c

    def spread(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, head)).transpose(1, 2)

    error = torch.tensor([e for _, e in heads], dtype=torch.float64).reshape(batch, head)
    system = Recurrence(
        Dense(spread(A)), spread(B), spread(C), system="realised", gauge="input-normal"
    )
    return system, error


def _realise_one(
    lower: Tensor, tolerance: float, budget: float | None, max_state: int | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """A_t (n_t, n_{t-1}), B_t (n_t, 1), C_t (1, n_t) of every step, and the error's norm."""
    length = lower.shape[0]
    floor = tolerance * _largest_block_norm(lower)
    Y = lower.new_zeros(length + 1, 0)
    steps, lost = [], 0.0
    for t in range(length):
        G = torch.cat([Y[1:], lower[t:, t : t + 1]], dim=1)
        _, sigma, Zh = torch.linalg.svd(G, full_matrices=False)
        tails = torch.flip(torch.cumsum(torch.flip(sigma**2, (0,)), 0), (0,))
        if budget is None:
            keep = int((sigma > floor).sum())
        else:
            keep = int((tails > max(budget**2 - lost, 0.0) * (1 - 1e-12)).sum())
        keep = keep if max_state is None else min(keep, max_state)
        lost += float(tails[keep]) if keep < len(tails) else 0.0
        Z = Zh[:keep]
        Y = G @ Z.mH
        steps.append((Z[:, :-1], Z[:, -1:], Y[:1]))
    return steps, math.sqrt(lost)


def _largest_block_norm(lower: Tensor) -> float:
    """max_t sigma_1(M[t:, :t+1]) is at most the triangle's own norm, which is cheap to have."""
    return float(torch.linalg.matrix_norm(lower, 2)) if lower.numel() else 0.0


def reachability(
    recurrence: Recurrence, position: int = -1, *, strict: bool = False
) -> Inexact[Tensor, "batch head state key"]:
    """The matrix that maps an output row c at `position` to its weights over the keys, c R.

        R_t = [ A_t ... A_2 B_1, ..., A_t B_{t-1}, B_t ]

    `strict` leaves out the token itself (its column is zero). With several inputs the columns of
    a key stand side by side, (key input). The scan is run backwards on the identity, exact and
    safe for any decay. Cost O(t state^2), O(t state) where A is diagonal; memory state x t.
    Source: realisation theory.
    """
    r = recurrence.dense_factors()
    batch, length, head = r.lead_shape()
    t = range(length)[position]
    wide = torch.complex128 if r.dtype.is_complex else torch.float64
    n = r.n_state
    alone = isinstance(r.A, Identity | Scalar | Diagonal)  # then (A..A)^T is kept as its diagonal
    start = torch.ones(n, 1, dtype=wide) if alone else torch.eye(n, dtype=wide)
    onward = start.to(r.device).expand(batch, head, n, -1)  # (A..A)^T
    columns = []
    for j in range(t, -1, -1):
        b = _at(r.B, j).to(wide)
        own = (onward * b if alone else mm(onward.mT, b)).expand(batch, head, n, -1)
        columns.append(torch.zeros_like(own) if strict and j == t else own)
        onward = r.A.at(j).apply_transposed(onward).to(wide)
    return torch.cat(columns[::-1], dim=-1)


def _at(x: Tensor | object, t: int) -> Tensor:
    assert isinstance(x, Tensor)
    return x[:, t if x.shape[1] > 1 else 0]


def _square(function: str, attention_map: Tensor) -> int:
    query, key = attention_map.shape[-2:]
    if query != key:
        raise DsfShapeError(
            f"{function}: map: expected as many queries as keys, got "
            f"{named_sizes(('query', 'key'), (query, key))}."
        )
    return query


def _cuts(function: str, cuts: Sequence[int] | None, length: int) -> list[int]:
    chosen = list(range(1, length)) if cuts is None else [int(t) for t in cuts]
    if any(not 0 < t < length for t in chosen):
        raise DsfValueError(f"{function}: cuts: expected within 1..{length - 1}, got {chosen}.")
    return chosen
