"""Blocks of a map across a cut in time: their singular values, and how many of them count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dsf.axes import named_sizes
from dsf.errors import DsfShapeError, DsfValueError
from dsf.shapes import Float, Inexact, Int

Side = Literal["lower", "upper"]
Criterion = Literal["sigma", "frobenius", "absolute"]
Form = Literal["current", "direct", "predictor"]
"""How a state meets the output: see `dsf.realise`."""


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
    length = square("dsf.block_singular_values", attention_map)
    chosen = check_cuts("dsf.block_singular_values", cuts, length)
    lead = attention_map.shape[:-2]
    rank = max((min(t, length - t) for t in chosen), default=0)
    out = attention_map.new_zeros(
        *lead, len(chosen), rank, dtype=attention_map.dtype.to_real())  # fmt: skip
    lower = side == "lower"
    for i, t in enumerate(chosen):
        block = attention_map[..., t:, :t] if lower else attention_map[..., :t, t:]
        out[..., i, : min(t, length - t)] = torch.linalg.svdvals(block)
    return out


def epsilon_ranks(
    singular_values: Float[Tensor, "*lead cut rank"],
    tolerance: float,
    *,
    criterion: Criterion = "sigma",
    scale: Float[Tensor, "*lead"] | None = None,
) -> Float[Tensor, "*lead cut"]:
    """How many singular values of each cut count at a relative tolerance, as whole numbers.

    "sigma": those above tolerance * (the largest over all cuts). "frobenius": the smallest n with
    sqrt(sum_{k>n} sigma_k^2) <= tolerance * scale, scale by default the largest Frobenius norm of
    a cut; with scale the norm of the map's triangle, no recurrence with fewer states comes within
    `tolerance` of it (realisation bound: the error is at least the tail of any cut). A map of
    zeros has rank 0. "absolute": those above the tolerance itself. Never relative to one block
    alone, which keeps noise.
    """
    s = singular_values
    if criterion == "absolute":
        return (s > tolerance).sum(-1).to(torch.float64)
    if criterion == "sigma":
        top = s.amax((-2, -1)) if s.numel() else s.new_zeros(s.shape[:-2])
        return (s > tolerance * top[..., None, None]).sum(-1).to(torch.float64)
    tails = torch.flip(torch.cumsum(torch.flip(s**2, (-1,)), -1), (-1,)).sqrt()
    if scale is None:
        scale = tails[..., 0].amax(-1) if tails.numel() else s.new_zeros(s.shape[:-2])
    return (tails > tolerance * scale[..., None, None]).sum(-1).to(torch.float64)


def minimal_states(
    attention_map: Inexact[Tensor, "*lead query key"],
    tolerance: float = 1e-10,
    *,
    form: Form = "current",
) -> Int[Tensor, "*lead time"]:
    """The fewest states that any recurrence of this form carries after each step, by ranks.

        predictor  rank M[t+1:, :t]                      y_t = C_t h_{t-1} + D_t u_t
        current    rank M[t:, :t]                        y_t = C_t h_t
        direct     rank M[t:, :t-1] + rank M[t+1:, :t] - rank M[t+1:, :t-1]
                                                         y_t = C_t h_t + D_t u_t

    for t = 1..length (rows and columns counted from 1, both ends included). They differ by one
    state a step at most. Singular values count above tolerance times the largest one of the
    triangle; entries above the diagonal do not matter (reverse rows and columns to ask for them).
    Returns whole numbers (*lead, time). Cost: one SVD a step. Raises DsfShapeError unless the map
    is square. Source: realisation theory; Dewilde and van der Veen (1998), chapter 3.
    """
    length = square("dsf.minimal_states", attention_map)
    M = attention_map.tril()
    part = M.tril(-1) if form == "predictor" else M
    empty = M.new_zeros(M.shape[:-2], dtype=M.dtype.to_real())
    floor = tolerance * (torch.linalg.matrix_norm(part, 2) if length else empty)

    def rank(first_row: int, n_key: int) -> Tensor:
        block = M[..., first_row:, :n_key]
        if not block.shape[-1] * block.shape[-2]:
            return torch.zeros(M.shape[:-2], dtype=torch.int64, device=M.device)
        return (torch.linalg.svdvals(block) > floor[..., None]).sum(-1)

    count = {
        "predictor": lambda t: rank(t, t),
        "current": lambda t: rank(t - 1, t),
        "direct": lambda t: rank(t - 1, t - 1) + rank(t, t) - rank(t, t - 1),
    }[form]
    found = [count(t) for t in range(1, length + 1)]
    return torch.stack(found, -1) if found else torch.zeros(*M.shape[:-2], 0, dtype=torch.int64)


def square(function: str, attention_map: Tensor) -> int:
    """The length of a square map, else DsfShapeError in the name of `function`."""
    query, key = attention_map.shape[-2:]
    if query != key:
        raise DsfShapeError(
            f"{function}: map: expected as many queries as keys, got "
            f"{named_sizes(('query', 'key'), (query, key))}."
        )
    return query


def check_cuts(
    function: str, cuts: Sequence[int] | None, length: int, *, strict: bool = True
) -> list[int]:
    """The cuts asked for, all by default; DsfValueError on those that are none."""
    last = length - 1 if strict else length
    chosen = list(range(1, last + 1)) if cuts is None else [int(t) for t in cuts]
    if any(not 0 < t <= last for t in chosen):
        raise DsfValueError(f"{function}: cuts: expected within 1..{last}, got {chosen}.")
    return chosen
