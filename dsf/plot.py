"""Pictures of labelled arrays: xarray in, matplotlib axes out, no computing but for display."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dsf._panels import (
    STYLE,
    Style,
    absent_entries,
    colour_bar,
    display_token,
    displayed,
    draw,
    new_axes,
    new_figure,
    quantity,
    shared_norm,
    single_map,
    styled,
    token_axis,
    with_head,
)  # fmt: skip
from dsf.errors import DsfValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

__all__ = [
    "STYLE", "display_token", "plot_lines", "plot_map", "plot_maps", "plot_spectrum",
    "save_figure", "shared_norm", "styled",
]  # fmt: skip

MAX_LABELS = 60
DPI, MOST_PIXELS = 300, 5000
"""Pictures are saved at this resolution, or at less where a side would have more pixels."""


def plot_map(
    data: xr.DataArray,
    *,
    ax: Axes | None = None,
    cmap: str | Colormap | None = None,
    norm: Normalize | None = None,
    colorbar: bool = True,
    labels: int = MAX_LABELS,
    style: Style = STYLE,
    **kwargs: Any,
) -> Axes:
    """One attention map (query, key): queries downward, keys to the right.

    Signed weights get a diverging scale centred at zero, others a sequential one from zero. The
    part that the direction in `attrs` rules out (the future of a causal map) and padded positions
    are absent, in grey; NaN and infinite entries are magenta, and counted in the title. Above 2048
    a side, blocks are reduced to the entry of largest modulus with its sign. `labels` is the
    largest number of token texts on an axis. Other keywords go to `imshow`. Raises DsfShapeError
    unless one map is left after dropping axes of size 1, DsfTypeError for complex weights.
    """
    map_ = single_map(data)
    with styled(style):
        ax = new_axes((4.2, 3.6)) if ax is None else ax
        array, absent, factor = displayed(map_)
        norm = shared_norm([map_]) if norm is None else norm
        image = draw(ax, array, absent, cmap, norm, kwargs)
        token_axis(ax, map_, factor, labels, "query")
        token_axis(ax, map_, factor, labels, "key")
        notes = [_name(map_)] if _name(map_) else []
        wrong = int((~np.isfinite(map_.values) & ~absent_entries(map_)).sum())
        notes += [f"{wrong} not finite (magenta)"] if wrong else []
        notes += [f"blocks of {factor}: largest |weight|"] if factor > 1 else []
        ax.set_title(", ".join(notes))
        if colorbar:
            colour_bar(ax.figure, image, [ax], map_)
    return ax


def plot_maps(
    maps: Mapping[str, xr.DataArray],
    *,
    heads: int = 4,
    labels: int = 32,
    panel: float = 2.0,
    blocks: int = 1,
    cmap: str | Colormap | None = None,
    title: str = "",
    style: Style = STYLE,
) -> tuple[Figure, np.ndarray]:
    """A grid of maps: one row a system, its first heads as columns, one colour bar a row.

    `maps`: name -> array (head, query, key) (axes of size 1 are dropped). The panels of a row
    share their scale; systems do not, for their weights have different units of normalisation.
    `blocks` sets long lists side by side; `panel` is the side of a map in inches. Returns the
    figure and the array of axes (system, head).
    """
    if not maps:
        raise DsfValueError("dsf.plot_maps: maps: expected at least one system, got none.")
    rows = {name: with_head(data) for name, data in maps.items()}
    columns = min(heads, max(row.sizes["head"] for row in rows.values()))
    height = -(-len(rows) // blocks)
    lines = []
    with styled(style):
        figure = new_figure(((panel * columns + 2.0) * blocks, panel * height + 0.9))
        parts = figure.subfigures(1, blocks, squeeze=False)[0]
        for start, part in zip(range(0, height * blocks, height), parts, strict=True):
            names = list(rows)[start : start + height]
            axes = part.subplots(height, columns, squeeze=False)
            above = [""] * columns
            for line, name in zip(axes, names, strict=False):
                _row(part, line, name, rows[name], labels, cmap, above, last=name == names[-1])
            for ax in axes[len(names) :].ravel():
                ax.set_axis_off()
            lines += list(axes[: len(names)])
        if title:
            figure.suptitle(title)
    return figure, np.array(lines)


def plot_spectrum(
    data: xr.DataArray, *, ax: Axes | None = None, floor: float = 1e-16, style: Style = STYLE,
    **kwargs: Any,
) -> Axes:  # fmt: skip
    """Values over their order (last axis), log scale; those below `floor` are drawn on it."""
    flat = data.values.reshape(-1, data.shape[-1])
    with styled(style):
        ax = new_axes((3.4, 2.6)) if ax is None else ax
        order = np.arange(1, flat.shape[1] + 1)
        for line in flat:
            ax.semilogy(order, np.maximum(line, floor), marker=".", **kwargs)
        below = int((flat < floor).sum())
        ax.set_xlabel("order")
        ax.set_ylabel(quantity(data))
        ax.set_title(f"{below} below {floor:g}, drawn there" if below else "")
    return ax


def plot_lines(
    data: xr.DataArray, *, ax: Axes | None = None, style: Style = STYLE, **kwargs: Any
) -> Axes:
    """A quantity along its last axis (time or query), one line for each entry of the others."""
    flat = data.values.reshape(-1, data.shape[-1])
    names = [d for d in data.dims[:-1] if data.sizes[d] > 1]
    with styled(style):
        ax = new_axes((3.8, 2.6)) if ax is None else ax
        for number, line in enumerate(flat):
            label = f"{names[0]} {number}" if len(names) == 1 else None
            ax.plot(np.asarray(data[data.dims[-1]]), line, label=label, **kwargs)
        ax.set_xlabel(str(data.dims[-1]))
        ax.set_ylabel(quantity(data))
        if len(names) == 1 and 1 < len(flat) <= 8:
            ax.legend()
    return ax


def save_figure(figure: Figure, path: str | os.PathLike[str], style: Style = STYLE) -> Path:
    """Write the figure under a temporary name, then rename; text in PDF and SVG stays text.

    Raises DsfValueError on a name whose ending is no format of matplotlib.
    """
    target, known = Path(path), sorted(figure.canvas.get_supported_filetypes())
    if target.suffix.removeprefix(".").lower() not in known:
        raise DsfValueError(
            f"dsf.plot.save_figure: path: expected an ending out of {', '.join(known)}, got "
            f"{target.name!r}."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        with styled(style):
            resolution = min(DPI, MOST_PIXELS / max(figure.get_size_inches()))
            figure.savefig(unfinished, dpi=resolution, bbox_inches="tight")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


# -- helpers -----------------------------------------------------------------------------------


def _name(map_: xr.DataArray) -> str:
    parts = [str(map_.attrs.get("system", "")).replace("_", " ")]
    parts += [f"{d} {int(map_[d])}" for d in ("layer", "head") if d in map_.coords]
    return " ".join(p for p in parts if p)


def _row(
    figure: Any, line: np.ndarray, name: str, row: xr.DataArray, labels: int, cmap: Any,
    above: list[str], last: bool,
) -> None:  # fmt: skip
    """The heads of one system side by side, token texts at the left and under the last row."""
    norm, image = shared_norm([row]), None
    for number, ax in enumerate(line):
        if number >= row.sizes["head"]:
            ax.set_axis_off()
            continue
        map_ = single_map(row.isel(head=number))
        array, absent, factor = displayed(map_)
        image = draw(ax, array, absent, cmap, norm, {})
        if number:
            ax.set_yticks([])
        else:
            token_axis(ax, map_, factor, labels, "query")
        if last:
            token_axis(ax, map_, factor, labels, "key")
        else:
            ax.set_xticks([])
        heading = f"head {int(row['head'][number])}"
        ax.set_title("" if heading == above[number] else heading, pad=2)
        above[number] = heading
    line[0].set_ylabel(f"{name.replace('_', ' ')}\nquery")
    colour_bar(figure, image, list(line), row, shrink=0.8, aspect=14, pad=0.01)
