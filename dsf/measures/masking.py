"""What does a mixer lose without the keys near each query, against as many others?"""

from __future__ import annotations

import dataclasses
import math

import torch
import xarray as xr
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.factors import SoftmaxRows
from dsf.measures._frozen_rows import sum_rule
from dsf.measures._maps import TILE_BYTES, MapLike, MapSource, open_map, widened
from dsf.measures._rows import share
from dsf.measures._windows import Window, make_window
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.wrappers import Anticausal, Bidirectional, Gated, core

__all__ = ["masking_effect"]

MEASURES = ()


def masking_effect(
    system: MapLike,
    values: Float[Tensor, "#batch time #head channel"],
    window: int = 3,
    *,
    grid: tuple[int, int] | None = None,
    class_token: bool = False,
    draws: int = 4,
    seed: int = 0,
    rule: str | None = None,
    length: int | None = None,
) -> xr.Dataset:
    """The relative change of each output when its nearest keys are masked, or as many random ones.

        |y_t - y'_t| / |y_t|,    y'_t the row over the keys that are left, times the values

    Masked are, of a causal row, the `window` keys before t (t itself stays; the first rows have
    fewer); of one that sees all keys the window around t, itself included, on a line or, with
    grid=(rows, columns), of window x window patches, cut at the border. The random ones are as
    many keys that the row may see outside the window (and other than t), drawn without
    replacement, `draws` times, the same for all heads that see the same keys. The class token
    (class_token=True, position 0) is masked by chance alone and is no query: NaN.

    What is left is made to sum to one again as the mixer would over fewer keys: divided (softmax;
    linear attention divided by its sum), or shifted by a constant (InLine, at its scale), or not
    at all; `rule` (divide, shift, none) says so if the rows do not.

    Returns a Dataset over (batch, head, query): `local`, `random` (mean over the draws), `masked`
    (keys masked); and `local_pooled`, `random_pooled` (batch, head), sqrt(sum_t |y - y'|^2 /
    sum_t |y|^2) over the queries that have both. NaN where too few keys lie outside the window.
    Raises DsfShapeError, DsfValueError. Cost as the map by tiles, 2 + draws products a tile;
    memory O(length x block). Source: Han et al. (2024), masking test; the random keys are drawn
    outside the window, the only reading under which their numbers fit.
    """
    name = "dsf.masking_effect"
    source = open_map(system, length=length)
    _check(name, source, values, draws)
    if source.attrs["direction"] == "bidirectional" or grid is not None:
        near = make_window(name, source, window, grid, class_token)
    else:
        near = make_window(name, source, window + 1, grid, class_token)  # less the query itself
    rule = sum_rule(system, source, rule, name)
    u = widened(values).transpose(1, 2)
    u = u.expand(*source.lead_shape, *u.shape[-2:])
    mask = _Masks(source, near, draws, seed)
    outputs = _outputs(source, mask, u, rule, _has_sink(system))
    masked, enough = mask.counts()
    return _labelled(source, outputs, masked, enough, {
        "window": window, "grid": None if grid is None else list(grid), "draws": draws,
        "seed": seed, "sum_rule": rule, "border": near.border, "class_token": class_token,
        "method": "rows without the masked keys, by tiles in float64",
    })  # fmt: skip


