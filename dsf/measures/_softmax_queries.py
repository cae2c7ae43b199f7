"""Which queries does a softmax row tell apart? The affine rank of the keys that it sees.

`part` is the half of the rows that a system uses: those of a causal one end at its own position.
Rows that are themselves causal lose nothing by that; others are cut without being divided anew.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsf.factors import SoftmaxRows
from dsf.measures._maps import seen_keys
from dsf.measures._verdicts import NO, RANK_WORDS, UNDECIDED, decide, tolerances
from dsf.mixing_rows import MixingRows, Part


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome for one row: verdict, its margin, why, and two queries (pair, feature)."""

    verdict: int
    margin: float
    reason: str
    pair: Tensor | None
    difference: float


def examine(
    rows: SoftmaxRows, batch: int, head: int, position: int, *, part: Part,
    unit_roundoff: float | None,
) -> Finding:  # fmt: skip
    """The verdict for one query position of one head.

    w(p) = w(q) iff K (p - q) = c 1 for some c: injective iff [K, 1] has rank d + 1, that is iff
    the centred keys have rank d. A sink fixes c = 0: then iff K has rank d. The margin is the
    smallest singular value after each feature is scaled to norm 1.
    """
    keys = keys_seen(rows, batch, head, position, part=part)
    n, d = keys.shape
    query = _query(rows, batch, head, position)
    # keys that are cut off hold a share of the sum: no row then says what its sum was
    cut = int(_seen(rows, batch, head, position, part="full").sum()) - n
    offset = (rows.sink is None or cut > 0) and rows.softcap is None
    needed = d + 1 if offset and not cut else d
    low, high = tolerances(rows.key.dtype, d, unit_roundoff)
    centred = keys - keys.mean(0) if offset and n else keys
    norms = torch.linalg.vector_norm(keys, dim=0)
    norms = norms.masked_fill(norms == 0, 1.0)
    _, sigma, Vh = torch.linalg.svd(centred / norms, full_matrices=True)
    margin = float(sigma[-1]) if n >= needed and len(sigma) == d else 0.0
    direction = (Vh[-1] / norms) if d else query
    if n < needed:
        verdict, reason = NO, f"{n} keys, at least {needed} are necessary"
        if cut:
            return Finding(NO, 0.0, reason, None, float("nan"))
    else:
        verdict = int(decide(torch.tensor(margin), low, high))
        what = "affine rank of the keys" if offset else "rank of the keys"
        reason = f"{what} {RANK_WORDS[verdict]}"
    if cut and verdict == NO:
        verdict, reason = UNDECIDED, f"{reason}, but {cut} keys of the sum are cut off"
    if rows.softcap is not None and rows.sink is None and verdict != NO:
        # a capped logit may shift by a constant along a curve, which no rank excludes
        verdict, reason = UNDECIDED, f"{reason}, but logits are capped"
    if verdict != NO:
        return Finding(verdict, margin, reason, None, float("nan"))
    pair = torch.stack([query, query + _stretch(query, direction)])
    weights = softmax_weights(rows, batch, head, position, pair, part=part)
    difference = float((weights[0] - weights[1]).abs().max()) if n else 0.0
    return Finding(verdict, margin, reason, pair, difference)


def _stretch(query: Tensor, direction: Tensor) -> Tensor:
    """`direction` as long as the query is (or of length 1): a difference worth the name."""
    size = torch.linalg.vector_norm(query)
    size = size if float(size) > 0 else torch.ones_like(size)
    return direction / torch.linalg.vector_norm(direction) * size


def keys_seen(rows: SoftmaxRows, batch: int, head: int, position: int, *, part: Part) -> Tensor:
    """The keys (n, d) in float64 that this row may use, of this head's group."""
    keep = _seen(rows, batch, head, position, part=part)
    group = head // (rows.query.shape[2] // rows.key.shape[2])
    return _of_batch(rows.key, batch)[keep, group].double().detach()


