"""Chosen rows of a map, each with all its keys, at a cost that does not grow with the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsf.errors import DsfTypeError, DsfValueError
from dsf.measures._chunks import causal_form, chunks_of, scannable
from dsf.measures._maps import MapSource, widened
from dsf.memory import require_memory
from dsf.recurrence import Recurrence
from dsf.wrappers import Bidirectional, Gated, System, core

_BYTES = 2**26
"""Rows are read in blocks of about this size: each block is one pass over a recurrence."""
_SEED = 0

Queries = int | Sequence[int]
"""Which rows: their positions (0-based), or how many to draw, one from each of as many equal
stretches."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Positions of the rows that are measured, ascending, and how they were chosen."""

    positions: list[int]
    described: str

    def __len__(self) -> int:
        return len(self.positions)


def chosen_rows(function: str, queries: Queries | None, total: int) -> Rows | None:
    """The rows asked for, None for all. Raises DsfTypeError, DsfValueError with `function`.

    A number draws a stratified sample with a fixed seed: one row, at random, from each of so many
    equal stretches, so that the plain standard error of a mean over them is on the safe side.
    """
    if queries is None:
        return None
    if isinstance(queries, bool) or not isinstance(queries, int | Sequence):
        raise DsfTypeError(
            f"{function}: queries: expected a number of rows or a list of positions, got "
            f"{queries!r}."
        )
    if isinstance(queries, int):
        if not 1 <= queries <= total:
            raise DsfValueError(
                f"{function}: queries: expected between 1 and {total} rows, got {queries}."
            )
        generator = torch.Generator().manual_seed(_SEED)
        edges = torch.arange(queries + 1) * total // queries
        width = edges[1:] - edges[:-1]
        drawn = torch.rand(queries, generator=generator, dtype=torch.float64)
        at = edges[:-1] + (drawn * width).long()
        return Rows(at.tolist(), f"{queries} of {total} rows, one from each equal stretch")
    wrong = [q for q in queries if not 0 <= q < total]
    if wrong or not len(queries):
        raise DsfValueError(
            f"{function}: queries: expected positions within 0..{total - 1}, got "
            f"{wrong or list(queries)}."
        )
    return Rows(sorted(set(queries)), f"{len(set(queries))} of {total} rows, as asked")


def all_rows(total: int) -> Rows:
    """Every row."""
    return Rows(list(range(total)), "every row")


def row_tiles(
    source: MapSource, rows: Rows, block: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions, weights (*lead, row, key), seen), so many rows at a time.

    A recurrence is read by adjoint steps: one pass over the sequence for each block of rows,
    O(length x state x (state + chunk + rows)); rows of a softmax at O(length x width) each.
    """
    one = 8 * math.prod(source.lead_shape) * max(source.n_key, 1)
    size = max(1, _BYTES // max(one, 1)) if block is None else block
    for start in range(0, len(rows), size):
        at = rows.positions[start : start + size]
        require_memory(
            "dsf.measures", "rows", (*source.lead_axes, "query", "key"),
            (*source.lead_shape, len(at), source.n_key), torch.float64,
            advice="Measure fewer heads or fewer rows at a time (block=).",
        )  # fmt: skip
        tile = None if source.system is None else _read_system(source.system, at)
        if tile is None:
            tile = torch.cat([source.read(r, range(source.n_key)) for r in _runs(at)], -2)
        seen = torch.cat([source.visible(r, range(source.n_key)) for r in _runs(at)], -2)
        yield torch.tensor(at), widened(tile), seen


def _read_system(system: System, at: list[int]) -> Tensor | None:
    """Rows of any system made of recurrences with dense coefficients; None for other systems."""
    if isinstance(system, Gated):
        inner = _read_system(system.system, at)
        if inner is None or inner.ndim > 4:
            return None
        gate = system.gate[:, at] if system.gate.shape[1] > 1 else system.gate
        gate = gate.permute(0, 2, 3, 1)[..., None]
        return gate[:, :, 0] * inner if gate.shape[2] == 1 else gate * inner[:, :, None]
    if isinstance(system, Bidirectional):
        one, two = _read_system(system.causal, at), _read_system(system.anticausal, at)
        return None if one is None or two is None else one + two
    if not scannable(system):
        return None
    r, backwards, strict = causal_form(system)
    length = core(system).length
    if not backwards:
        return _read_rows(r, length, at, strict)
    tile = _read_rows(r, length, [length - 1 - t for t in reversed(at)], strict)
    return tile.flip((-2, -1))


def _read_rows(r: Recurrence, length: int, at: list[int], strict: bool) -> Tensor:
    """Backwards over the chunks: each row is carried from its own step to the first key."""
    where, pieces, carried = torch.tensor(at), [], None
    for chunk in chunks_of(r, length, backwards=True):
        if carried is None:
            shape = (*chunk.read.shape[:2], len(at), chunk.read.shape[-1])
            carried = chunk.read.new_zeros(shape)
        tile = carried @ chunk.write
        carried = carried @ chunk.carry
        inside = ((where >= chunk.steps.start) & (where < chunk.steps.stop)).nonzero()[:, 0]
        local = where[inside] - chunk.steps.start
        own = without_own(chunk.local, r.D, chunk.steps) if strict else chunk.local
        tile[:, :, inside] = own[:, :, local]
        carried[:, :, inside] = chunk.read[:, :, local]
        pieces.append(tile)
    return torch.cat(pieces[::-1], -1)


def without_own(local: Tensor, D: Tensor | None, steps: range) -> Tensor:
    """A chunk's own weights without what a key adds to its own row through the state."""
    below = local.tril(-1)
    if D is None:
        return below
    own = D[:, steps.start : steps.stop] if D.shape[1] > 1 else D
    own = own[..., 0, 0].transpose(1, 2).to(below.dtype).expand(*below.shape[:2], len(steps))
    return below + torch.diag_embed(own)


def _runs(at: list[int]) -> list[range]:
    """Positions as ranges of neighbours."""
    found: list[range] = []
    for t in at:
        if found and found[-1].stop == t:
            found[-1] = range(found[-1].start, t + 1)
        else:
            found.append(range(t, t + 1))
    return found