def _labelled(
    source: MapSource, outputs: list[Tensor], masked: Tensor, enough: Tensor, attrs: dict
) -> xr.Dataset:
    whole, local, *others = outputs
    size = torch.linalg.vector_norm(whole, dim=-1)
    enough = enough & (masked > 0)
    lost = [torch.linalg.vector_norm(y - whole, dim=-1) for y in (local, *others)]
    lost = [torch.where(enough, x, torch.nan) for x in lost]
    counted = torch.where(enough, size, 0.0).square().sum(-1)

    def relative(x: Tensor) -> Tensor:
        return torch.where(x.isnan(), torch.nan, share(x, size))

    def pooled(x: list[Tensor]) -> Tensor:
        square = torch.stack([torch.nansum(y.square(), -1) for y in x]).mean(0)
        return share(square, counted).sqrt()

    def label(x: Tensor, name: str, axes: tuple[str, ...], text: str) -> xr.DataArray:
        return source.result(x, axes, name, units="1", long_name=text, **attrs)

    changes = "relative change of the output without "
    every = masked.expand(*source.lead_shape, -1)
    return xr.Dataset({
        "local": label(relative(lost[0]), "local", ("query",), changes + "the nearest keys"),
        "random": label(torch.stack([relative(x) for x in lost[1:]]).mean(0), "random",
                        ("query",), changes + "as many random keys"),
        "masked": label(every, "masked", ("query",), "keys masked"),
        "local_pooled": label(pooled(lost[:1]), "local_pooled", (), changes + "nearest keys"),
        "random_pooled": label(pooled(lost[1:]), "random_pooled", (), changes + "random keys"),
    })  # fmt: skip


