"""Rows of one system over one common set of keys, and how rows sum to one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.factors import MixingRows, SoftmaxRows
from dsf.gramians import reachability
from dsf.measures._maps import MapLike, MapSource, open_map, widened
from dsf.measures._rows import row_sums
from dsf.measures._state_queries import division, reach_at, real_map
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, core, total_length

RULES = ("divide", "shift", "none")
"""How a row over fewer keys is made to sum to one again: by a factor, by a constant, or not."""


@dataclasses.dataclass(frozen=True)
class FrozenRows:
    """Rows (batch, head, query, key) over the same keys for every query.

    positions: of the queries, in the system's own time; n_key keys; read(range of rows).
    queries (batch, query, head, feature): those that the system itself holds, if any.
    """

    positions: list[int]
    n_key: int
    read: Callable[[range], Tensor]
    queries: Tensor | None
    space: str
    rule: str


def frozen_rows(
    system: MapLike, source: MapSource, prefix: int | None, rule: str | None, name: str
) -> FrozenRows:
    """All rows of a map that sees every key; of a causal one, later rows over a frozen prefix.

    The prefix is the first `prefix` keys (anticausal: the last), the rows those of all later
    queries: softmax over these keys alone; for a finite state C_t R with R the state that the
    prefix has reached; of a bare map M[t, :prefix]. Then summed to one by `rule`.
    """
    system = system.system if isinstance(system, Gated) else system
    if isinstance(system, Anticausal):
        return _backwards(system, source, prefix, rule, name)
    n = source.n_query
    if source.attrs["direction"] == "bidirectional":
        if prefix is not None:
            raise DsfValueError(
                f"{name}: prefix: expected None, since all rows see all keys, got {prefix}."
            )
        queries, space = _held(system)
        return FrozenRows(list(range(n)), source.n_key,
                          lambda rows: widened(source.read(rows, range(source.n_key))), queries,
                          space, "none")  # fmt: skip
    if prefix is None:
        prefix = max(n // 2, 1)
    if not 1 <= prefix <= n:
        raise DsfValueError(f"{name}: prefix: expected 1..{n}, got {prefix}.")
    positions = list(range(prefix, n))
    queries, space = _held(system)
    queries = None if queries is None else queries[:, prefix:]
    rule = sum_rule(system, source, rule, name)
    if isinstance(system, Recurrence) and isinstance(system.C, SoftmaxRows):
        one = _over_prefix(system.C, prefix)
        return FrozenRows(
            positions, prefix, lambda rows: widened(one.tile(slice(rows.start, rows.stop),
                                                             slice(0, prefix))),
            queries, space, "softmax over the prefix")  # fmt: skip
    if isinstance(system, Recurrence) and not isinstance(system.C, MixingRows):
        read = _state_reader(system, prefix)
    else:
        read = _map_reader(source, prefix)

    return FrozenRows(positions, prefix, lambda rows: summed_to_one(read(rows), rule), queries,
                      space, rule)  # fmt: skip


def _backwards(
    system: Anticausal, source: MapSource, prefix: int | None, rule: str | None, name: str
) -> FrozenRows:
    r = system.recurrence
    if isinstance(r.C, MixingRows):
        raise DsfUnsupportedError(
            f"{name}: system: expected rows that are not cut backwards in time, got "
            f"{type(r.C).__name__}. Measure the map with all keys."
        )
    flipped = r.flip_time()
    rows = frozen_rows(flipped, open_map(flipped, length=source.n_query), prefix, rule, name)
    positions = [source.n_query - 1 - t for t in rows.positions]
    return dataclasses.replace(rows, positions=positions)


def _over_prefix(C: SoftmaxRows, prefix: int) -> SoftmaxRows:
    """The later queries, each over the first `prefix` keys alone, however far they are."""
    later = C.time_slice(prefix, C.shape[1])

    def cut(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[-1] == 1 else x[..., :prefix]

    wide = [x if x is None else x.double() for x in (cut(later.bias), later.sink)]
    return dataclasses.replace(
        later, query=later.query.double(), key=C.key[:, :prefix].double(), bias=wide[0],
        sink=wide[1], key_mask=cut(C.key_mask), scale=C.logit_scale,
        window=None,
    )  # fmt: skip


def _map_reader(source: MapSource, prefix: int) -> Callable[[range], Tensor]:
    def read(rows: range) -> Tensor:
        later = range(prefix + rows.start, prefix + rows.stop)
        return widened(source.read(later, range(prefix)))

    return read


def _state_reader(r: Recurrence, prefix: int) -> Callable[[range], Tensor]:
    R = reachability(r, prefix - 1)
    dense = r.dense_factors()
    assert isinstance(dense.C, Tensor)
    C = dense.C

    def read(rows: range) -> Tensor:
        at = slice(prefix + rows.start, prefix + rows.stop) if C.shape[1] > 1 else slice(None)
        c = widened(C[:, at, :, 0]).transpose(1, 2)
        c = c.expand(-1, -1, len(rows), -1) if C.shape[1] == 1 else c
        weights = c.to(torch.promote_types(c.dtype, R.dtype)) @ R.to(
            torch.promote_types(c.dtype, R.dtype))  # fmt: skip
        return weights.real if r.real_output and weights.is_complex() else weights

    return read


def _held(system: MapLike) -> tuple[Tensor | None, str]:
    """The queries of every position (batch, time, head, feature), and the space they live in."""
    if not isinstance(system, Recurrence | Bidirectional):
        return None, "query"
    r = core(system)
    if isinstance(r.C, SoftmaxRows):
        return r.C.query.detach().double(), "query"
    if isinstance(r.C, MixingRows):
        return None, "query"
    dense = r.dense_factors()
    assert isinstance(dense.C, Tensor)
    c = widened(dense.C[:, :, :, 0])
    _, c = real_map(r, c, c)
    c = torch.view_as_real(c).flatten(-2) if c.is_complex() else c
    return c.expand(-1, total_length(system), r.lead_shape()[2], -1), "output row C_t"


def sum_rule(system: MapLike, source: MapSource, given: str | None, name: str) -> str:
    """The rule by which a system's rows sum to one over fewer keys, as given or as they show.

    Softmax and rows divided by their sum: divide. Rows of a finite state that sum to one without
    dividing (InLine): shift, by the constant that takes the place of the mean. Bare maps: divide
    where all rows sum to one and none has a negative weight, shift where some have.
    """
    if given is not None:
        if given not in RULES:
            raise DsfValueError(f"{name}: rule: expected one of {RULES} or None, got {given!r}.")
        return given
    system = system.system if isinstance(system, Gated) else system
    if isinstance(system, Recurrence | Anticausal | Bidirectional):
        r = core(system)
        if isinstance(r.C, SoftmaxRows):
            return "divide"
        if not isinstance(r.C, MixingRows):
            last = r.length - 1 if not isinstance(system, Anticausal) else 0
            flags = _state_flags(system, last)
            if all(flag is not False for flag in flags):
                return "divide"
            return "shift" if _rows_sum_to_one(source)[0] else "none"
    to_one, signed = _rows_sum_to_one(source)
    if not to_one:
        return "none"
    return "shift" if signed else "divide"


def _state_flags(system: Recurrence | Anticausal | Bidirectional, last: int) -> list[bool | None]:
    R, _ = real_map(core(system), *reach_at(system, last))
    return [flag for row in division(system, R) for flag in row]


def _rows_sum_to_one(source: MapSource) -> tuple[bool, bool]:
    """Whether all rows with a weight sum to one, and whether some weight is negative."""
    sums = row_sums(source)
    total = sums.mean * sums.count
    alive = sums.absolute > 0
    near = math.sqrt(torch.finfo(torch.float32).eps)
    to_one = bool(((total - 1).abs()[alive] <= near).all())
    return to_one, bool((sums.negative > 0).any())


def summed_to_one(weights: Tensor, rule: str) -> Tensor:
    """Rows (..., key) made to sum to one by a rule; rows without a sum stay as they are."""
    if rule == "none" or not weights.shape[-1]:
        return weights
    total = weights.sum(-1, keepdim=True)
    if rule == "shift":
        return weights + (1 - total) / weights.shape[-1]
    return weights / total.masked_fill(total == 0, 1.0)
