"""How many pairs of real queries does a mixer confuse?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dsf.axes import to_xarray
from dsf.errors import DsfError, DsfShapeError, DsfValueError
from dsf.measures._frozen_rows import FrozenRows, frozen_rows
from dsf.measures._maps import TILE_BYTES, MapLike, MapSource, open_map
from dsf.measures.moduli import local_modulus
from dsf.shapes import Float
from dsf.wrappers import Gated

__all__ = ["confusion_counts"]

MEASURES = ()
_SCREEN = 1e-11
"""Pairs whose squared distance is this near its bound (in squares of the two lengths) are
measured again, entry by entry: the product form loses that much."""
_MOST_ROWS = 512


@dataclasses.dataclass(frozen=True)
class _Rules:
    epsilon: Sequence[float]
    eta: Sequence[float]
    relative: bool
    cosine: float
    ratio: float


def confusion_counts(
    system: MapLike,
    queries: Float[Tensor, "#batch time head _feature"] | None = None,
    *,
    epsilon: Sequence[float] = (1e-4, 1e-3, 1e-2),
    eta: Sequence[float] = (0.1, 0.5, 1.0),
    prefix: int | None = None,
    relative: bool = True,
    rule: str | None = None,
    cosine_gap: float = 1e-3,
    length_ratio: float = 1.5,
    moduli: int = 16,
    length: int | None = None,
) -> xr.Dataset:
    """Pairs of queries far apart whose weights are nearly the same, counted over real input.

        count(epsilon, eta) = #{ i < j : |a_i - a_j| <= epsilon (|a_i| + |a_j|) / 2
                                         and |q_i - q_j| >= eta rms|q| }
        rate = count / #{ i < j : |q_i - q_j| >= eta rms|q| }

    a_i the row of query i (weights over one set of keys), q_i the query after all that is done to
    queries, Euclidean norms, rms|q| = sqrt(mean_i |q_i|^2) of one head. Where rows see all keys
    all of them are compared. Causal rows have different keys: the first `prefix` keys (by default
    half of them) are frozen and all later queries evaluated on them: softmax over these keys;
    C_t R of a finite state R; a bare map's own entries. Rows that the system divides by their sum
    are divided anew, those that sum to one otherwise (InLine) are shifted; `rule` says so.
    A count for one input is the sum over its layers and heads.

    Parameters
    ----------
    system: a dsf system or a map. Gates do not matter.
    queries: (batch, time, head, feature). By default softmax's own, and of a finite state the
        output rows C_t; of other rows and of bare maps they must be given.
    epsilon, eta: the bounds, each a dimension of the outcome. relative=False takes epsilon itself
        as the distance of rows, whatever their length.
    cosine_gap, length_ratio: for `near_rays`, the share of pairs with cos(q_i, q_j) at least
        1 - cosine_gap and lengths at least length_ratio apart.
    moduli: so many queries, evenly spaced, get their local modulus (over their own keys, in the
        space of `local_modulus`); 0 for none.

    Returns a Dataset: `count`, `rate` (batch, head, epsilon, eta), `far_pairs` (batch, head, eta),
    `near_rays`, `modulus_min`, `modulus_median` (batch, head), NaN where there is no pair, or
    where rows are not made from queries. attrs hold every parameter. Raises DsfShapeError,
    DsfValueError. Cost O(query^2 (key + feature)), by tiles of 512 x 512 pairs at most: never a
    query x query x key array. Source: Han et al. (2024), figure 2; the protocol is ours, since
    theirs is not published.
    """
    name = "dsf.confusion_counts"
    _check_bounds(name, epsilon, eta)
    inner = system.system if isinstance(system, Gated) else system
    source = open_map(inner, length=length)
    if source.lead_axes != ("batch", "head"):
        raise DsfShapeError(
            f"{name}: system: expected a map (batch, head, query, key), got axes "
            f"{source.lead_axes}; take one input, output and channel."
        )
    rows = frozen_rows(inner, source, prefix, rule, name)
    q = _queries(name, rows, queries, source)
    rules = _Rules(tuple(epsilon), tuple(eta), relative, cosine_gap, length_ratio)
    count, far, rays = _count(rows, q, rules, source.lead_shape)
    n = len(rows.positions)
    pairs = n * (n - 1) // 2
    meta = {
        **source.attrs, "units": "1", "method": "pairs by tiles, float64", "space":
        rows.space if queries is None else "query as given", "relative": relative, "n_query": n,
        "n_key": rows.n_key, "pairs": pairs, "sum_rule": rows.rule, "cosine_gap": cosine_gap,
        "length_ratio": length_ratio, "prefix": -1 if rows.n_key == source.n_key else rows.n_key,
    }  # fmt: skip
    coords = {"epsilon": ("epsilon", list(epsilon)), "eta": ("eta", list(eta))}

    def label(values: Tensor, name: str, axes: tuple[str, ...], text: str) -> xr.DataArray:
        kept = {k: v for k, v in coords.items() if k in axes}
        return to_xarray(values, ("batch", "head", *axes), name=name, coords=kept,
                         attrs={**meta, "long_name": text})  # fmt: skip

    both = ("epsilon", "eta")
    least, middle = _moduli(inner, rows.positions, moduli, source, length)
    rate = count / far[:, :, None].double()  # 0 / 0 is NaN: no pair, no rate
    return xr.Dataset({
        "count": label(count, "count", both, "confused pairs of queries"),
        "rate": label(rate, "rate", both, "share of the far pairs that are confused"),
        "far_pairs": label(far, "far_pairs", ("eta",), "pairs of queries far apart"),
        "near_rays": label(rays.double() / pairs if pairs else rays * torch.nan, "near_rays", (),
                           "share of pairs on nearly one ray, lengths apart"),
        "modulus_min": label(least, "modulus_min", (), "smallest local modulus"),
        "modulus_median": label(middle, "modulus_median", (), "median local modulus"),
    })  # fmt: skip


def _check_bounds(name: str, epsilon: Sequence[float], eta: Sequence[float]) -> None:
    for what, values in (("epsilon", epsilon), ("eta", eta)):
        if not len(values) or any(not x >= 0 for x in values):
            raise DsfValueError(
                f"{name}: {what}: expected numbers of at least 0, one or more, got {list(values)}."
            )


def _queries(name: str, rows: FrozenRows, given: Tensor | None, source: MapSource) -> Tensor:
    """(batch, head, query, feature) in float64, of the rows compared."""
    batch, head = source.lead_shape
    if given is None:
        if rows.queries is None:
            raise DsfValueError(
                f"{name}: queries: expected a tensor (batch, time, head, feature), got None; "
                f"these rows do not hold their queries."
            )
        q = rows.queries
    elif given.shape[0] not in (1, batch) or given.shape[1:3] != (source.n_query, head):
        raise DsfShapeError(
            f"{name}: queries: expected axes (batch={batch}, time={source.n_query}, head={head}, "
            f"feature), got {tuple(given.shape)}; they are fixed by system."
        )
    else:
        q = given.detach().double()[:, rows.positions]
    return q.transpose(1, 2).expand(batch, head, -1, -1)


def _count(
    rows: FrozenRows, q: Tensor, rules: _Rules, lead: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """count (batch, head, epsilon, eta), far pairs (batch, head, eta), near rays (batch, head)."""
    n = len(rows.positions)
    rms = q.square().sum(-1).mean(-1).sqrt()[..., None, None]
    count = torch.zeros(*lead, len(rules.epsilon), len(rules.eta), dtype=torch.int64)
    far = torch.zeros(*lead, len(rules.eta), dtype=torch.int64)
    rays = torch.zeros(*lead, dtype=torch.int64)
    for one, two, a, b in _tiles(rows, n, math.prod(lead)):
        order = torch.arange(one.start, one.stop)[:, None] < torch.arange(two.start, two.stop)
        p, r = q[..., one.start : one.stop, :], q[..., two.start : two.stop, :]
        apart = _distance(p, r)
        away = [(apart >= eta * rms) & order for eta in rules.eta]
        far += torch.stack([x.sum((-2, -1)) for x in away], -1)
        rays += (_on_ray(p, r, rules) & order).sum((-2, -1))
        for i, near in enumerate(_near(a, b, rules)):
            count[..., i, :] += torch.stack([(near & x).sum((-2, -1)) for x in away], -1)
    return count, far, rays


def _tiles(rows: FrozenRows, n: int, lead: int) -> Iterator[tuple[range, range, Tensor, Tensor]]:
    """Pairs of row blocks i <= j; one block is held while the others are read past it."""
    fits = TILE_BYTES // (8 * max(lead, 1) * max(rows.n_key, 1))
    block = max(1, min(fits, _MOST_ROWS))
    blocks = [range(i, min(i + block, n)) for i in range(0, n, block)]
    for i, one in enumerate(blocks):
        a = _real(rows.read(one))
        for two in blocks[i:]:
            yield one, two, a, a if two is one else _real(rows.read(two))


def _real(weights: Tensor) -> Tensor:
    return torch.view_as_real(weights).flatten(-2) if weights.is_complex() else weights


def _distance(p: Tensor, r: Tensor) -> Tensor:
    return torch.cdist(p, r, compute_mode="donot_use_mm_for_euclid_dist")


def _on_ray(p: Tensor, r: Tensor, rules: _Rules) -> Tensor:
    one, two = torch.linalg.vector_norm(p, dim=-1), torch.linalg.vector_norm(r, dim=-1)
    sizes = one[..., None], two[..., None, :]
    aligned = p @ r.mT >= (1 - rules.cosine) * sizes[0] * sizes[1]
    least, most = torch.minimum(*sizes), torch.maximum(*sizes)
    return aligned & (least > 0) & (most >= rules.ratio * least)


def _near(a: Tensor, b: Tensor, rules: _Rules) -> Iterator[Tensor]:
    """For each epsilon, which pairs of rows lie within it.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b screens; pairs near the bound are measured entry by entry.
    """
    one = torch.linalg.vector_norm(a, dim=-1)[..., None]
    two = torch.linalg.vector_norm(b, dim=-1)[..., None, :]
    square = one.square() + two.square() - 2 * a @ b.mT
    slack = _SCREEN * (one + two).square()
    for epsilon in rules.epsilon:
        bound = epsilon * (one + two) / 2 if rules.relative else torch.full_like(square, epsilon)
        near = square <= bound.square()
        at = ((square - bound.square()).abs() <= slack).nonzero(as_tuple=True)
        for part in zip(*(x.split(4096) for x in at), strict=True):
            i, j = (*part[:-2], part[-2]), (*part[:-2], part[-1])
            near[part] = torch.linalg.vector_norm(a[i] - b[j], dim=-1) <= bound[part]
        yield near


def _moduli(
    system: MapLike, positions: list[int], count: int, source: MapSource, length: int | None
) -> tuple[Tensor, Tensor]:
    """Smallest and median local modulus (batch, head) of evenly spaced queries."""
    blank = torch.full(source.lead_shape, torch.nan, dtype=torch.float64)
    if not count or not positions or isinstance(system, Tensor | xr.DataArray):
        return blank, blank
    step = max(1, math.ceil(len(positions) / count))
    chosen: Any = positions[::-1][::step]
    try:
        values = torch.from_numpy(local_modulus(system, chosen, length=length).values.copy())
    except DsfError:  # rows that are given have none
        return blank, blank
    known = torch.where(values.isnan(), torch.inf, values).amin(-1)
    return known.masked_fill(known == torch.inf, torch.nan), values.nanmedian(-1).values