@dataclasses.dataclass
class _Masks:
    """Which keys are masked for each query: the window, and `draws` random sets as large.

    Random keys are drawn once, as indices (*lead, query, most), so that tiles can ask for them in
    any order; n_key stands for none.
    """

    source: MapSource
    window: Window
    draws: int
    seed: int

    def __post_init__(self) -> None:
        """Draw the random keys, block of rows by block of rows."""
        n_key = self.source.n_key
        # by rows of float64 scores, with the leading axes of a mask
        block = max(1, TILE_BYTES // (8 * max(n_key, 1) * max(math.prod(self._lead()), 1)))
        # a generator each: what is drawn does not depend on the blocks
        seeds = torch.randint(2**62, (self.draws,), generator=torch.Generator().manual_seed(
            self.seed)).tolist()  # fmt: skip
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        counts, enough, drawn = [], [], []
        for start in range(0, max(self.source.n_query, 1), block):
            rows = range(start, min(start + block, self.source.n_query))
            inside, outside = self._split(rows, range(n_key))
            counts.append(inside.sum(-1))
            enough.append(outside.sum(-1) >= counts[-1])
            drawn.append([self._draw(outside, counts[-1], g) for g in generators])
        most = max((x.shape[-1] for part in drawn for x in part), default=0)
        pad = [[torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=n_key) for x in part]
               for part in drawn]  # fmt: skip
        self._counts = torch.cat(counts, -1)
        self._enough = torch.cat(enough, -1)
        self._drawn = [torch.cat(x, -2) for x in zip(*pad, strict=True)]

    def counts(self) -> tuple[Tensor, Tensor]:
        """(*lead or nothing, query): how many keys are masked, whether as many lie outside."""
        return self._counts, self._enough

    def tiles(self, rows: range, cols: range) -> list[Tensor]:
        """The masks of a tile: the window's, then those drawn."""
        inside, _ = self._split(rows, cols)
        return [inside, *(self._scatter(x[..., rows.start : rows.stop, :], cols)
                          for x in self._drawn)]  # fmt: skip

    def _lead(self) -> tuple[int, ...]:
        return tuple(self.source.visible(range(0, 1), range(0, 1)).shape[:-2])

    def _split(self, rows: range, cols: range) -> tuple[Tensor, Tensor]:
        """Keys that a row may see: in its window, and outside; never a causal row's own."""
        query, key = (p[r.start : r.stop] for p, r in zip(
            self.source.positions, (rows, cols), strict=True))  # fmt: skip
        seen = self.source.visible(rows, cols).cpu() & self.window.has_one(query)[:, None]
        inside = self.window.inside(query, key)
        if self.window.direction != "bidirectional":
            own = query[:, None] == key
            return seen & inside & ~own, seen & ~inside & ~own
        return seen & inside, seen & ~inside

    def _draw(self, outside: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
        """The keys of largest random score, as many as `count` says."""
        scores = torch.rand(outside.shape[-2:], generator=generator, dtype=torch.float64)
        scores = scores.expand(outside.shape).masked_fill(~outside, -1.0)
        most = min(int(count.max()) if count.numel() else 0, outside.shape[-1])
        picked = scores.topk(most, dim=-1)
        rank = torch.arange(most)
        keep = (rank < count[..., None]) & (picked.values >= 0)
        return picked.indices.masked_fill(~keep, outside.shape[-1])

    @staticmethod
    def _scatter(index: Tensor, cols: range) -> Tensor:
        here = (index >= cols.start) & (index < cols.stop)
        place = torch.where(here, index - cols.start, len(cols))
        hit = torch.zeros(*index.shape[:-1], len(cols) + 1, dtype=torch.bool)
        return hit.scatter(-1, place, True)[..., :-1]


def _outputs(source: MapSource, masks: _Masks, u: Tensor, rule: str, sink: bool) -> list[Tensor]:
    """(*lead, query, channel): the outputs with all keys, without the nearest, without others."""
    parts = []
    for rows, columns in source.tiles():
        sums = None
        for cols in columns:
            part = _tile_sums(source, masks, u, rows, cols, rule)
            sums = part if sums is None else [
                tuple(map(torch.add, a, b)) for a, b in zip(sums, part, strict=True)]  # fmt: skip
        if sums is not None:
            parts.append([_summed(s, sums[0], rule, sink) for s in sums])
    if not parts:
        return [u.new_zeros(*source.lead_shape, 0, u.shape[-1])] * (2 + masks.draws)
    return [torch.cat(x, -2) for x in zip(*parts, strict=True)]


def _tile_sums(
    source: MapSource, masks: _Masks, u: Tensor, rows: range, cols: range, rule: str
) -> list[tuple[Tensor, ...]]:
    """For every mask: kept weights, times values; to shift: the sum of kept values, and keys."""
    w = widened(source.read(rows, cols))
    v = u[..., cols.start : cols.stop, :].to(w.dtype)
    seen = source.visible(rows, cols).cpu()
    found = []
    for mask in (torch.zeros_like(seen), *masks.tiles(rows, cols)):
        keep = (seen & ~mask).to(w.device)
        kept = w * keep
        sums = (kept.sum(-1), kept @ v)
        if rule == "shift":
            every = keep.to(w.dtype).expand(w.shape)
            sums = (*sums, every @ v, every.sum(-1))
        found.append(sums)
    return found


def _summed(sums: tuple[Tensor, ...], whole: tuple[Tensor, ...], rule: str, sink: bool) -> Tensor:
    """The output over the kept keys, its row summing to what it did over all of them."""
    total, y, *kept = sums
    if rule == "shift":
        values, count = kept
        return y + ((whole[0] - total) / count.real.clamp(min=1))[..., None] * values
    if rule == "none" or sums is whole:
        return y
    left = total + (1 - whole[0]) if sink else total / whole[0]
    return y / left.masked_fill(left == 0, 1.0)[..., None]


def _has_sink(system: MapLike) -> bool:
    if not isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        return False
    rows = core(system).C
    return isinstance(rows, SoftmaxRows) and rows.sink is not None


def _check(name: str, source: MapSource, values: Tensor, draws: int) -> None:
    if draws < 1:
        raise DsfValueError(f"{name}: draws: expected at least 1, got {draws}.")
    if source.lead_axes != ("batch", "head"):
        raise DsfShapeError(
            f"{name}: system: expected a map (batch, head, query, key), got axes "
            f"{source.lead_axes}; take system.system of a gated one, one input and one output."
        )
    batch, head = source.lead_shape
    fits = values.ndim == 4 and values.shape[0] in (1, batch) and values.shape[2] in (1, head)
    if not fits or values.shape[1] != source.n_key:
        raise DsfShapeError(
            f"{name}: values: expected axes (batch={batch}, time={source.n_key}, head={head}, "
            f"channel), got {tuple(values.shape)}; they are fixed by system."
        )
