"""Row sums of a map by scans: means and squares from the keys' mean and Gram matrix."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsf.measures._chunks import Chunk, causal_form, chunks_of, scannable
from dsf.measures._maps import MapSource
from dsf.measures._row_tiles import without_own
from dsf.measures._row_totals import RowSums
from dsf.wrappers import core

_GRAM_BYTES = 2**29
_FEW_STATES = 64


def scanned_sums(
    source: MapSource, chunk: int | None = None, *, signed: bool = False
) -> RowSums | None:
    """The sums of every row in O(length x state x (state + chunk)), None where scans cannot.

    With X the columns that the keys so far have left in the state, row t of the past is c X and

        sum_j w_j = c sum_j X_j,   sum_j |w_j - mean|^2 = c G c^H,   G = sum_j (X_j - m)(X_j - m)^H

    G and the mean m are carried over a chunk as the state is. G is centred: nothing cancels
    where a row is nearly uniform. `signed`: sums of |w| too, |c| sum_j |X_j|, which holds for one
    real state, and where neither c nor X has a negative entry.
    """
    system = source.system
    if not scannable(system) or source.n_query == 0:
        return None
    r, backwards, strict = causal_form(system)
    width = r.n_state * (2 if r.dtype.is_complex and r.real_output else 1)
    gram = 16 * math.prod(source.lead_shape) * width**2
    too_wide = width > max(_FEW_STATES, source.n_query) or gram > _GRAM_BYTES
    if too_wide or (signed and (backwards or r.dtype.is_complex)):
        return None
    past, parts = None, []
    for piece in chunks_of(r, core(system).length, chunk):
        if strict:
            local = without_own(piece.local, r.D, piece.steps)
            piece = dataclasses.replace(piece, local=local)
        if signed and not _one_sign(piece):
            return None
        past = _Past.empty(piece) if past is None else past
        own = _local(piece, hidden=strict and r.D is None, signed=signed)
        parts.append(past.rows(piece, signed=signed).merge(own))
        past = past.after(piece)
    sums = dataclasses.replace(RowSums.cat(parts), scanned=True)
    if not bool(torch.isfinite(sums.squares).all() & torch.isfinite(sums.mean.abs()).all()):
        return None
    return sums.flip() if backwards else sums


def _one_sign(piece: Chunk) -> bool:
    """Whether |c X| = |c| |X|: one real state, or no negative entry anywhere."""
    if piece.read.shape[-1] == 1:
        return True
    return all(bool((x >= 0).all()) for x in (piece.read, piece.local, piece.carry, piece.write))


@dataclasses.dataclass(frozen=True)
class _Past:
    """What the n keys before a chunk have left in the state, each (batch, head, state, ...).

    mean and centred gram of their columns X, the first column; size sum |X_j|, distance sum |X_j|
    times the steps since; above and below (batch, head, 2): number and size of the positive and
    negative entries of the first state.
    """

    n: int
    mean: Tensor
    gram: Tensor
    first: Tensor
    size: Tensor
    distance: Tensor
    above: Tensor
    below: Tensor

    @classmethod
    def empty(cls, piece: Chunk) -> _Past:
        """Before the first key."""
        none = torch.zeros_like(piece.write[..., 0])
        pair = none.real.new_zeros(*none.shape[:2], 2)
        real = none.real
        return cls(0, none, torch.zeros_like(piece.carry), none, real, real, pair, pair)

    def rows(self, piece: Chunk, *, signed: bool) -> RowSums:
        """The sums of the chunk's rows over these keys."""
        c, steps = piece.read, torch.arange(len(piece.steps), device=piece.read.device)
        squares = ((c @ self.gram) * c.conj()).sum(-1).real.clamp(min=0)
        nan = torch.full_like(squares, torch.nan)
        absolute = negative = n_negative = distance = nan
        if signed:
            absolute = _times(c.abs(), self.size)
            distance = _times(c.abs(), self.distance) + steps * absolute
            negative = n_negative = torch.zeros_like(nan)
            if c.shape[-1] == 1:
                opposite = torch.where(c > 0, self.below[..., None, :], self.above[..., None, :])
                n_negative = opposite[..., 0] * (c[..., 0] != 0)
                negative = opposite[..., 1] * c[..., 0].abs()
        return RowSums(
            count=torch.full_like(nan, self.n), mean=_times(c, self.mean), squares=squares,
            absolute=absolute, negative=negative, n_negative=n_negative, log_moment=nan,
            first=_times(c, self.first).abs(), distance=distance,
        )  # fmt: skip

    def after(self, piece: Chunk) -> _Past:
        """With the chunk's keys added."""
        carry, write = piece.carry, piece.write
        size = write.shape[-1]
        old, fresh = _times(carry, self.mean), write.mean(-1)
        gap, share = fresh - old, size / (self.n + size)
        centred = write - fresh[..., None]
        outer = gap[..., :, None] * gap.conj()[..., None, :]
        ahead = torch.arange(size, 0, -1, device=write.device)
        factor = carry[..., 0, :1].real
        alive = torch.cat([(factor != 0).to(factor.dtype), factor.abs()], -1)
        kept = torch.where(factor < 0, self.below, self.above), torch.where(
            factor < 0, self.above, self.below)  # fmt: skip
        return _Past(
            n=self.n + size, mean=old + share * gap,
            gram=carry @ self.gram @ carry.mH + centred @ centred.mH + self.n * share * outer,
            first=_times(carry, self.first) if self.n else write[..., 0],
            size=_times(carry.abs(), self.size) + write.abs().sum(-1),
            distance=_times(carry.abs(), self.distance + size * self.size)
            + (write.abs() * ahead).sum(-1),
            above=alive * kept[0] + _entries(write), below=alive * kept[1] + _entries(-write),
        )  # fmt: skip


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _entries(write: Tensor) -> Tensor:
    """Number and sum of the positive entries of the first state's new columns."""
    x = write[..., 0, :].real
    return torch.stack([(x > 0).sum(-1).to(x.dtype), x.clamp(min=0).sum(-1)], -1)


def _local(piece: Chunk, *, hidden: bool, signed: bool) -> RowSums:
    """The sums over the keys inside the chunk; `hidden`: a row does not see its own key."""
    w = piece.local
    step = torch.arange(w.shape[-1], dtype=torch.float64, device=w.device)
    lag = step[:, None] - step
    seen = lag >= (1 if hidden else 0)
    count = seen.sum(-1).to(torch.float64).expand(w.shape[:-1])
    mean = w.sum(-1) / count.clamp(min=1)
    squares = ((w - mean[..., None]).abs() ** 2 * seen).sum(-1)
    nan = torch.full_like(squares, torch.nan)
    absolute = negative = n_negative = distance = nan
    if signed:
        absolute, negative = w.abs().sum(-1), (-w).clamp(min=0).sum(-1)
        n_negative = (w < 0).sum(-1).to(torch.float64)
        distance = (w.abs() * lag.abs()).sum(-1)
    first = w[..., 0].abs() if piece.steps.start == 0 else torch.zeros_like(squares)
    return RowSums(
        count=count, mean=mean, squares=squares, absolute=absolute, negative=negative,
        n_negative=n_negative, log_moment=nan, first=first, distance=distance,
    )  # fmt: skip
