"""What the commands do with a text: read it, measure, draw, write."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xarray as xr

from dsf import plot, report, results
from dsf.comparison import Progress, compare
from dsf.errors import DsfValueError
from dsf.findings import findings
from dsf.reading import PRETRAINED, Reading, maps_of, read, stacked

PICTURE_TOKENS = 24
"""The picture shows the map's first tokens, so that every one of them can be read."""


ROWS_OF_A_BLOCK = 15
"""With more systems the picture has its rows side by side in blocks."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `run` found and wrote. `layer_rows` are means over the heads of each layer."""

    table: xr.Dataset
    layer_rows: list[report.Row]
    notes: list[str]
    findings: list[str]
    files: list[Path]


def run(
    text: str,
    systems: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    *,
    output: str | os.PathLike[str],
    max_tokens: int = 128,
    heads: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    source: str = "the given text",
    progress: Progress | None = None,
) -> Outcome:
    """Compare systems on a text and write what was found to the folder `output`.

    comparison.nc (groups `table` and `maps`), comparison.csv (one row a head), comparison.html
    (the same with the picture), maps.png and maps.pdf. Arguments as `dsf.reading.read` and
    `dsf.compare`. Cost: for each head, one singular value decomposition of each block
    map[t:, :t], O(tokens^4) in all.
    """
    tell = progress or (lambda done, total, label: None)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    tell(0, 1, "reading the text")
    reading = read(text, systems, max_tokens=max_tokens, seed=seed, dtype=dtype)
    table = compare(
        reading.systems, reading.inputs, measures=measures, heads=heads, progress=progress
    )
    weights = [reading.weights[str(name)] for name in table["system"].values]
    table = table.assign_coords(weights=("system", weights))
    tell(0, 1, "drawing the maps")
    maps = maps_of(reading)
    notes = notes_on(reading, table, source)
    files = _write(folder, table, maps, notes)
    return Outcome(table, report.rows_of(table, by="layer"), notes, findings(table), files)


def draw_map(
    text: str,
    system: str,
    *,
    output: str | os.PathLike[str],
    layer: int = 0,
    head: int = 0,
    max_tokens: int = 60,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """One map as a picture at `output`, and its data beside it. Raises DsfValueError for a layer
    or head that is not there."""
    reading = read(text, [system], max_tokens=max_tokens, seed=seed, dtype=dtype)
    found = list(maps_of(reading, heads=head + 1, layers=[layer]).values())
    if not found or found[0].sizes["head"] <= head:
        what = f"{found[0].sizes['head']} heads" if found else f"no layer {layer}"
        raise DsfValueError(f"dsf.draw_map: expected layer and head of {system}, found {what}.")
    map_ = found[0].isel(head=head)
    picture = plot.save_figure(plot.plot_map(map_).get_figure(), output)  # type: ignore[arg-type]
    return [picture, results.save(map_, picture.with_suffix(".nc"), overwrite=True)]


def measure_text(
    text: str,
    system: str,
    measures: Sequence[str],
    *,
    max_tokens: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The table of `dsf.compare` for one system and some measures, also written to `output`."""
    reading = read(text, [system], max_tokens=max_tokens, seed=seed, dtype=dtype)
    table = compare(reading.systems, reading.inputs, measures=measures, progress=progress)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        results.save(table, output, overwrite=True)
    return table


def notes_on(reading: Reading, table: xr.Dataset, source: str) -> list[str]:
    """What a reader has to know before the numbers, in plain words."""
    random = [name for name, origin in reading.weights.items() if origin.startswith("random")]
    notes = [f"Text: {source}, {len(reading.tokens)} tokens of the MiniLM tokenizer."]
    if PRETRAINED in reading.weights:
        notes.append(
            "minilm is the pre-trained all-MiniLM-L6-v2 encoder on its real forward pass."
        )
    if random:
        seed = reading.weights[random[0]].removeprefix("random, ")
        notes.append(
            f"These have RANDOM weights ({seed}), so their maps show what the structure does, not "
            f"what training finds: {', '.join(random)}. They read minilm's embeddings of the same "
            f"tokens."
        )
    refused = json.loads(table.attrs["not_measured"])
    notes += [f"Not measured: {where}: {why}" for where, why in refused.items()]
    return notes


def _write(
    folder: Path, table: xr.Dataset, maps: dict[str, xr.DataArray], notes: list[str]
) -> list[Path]:
    shown = {name: m.isel(query=slice(PICTURE_TOKENS), key=slice(PICTURE_TOKENS))
             for name, m in maps.items()}  # fmt: skip
    blocks = 1 + len(shown) // ROWS_OF_A_BLOCK
    figure, _ = plot.plot_maps(
        shown, panel=1.6, labels=PICTURE_TOKENS, blocks=blocks, heads=4 if blocks == 1 else 3
    )
    pictures = [plot.save_figure(figure, folder / f"maps.{kind}") for kind in ("png", "pdf")]
    tree = xr.DataTree.from_dict({"/table": table, "/maps": stacked(maps)})
    rows = report.rows_of(table)
    page = report.html_text(
        "Systems compared on a text", [*notes, *findings(table)], rows, pictures[0].read_bytes()
    )
    return [
        results.save(tree, folder / "comparison.nc", overwrite=True),
        report.write_text(folder / "comparison.csv", report.csv_text(rows)),
        report.write_text(folder / "comparison.html", page),
        *pictures,
    ]