def _of_batch(x: Tensor, batch: int) -> Tensor:
    return x[batch if x.shape[0] > 1 else 0]


def _query(rows: SoftmaxRows, batch: int, head: int, position: int) -> Tensor:
    return _of_batch(rows.query, batch)[position, head].double().detach()


def _seen(rows: SoftmaxRows, batch: int, head: int, position: int, *, part: Part) -> Tensor:
    seen = seen_keys(rows, range(position, position + 1), range(rows.n_key))
    if seen.ndim == 4:
        seen = seen[min(batch, seen.shape[0] - 1), min(head, seen.shape[1] - 1)]
    return seen[0] & in_part(rows, position, part, seen.device)


def in_part(
    rows: MixingRows, position: int, part: Part, device: torch.device | None = None
) -> Tensor:
    """Which keys a row of this half of the map reaches."""
    lag = rows.query_start + position - torch.arange(rows.n_key, device=device)
    if part == "full":
        return torch.ones_like(lag, dtype=torch.bool)
    return {"causal": lag >= 0, "anticausal": lag <= 0, "strict": lag < 0}[part]


def softmax_weights(
    rows: SoftmaxRows, batch: int, head: int, position: int, queries: Tensor, *, part: Part
) -> Tensor:
    """The weights (pair, key) in float64 that this row would have for other queries."""
    one = _one_row(rows, batch, head, position)
    many = dataclasses.replace(
        one, query=queries[:, None, None].to(torch.float64), query_start=one.query_start,
        key=one.key.expand(len(queries), -1, -1, -1),
        bias=None if one.bias is None else one.bias.expand(len(queries), -1, -1, -1),
        key_mask=None if one.key_mask is None else one.key_mask.expand(len(queries), -1),
    )  # fmt: skip
    weights = many.tile(slice(0, 1), slice(0, rows.n_key))[:, 0, 0]
    return weights.masked_fill(~in_part(rows, position, part, weights.device), 0)


def _one_row(rows: SoftmaxRows, batch: int, head: int, position: int) -> SoftmaxRows:
    """The same row as a system of one batch, one head and one query."""
    group = head // (rows.query.shape[2] // rows.key.shape[2])

    def pick(x: Tensor, axis: int, index: int) -> Tensor:
        return x.narrow(axis, index if x.shape[axis] > 1 else 0, 1)

    bias = rows.bias
    if bias is not None:
        bias = bias.detach().double()
        bias = pick(pick(pick(bias, 0, batch), 1, head), 2, position)
    return dataclasses.replace(
        rows,
        query=_query(rows, batch, head, position)[None, None, None],
        key=_of_batch(rows.key, batch)[None, :, group : group + 1].detach().double(), bias=bias,
        key_mask=None if rows.key_mask is None else pick(rows.key_mask, 0, batch),
        sink=None if rows.sink is None else rows.sink[head : head + 1].detach().double(),
        scale=rows.logit_scale, query_start=rows.query_start + position,
    )  # fmt: skip


def softmax_jacobian(
    rows: SoftmaxRows, batch: int, head: int, position: int, *, part: Part
) -> Tensor:
    """d weights / d query (key, feature) in float64: scale (diag(w) - w w^T) diag(cap') K."""
    query = _query(rows, batch, head, position)
    w = softmax_weights(rows, batch, head, position, query[None], part="full")[0]
    group = head // (rows.query.shape[2] // rows.key.shape[2])
    K = _of_batch(rows.key, batch)[:, group].double().detach() * rows.logit_scale
    if rows.softcap is not None:
        K = K * (1 - torch.tanh(K @ query / rows.softcap) ** 2)[:, None]
    K = torch.nan_to_num(K)  # masked keys may hold anything
    J = w[:, None] * (K - (w @ K))
    return J.masked_fill(~in_part(rows, position, part, J.device)[:, None], 0)
