"""One panel of a map: what is absent, how it is scaled, drawn and labelled. Used by dsf.plot."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dsf.errors import DsfShapeError, DsfTypeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")
"""The default style; pass `style=None` to keep the caller's own."""
MAX_SIDE = 2048
ABSENT_COLOUR = "0.88"
NAN_COLOUR = (1.0, 0.0, 1.0)
CLIP_QUANTILE = 0.995
WIDE = 100.0
SIGNED_MAP, UNSIGNED_MAP = "RdBu_r", "Reds"
"""White is zero and red is positive in both, so that rows of a grid can be read together."""

Style = str | os.PathLike[str] | None


@contextlib.contextmanager
def styled(style: Style = STYLE) -> Iterator[None]:
    """A style that ends with the block: rcParams are as they were afterwards."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError(
            "dsf.plot: matplotlib is not installed. pip install 'dsf-torch[plot]'"
        ) from error
    with contextlib.nullcontext() if style is None else matplotlib.style.context(str(style)):
        yield


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure outside pyplot: neither the current figure nor the backend changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)  # type: ignore[union-attr]
    FigureCanvasAgg(figure)
    return figure


def new_axes(size: tuple[float, float]) -> Axes:
    return new_figure(size).subplots()


def single_map(data: xr.DataArray) -> xr.DataArray:
    map_ = data.squeeze([d for d in data.dims if data.sizes[d] == 1 and d not in ("query", "key")])
    if set(map_.dims) != {"query", "key"}:
        raise DsfShapeError(
            f"dsf.plot: data: expected axes (query, key), got {dict(map_.sizes)}. Choose one map "
            f"with .isel(...), or give plot_maps an array with a head axis."
        )
    if np.iscomplexobj(map_.values):
        raise DsfTypeError(
            "dsf.plot: data: expected real weights, got complex. Draw .real or abs."
        )
    return map_.transpose("query", "key")


def _require_real(data: xr.DataArray) -> None:
    if np.iscomplexobj(data.values):
        raise DsfTypeError(
            "dsf.plot: data: expected real weights, got complex. Draw .real or abs."
        )


def with_head(data: xr.DataArray) -> xr.DataArray:
    _require_real(data)
    kept = ("head", "query", "key")
    row = data.squeeze([d for d in data.dims if data.sizes[d] == 1 and d not in kept])
    return row if "head" in row.dims else row.expand_dims("head")


def absent_entries(map_: xr.DataArray) -> np.ndarray:
    """Entries that do not exist: outside the direction, or of padded tokens."""
    query, key = np.asarray(map_["query"])[:, None], np.asarray(map_["key"])
    direction = map_.attrs.get("direction", "bidirectional")
    absent = np.zeros(map_.shape, dtype=bool)
    if direction in ("causal", "anticausal"):
        absent = absent | ((key > query) if direction == "causal" else (key < query))
    for name, axis in (("query_padded", 1), ("key_padded", 0)):
        if name in map_.coords:
            absent = absent | np.expand_dims(np.asarray(map_[name]).astype(bool), axis)
    return absent


def displayed(map_: xr.DataArray) -> tuple[np.ndarray, np.ndarray, int]:
    """What is drawn: the array, its absent entries, and the side of the blocks it was cut into."""
    array, absent = map_.values, absent_entries(map_)
    factor = -(-max(*array.shape, 1) // MAX_SIDE)
    if factor == 1:
        return array, absent, 1
    rows, columns = (-(-side // factor) for side in array.shape)
    pad = [(0, rows * factor - array.shape[0]), (0, columns * factor - array.shape[1])]

    def blocks(x: np.ndarray, fill: Any) -> np.ndarray:
        cut = np.pad(x, pad, constant_values=fill).reshape(rows, factor, columns, factor)
        return cut.transpose(0, 2, 1, 3).reshape(rows, columns, factor**2)

    gone, values = blocks(absent, True), blocks(array, 0)
    size = np.where(gone, -1, np.where(np.isfinite(values), np.abs(values), np.inf))
    picked = np.take_along_axis(values, size.argmax(-1)[..., None], -1)[..., 0]
    return picked, np.asarray(gone.all(-1)), factor


def draw(
    ax: Axes, array: np.ndarray, absent: np.ndarray, cmap: Any, norm: Normalize, kwargs: Any
) -> Any:
    import matplotlib as mpl

    chosen = cmap or (SIGNED_MAP if (norm.vmin or 0.0) < 0 else UNSIGNED_MAP)
    colours = mpl.colormaps[chosen] if isinstance(chosen, str) else chosen
    hidden = absent | ~np.isfinite(array)
    # an image stays one in PDF and SVG; rasterized=True would draw the whole page once for each
    image = ax.imshow(
        np.ma.masked_array(array, hidden), cmap=colours.with_extremes(bad=ABSENT_COLOUR),
        norm=norm, origin="upper", aspect="equal", **kwargs,
    )  # fmt: skip
    wrong = ~absent & ~np.isfinite(array)
    if wrong.any():
        overlay = np.zeros((*array.shape, 4))
        overlay[wrong] = (*NAN_COLOUR, 1.0)
        ax.imshow(overlay, origin="upper")
    return image


def shared_norm(maps: list[xr.DataArray]) -> Normalize:
    """One scale for panels that are compared: centred at zero if any weight is negative.

    It ends at the 99.5 % quantile of the moduli, so that one large entry does not hide the rest;
    where that is more than `WIDE` times their median it is logarithmic away from zero.
    """
    from matplotlib.colors import CenteredNorm, Normalize, SymLogNorm

    parts = [m.values[~absent_entries(m) & np.isfinite(m.values)].ravel() for m in maps]
    present = np.concatenate([np.zeros(0), *parts])
    size = np.abs(present[present != 0])
    if not size.size:
        return Normalize(0.0, 1.0)
    top, middle = (float(np.quantile(size, q)) for q in (CLIP_QUANTILE, 0.5))
    low = -top if (present < 0).any() else 0.0
    if top > WIDE * middle:
        linear = 10.0 ** np.floor(np.log10(max(middle, top / 1e4)))
        return SymLogNorm(linear, vmin=low, vmax=top)
    return CenteredNorm(0.0, halfrange=top) if low < 0 else Normalize(0.0, top)


def display_token(text: str, width: int = 12) -> str:
    """A token as one short printable word: control characters escaped, $ literal."""
    shown = "".join(
        c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
    shown = shown if len(shown) <= width else shown[: width - 1] + "…"
    return shown.replace("$", r"\$")


def token_axis(ax: Axes, map_: xr.DataArray, factor: int, most: int, name: str) -> None:
    """Token texts (or positions) on the axis of `query` or `key`, thinned to `most`."""
    axis = ax.yaxis if name == "query" else ax.xaxis
    length = map_.sizes[name]
    shown = range(0, length, max(1, -(-length // max(most, 1))))
    texts = [str(int(map_[name][i])) for i in shown]
    if f"{name}_token" in map_.coords:
        texts = [display_token(str(map_[f"{name}_token"].values[i])) for i in shown]
    axis.set_tick_params(length=0, labelsize=_label_size(len(texts), ax),
                         labelrotation=0 if name == "query" else 90)  # fmt: skip
    axis.set_ticks([i / factor for i in shown], texts)
    axis.set_label_text(name)


def colour_bar(figure: Any, image: Any, axes: list[Axes], map_: xr.DataArray, **kw: Any) -> Any:
    """The labelled scale of some panels, with arrows where entries lie beyond its ends."""
    values = map_.values[np.isfinite(map_.values)]
    low, high = image.norm.vmin, image.norm.vmax
    beyond = (bool((values < low).any()), bool((values > high).any()))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[beyond]
    bar = figure.colorbar(image, ax=axes, extend=extend, **kw)
    logarithmic = hasattr(image.norm, "linthresh")
    note = f"\n(log scale beyond {image.norm.linthresh:g})" if logarithmic else ""
    bar.set_label(quantity(map_) + note)
    bar.outline.set_linewidth(0.4)
    bar.solids.set(rasterized=False, edgecolor="face")  # as for the images
    return bar


def quantity(data: xr.DataArray) -> str:
    """`long name (unit)`, the unit left out where it is 1."""
    name = str(data.attrs.get("long_name") or data.name or "value").replace("_", " ")
    unit = str(data.attrs.get("units", "1"))
    return name if unit in ("", "1") else f"{name} ({unit})"


def _label_size(count: int, ax: Axes) -> float:
    """Points: small enough that `count` labels stand side by side on an axis of this size."""
    room = 72 * min(ax.bbox.height, ax.bbox.width) / ax.figure.dpi
    return max(3.0, min(7.0, 0.95 * room / max(count, 1)))
