"""How much of a row falls on the keys near its query?"""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from dsf.factors import SoftmaxRows
from dsf.measures._maps import MapLike, MapSource, open_map, widened
from dsf.measures._rows import share
from dsf.measures._windows import Window, make_window
from dsf.wrappers import core

__all__ = ["local_mass", "local_share"]

_DIAGONAL_BLOCK = 128

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(*lead, query): signed and absolute sums in the window, absolute sum, keys in it, keys seen."""


def local_mass(
    system: MapLike,
    window: int = 3,
    *,
    grid: tuple[int, int] | None = None,
    class_token: bool = False,
    length: int | None = None,
    block: int | None = None,
) -> xr.DataArray:
    """The sum of each row's weights over the window of keys around its query.

        Loc_t = sum_{j in window(t)} w_tj

    A signed sum where weights can be negative (InLine, linear attention): no share; `local_share`
    is. The window holds the last `window` keys, t itself among them, of a causal row; the
    (window - 1)/2 on either side of one that sees all keys; with grid=(rows, columns), the
    window x window patches around the query's own, in raster order. At the border it is cut:
    fewer keys, counted by the coordinate `window_keys`, by which inner queries can be selected.
    class_token: position 0 is no patch: NaN as a query, in no window as a key.

    The coordinate `chance` is what a row of equal weights that sums to one would have: the share
    of the keys it may see that lie in the window (min(1, window/t) in a causal map, 9/197 for
    3 x 3 of 14 x 14 patches and a class token). A layer's value is the mean over patch queries,
    heads and inputs.

    Parameters else as `row_sum`. Cost: on a line only the tiles along the diagonal are made,
    O(length x (block + window)) weights; on a grid, and for `local_share`, the whole map by tiles;
    memory O(length x block). Returns (batch, head,
    [channel,] query), in units of the weights. Raises DsfValueError on an even window around a
    query, or a grid that does not fit. Source: Han et al. (2024), local modelling; border rule
    and averages are ours.
    """
    return _measure(system, window, grid, class_token, length, block, "local_mass")


def local_share(
    system: MapLike,
    window: int = 3,
    *,
    grid: tuple[int, int] | None = None,
    class_token: bool = False,
    length: int | None = None,
    block: int | None = None,
) -> xr.DataArray:
    """The share of each row's absolute weight that falls on the window of keys around its query.

        sum_{j in window(t)} |w_tj| / sum_j |w_tj|

    NaN for a row of zeros. Everything else, windows and coordinates too, as `local_mass`, whose
    equal it is where all weights are positive and sum to one.
    """
    return _measure(system, window, grid, class_token, length, block, "local_share")


def _measure(
    system: MapLike, size: int, grid: tuple[int, int] | None, class_token: bool,
    length: int | None, block: int | None, name: str,
) -> xr.DataArray:  # fmt: skip
    source = open_map(system, length=length)
    window = make_window(f"dsf.{name}", source, size, grid, class_token)
    diagonal = name == "local_mass" and grid is None and _on_one_line(source)
    sums = _diagonal_sums if diagonal else _sums
    signed, absolute, total, keys, seen = sums(source, window, block)
    value = signed if name == "local_mass" else share(absolute, total)
    has_one = window.has_one(source.positions[0]).to(value.device)
    meta = {
        "window": size, "grid": None if grid is None else list(grid), "border": window.border,
        "class_token": class_token,
        "method": "float64 sums by tiles" + " along the diagonal" * diagonal,
    }  # fmt: skip
    found = source.result(
        torch.where(has_one, value, torch.nan), ("query",), name, units="1",
        long_name="weight on the window" + (", share of |weight|" * (name == "local_share")),
        **meta,
    )  # fmt: skip
    dims = found.dims[-seen.ndim :] if seen.ndim == 1 else ("batch", "head", "query")
    return found.assign_coords(
        window_keys=(dims, torch.where(has_one, keys, 0).numpy()),
        chance=(dims, torch.where(has_one, share(keys, seen), torch.nan).numpy()),
    )


def _on_one_line(source: MapSource) -> bool:
    """Whether rows and columns are the same positions, so that near keys are near columns."""
    line = torch.arange(source.n_query)
    return source.n_query > 0 and all(torch.equal(p, line) for p in source.positions)


def _diagonal_sums(source: MapSource, window: Window, block: int | None) -> Sums:
    """The sums in the window alone, from the tiles that it crosses."""
    step = _DIAGONAL_BLOCK if block is None else block
    parts = []
    for start in range(0, source.n_query, step):
        rows = range(start, min(start + step, source.n_query))
        cols = range(max(rows.start - window.size, 0),
                     min(rows.stop + window.size, source.n_key))  # fmt: skip
        parts.append(_tile_sums(source, window, rows, cols))
    signed, absolute, _, keys, _ = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return signed, absolute, absolute, keys, _seen(source, step).expand(keys.shape)


def _seen(source: MapSource, block: int) -> Tensor:
    """How many keys each row may see, (query) or (batch, head, query)."""
    if source.system is not None and not isinstance(core(source.system).C, SoftmaxRows):
        count = torch.arange(1.0, source.n_query + 1, dtype=torch.float64)
        direction = source.attrs["direction"]
        own = int(source.visible(range(1), range(1)).any())  # strict: not its own key
        if direction == "causal":
            return count
        return count.flip(0) - 1 + own if direction == "anticausal" else count * 0 + len(count)
    parts = []
    for start in range(0, source.n_query, block):
        rows = range(start, min(start + block, source.n_query))
        parts.append(source.visible(rows, range(source.n_key)).cpu().sum(-1).double())
    return torch.cat(parts, -1)


def _sums(source: MapSource, window: Window, block: int | None) -> Sums:
    """The sums of whole rows."""
    parts = []
    for rows, columns in source.tiles(block):
        total = None
        for cols in columns:
            part = _tile_sums(source, window, rows, cols)
            total = part if total is None else tuple(map(torch.add, total, part))
        if total is not None:
            parts.append(total)
    if not parts:
        empty = torch.zeros(*source.lead_shape, source.n_query, dtype=torch.float64)
        count = torch.zeros(source.n_query, dtype=torch.float64)
        return empty, empty, empty, count, count
    signed, absolute, total, keys, seen = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return signed, absolute, total, keys, seen


def _tile_sums(source: MapSource, window: Window, rows: range, cols: range) -> Sums:
    w = widened(source.read(rows, cols))
    query, key = source.positions
    inside = window.inside(query[rows.start : rows.stop], key[cols.start : cols.stop])
    seen = source.visible(rows, cols).cpu()
    if seen.ndim > 2:  # masks by batch and head; other axes of the map share them
        seen = seen.reshape(*seen.shape[:2], *seen.shape[-2:])
        seen = seen.expand(*source.lead_shape[:2], -1, -1)
    near = inside.to(w.device)
    return (
        (w * near).sum(-1), (w.abs() * near).sum(-1), w.abs().sum(-1),
        (seen & inside).sum(-1).double(), seen.sum(-1).double(),
    )  # fmt: skip


MEASURES = (local_mass, local_share)
