"""A comparison as rows, CSV, one self-contained HTML page, and its findings in words."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

Row = dict[str, Any]
_LABELS = ("weights", "structure", "direction", "states")
_SHORT = {
    "system": "system", "layer": "layer", "heads": "heads", "error": "error", "states": "states",
    "n_state": "stored", "row_sum": "row sum", "spread": "spread",
    "negative_mass": "negative", "entropy": "entropy",
    "effective_rank": "eff. rank", "epsilon_rank": "needed at 1 %",
    "injectivity_verdict": "injective", "injectivity_margin": "margin",
    "first_token_share": "1st token", "memory_half_life": "half-life",
}  # fmt: skip
_VERDICTS = {1.0: "yes", 0.0: "undecided", -1.0: "no"}


def rows_of(comparison: xr.Dataset, *, by: str = "head") -> list[Row]:
    """One row for each head that exists, or (`by="layer"`) for each layer, averaged over heads.

    Verdicts become words (for a layer: how many heads of each), margins of a layer are the
    smallest, and two colliding queries are shown by their first entries.
    """
    numbers = [n for n, v in comparison.data_vars.items() if v.dims == ("system", "layer", "head")]
    found = []
    for s, system in enumerate(comparison["system"].values):
        for k, layer in enumerate(comparison["layer"].values):
            here = comparison.isel(system=s, layer=k)
            alive = [h for h in range(comparison.sizes["head"])
                     if any(_exists(here[n].values[h]) for n in numbers)]  # fmt: skip
            labels = {n: here[n].item() for n in _LABELS if n in comparison.coords}
            start: Row = {"system": str(system), "layer": int(layer), **labels}
            if by == "layer" and alive:
                cells = {str(n): _layer_cell(str(n), here[n].values[alive]) for n in numbers
                         if here[n].dtype.kind == "f"}  # fmt: skip
                found.append(
                    {**start, "heads": len(alive), "error": here["error"].item(), **cells}
                )
            for h in alive if by == "head" else []:
                cells = {str(n): _head_cell(str(n), v.values[h]) for n, v in here.data_vars.items()
                         if "head" in v.dims}  # fmt: skip
                found.append({**start, "head": int(comparison["head"][h]),
                              "error": here["error"].item(), **cells})  # fmt: skip
    return found


def show(value: Any) -> str:
    """A number in three significant digits; – where there is none."""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def compact(rows: Sequence[Row]) -> list[Row]:
    """The rows for a terminal: fewer columns, short names; measures not known here are kept."""
    hidden = {*_LABELS, "injectivity_difference"} - set(_SHORT)

    def cell(name: str, value: Any) -> Any:
        return value.replace(" undecided", " ?") if name.endswith("_verdict") else value

    return [
        {_SHORT.get(k, k.replace("_", " ")): cell(k, v) for k, v in row.items() if k not in hidden}
        for row in rows
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header, numbers in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(list(rows[0]) if rows else [])
    for row in rows:
        writer.writerow([repr(v) if isinstance(v, float) else v for v in row.values()])
    return out.getvalue()


def html_text(
    title: str, notes: Sequence[str], rows: Sequence[Row], picture: bytes | None = None
) -> str:
    """One page without scripts or links to elsewhere; every text is escaped, the PNG embedded."""
    e = html.escape
    head = "".join(f"<th>{e(name.replace('_', ' '))}</th>" for name in (rows[0] if rows else []))
    body = "\n".join(
        "<tr>" + "".join(f"<td{_align(v)}>{e(show(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    image = ""
    if picture is not None:
        data = base64.b64encode(picture).decode("ascii")
        image = f'<img alt="implied attention maps" src="data:image/png;base64,{data}">'
    paragraphs = "\n".join(f"<p>{e(note)}</p>" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{e(title)}</title>\n'
        f"<style>{_CSS}</style></head>\n<body><h1>{e(title)}</h1>\n{paragraphs}\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n{image}\n"
        f"</body></html>\n"
    )


def systems_rows(models: Mapping[str, Any]) -> list[Row]:
    """Name, A, B, C, D, facts and source of each registered system."""
    return [
        {"system": name, **model.equations, **model.facts(), "source": model.source}
        for name, model in models.items()
    ]  # fmt: skip


def systems_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: the table of systems in the README."""
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [
        [f"`{v}`" if k == "system" else str(v).replace("|", "\\|") for k, v in row.items()]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write under a temporary name, sync, rename."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


_CSS = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:110em}"
    "table{border-collapse:collapse;font-size:12px;font-variant-numeric:tabular-nums}"
    "th{position:sticky;top:0;background:#fff;text-align:left;border-bottom:1px solid #333}"
    "th,td{padding:.15em .7em}.n{text-align:right}tr:nth-child(even) td{background:#f5f5f5}"
    "img{max-width:100%;margin-top:2em}"
)


def _align(value: Any) -> str:
    return "" if isinstance(value, str) else ' class="n"'


def _exists(value: Any) -> bool:
    return value != "" if isinstance(value, str) else not np.isnan(value)


def _head_cell(name: str, value: Any) -> Any:
    if np.ndim(value) > 0:
        return _collision(np.asarray(value))
    if isinstance(value, str):
        return str(value)
    return _VERDICTS.get(float(value), "–") if name.endswith("_verdict") else float(value)


def _layer_cell(name: str, values: np.ndarray) -> Any:
    known = values[~np.isnan(values)]
    if name.endswith("_verdict"):
        counts = {word: int((known == flag).sum()) for flag, word in _VERDICTS.items()}
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "–"
    if not known.size:
        return math.nan
    return float(known.min() if name.endswith("_margin") else known.mean())


def _collision(pair: np.ndarray) -> str:
    """Two vectors by their first entries, nothing where there are none."""
    if pair.ndim != 2 or np.isnan(pair).all():
        return ""
    shown = []
    for vector in pair:
        known = vector[~np.isnan(vector)]
        more = ", …" if known.size > 3 else ""
        shown.append("(" + ", ".join(f"{x:.3g}" for x in known[:3]) + more + ")")
    return " and ".join(shown) if len(set(shown)) > 1 else f"{shown[0]}, twice to three digits"
