"""The commands of `dsf`, each a thin face of functions that Python users call too."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsf.cli import version_text
from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.report import Row, compact, show

PIPED_WIDTH = 200
"""Columns of a table that is not written to a terminal."""

app = typer.Typer(
    help="Every sequence-mixing layer as one state-space recurrence.", no_args_is_help=True,
    pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip

Text = Annotated[Path, typer.Argument(help="A text file (UTF-8); - for standard input.")]
Seed = Annotated[int, typer.Option(help="Draws the weights of the small models.")]
Precision = Annotated[str, typer.Option("--dtype", help="float32 or float64.")]
Tokens = Annotated[int, typer.Option(min=3, max=512, help="Read at most this many tokens.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Names = Annotated[str | None, typer.Option(help="Names, separated by commas; default: all.")]
System = Annotated[str, typer.Option(help="`minilm` or a name that `dsf models` lists.")]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        print(version_text())
        raise typer.Exit


@app.command()
def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the systems with their A, B, C, D.

    Example: dsf models
    """
    from dsf.models import registered
    from dsf.report import systems_markdown, systems_rows

    rows = systems_rows(registered())
    if markdown:
        print(systems_markdown(rows))
    else:
        _print_rows("Systems", rows, as_json=as_json)


@app.command()
def compare(
    text: Text,
    systems: Names = None,
    measures: Names = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "results/compare"
    ),
    tokens: Tokens = 128,
    heads: Annotated[int, typer.Option(min=1, help="Measure the first so many heads.")] = 12,
    seed: Seed = 0,
    dtype: Precision = "float32",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare the systems on a text: a table, a dataset and a picture of their attention maps.

    Example: dsf compare data/origin_of_species.txt --systems minilm,mamba2,zeros --tokens 64
    """
    from dsf.demonstration import run

    with _bar(quiet) as progress:
        found = run(
            _read_text(text), _names(systems), _names(measures), output=output, max_tokens=tokens,
            heads=heads, seed=seed, dtype=_dtype(dtype), source=text.name, progress=progress,
        )  # fmt: skip
    if quiet:
        return
    rows = found.layer_rows if as_json else compact(found.layer_rows)
    _print_rows("Means over heads", rows, as_json=as_json)
    if not as_json:
        for line in [*found.notes, "", "Most worth a look:", *found.findings, "", "Written:",
                     *map(str, found.files)]:  # fmt: skip
            print(line)


@app.command(name="map")
def map_(
    text: Text,
    system: System = "minilm",
    layer: Annotated[int, typer.Option(min=0, help="Layer of the pre-trained encoder.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="Head.")] = 0,
    output: Annotated[Path, typer.Option(help="Picture; the data go beside it (.nc).")] = Path(
        "results/map.png"
    ),
    tokens: Tokens = 60,
    seed: Seed = 0,
    dtype: Precision = "float32",
    quiet: Quiet = False,
) -> None:
    """Draw the attention map that one head implies on a text.

    Example: dsf map data/origin_of_species.txt --system mamba2 --head 1 --output results/map.png
    """
    from dsf.demonstration import draw_map

    with _bar(quiet):
        files = draw_map(
            _read_text(text), system, output=output, layer=layer, head=head, max_tokens=tokens,
            seed=seed, dtype=_dtype(dtype),
        )  # fmt: skip
    if not quiet:
        print("\n".join(map(str, files)))


@app.command()
def measure(
    name: Annotated[str, typer.Argument(help="Measures, separated by commas; see --list.")],
    text: Text,
    system: System = "minilm",
    output: Annotated[Path | None, typer.Option(help="Write the dataset here (.nc).")] = None,
    tokens: Tokens = 128,
    seed: Seed = 0,
    dtype: Precision = "float32",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure every head of one system on a text.

    Example: dsf measure entropy,epsilon_rank data/origin_of_species.txt --system zeros
    """
    from dsf.demonstration import measure_text
    from dsf.report import rows_of

    with _bar(quiet) as progress:
        table: xr.Dataset = measure_text(
            _read_text(text), system, _names(name) or [], max_tokens=tokens, seed=seed,
            dtype=_dtype(dtype), output=output, progress=progress,
        )  # fmt: skip
    if not quiet:
        _print_rows(f"{system}: {name}", rows_of(table), as_json=as_json)
        print(output or "", end="\n" if output else "")


@app.command()
def bench(
    family: Annotated[
        str | None, typer.Argument(help="A kernel family; default: the cases on record.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="Its sizes, such as batch=8 length=4096.")
    ] = None,
    only: Annotated[str, typer.Option(help="Part of the names of the recorded cases.")] = "",
    peers: Annotated[bool, typer.Option(help="Time the peers that are installed too.")] = True,
) -> None:
    """Time the scan kernels on this GPU, beside the least time it allows (Markdown).

    Example: dsf bench diagonal dtype=bf16 batch=4 length=8192 width=1024
    """
    if not torch.cuda.is_available():
        raise DsfUnsupportedError(
            "dsf bench: device: expected a CUDA device, found none. On a CPU, time the torch "
            "paths with analyses/scan_speed.py."
        )
    from dsf_kernels.bench import timing

    if family is None:
        chosen = timing.cases(only)
    else:
        pairs = dict(item.split("=", 1) for item in settings or [])
        chosen = {" ".join([family, *(settings or [])]): timing.case_of(family, pairs)}
    rows = [row for name, make in chosen.items() for row in timing.measure(name, make, peers)]
    print(timing.table(rows) + "\n" + json.dumps(timing.versions()))


@app.command()
def symbolic(
    system: Annotated[str, typer.Argument(help="A name that `dsf models` lists.")],
    length: Annotated[int, typer.Option(min=1, max=6, help="Tokens.")] = 2,
    size: Annotated[int, typer.Option(min=1, max=4, help="Width of queries and keys.")] = 1,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX.")] = False,
) -> None:
    """Write A, B, C, D of a system and the map of its first tokens in symbols.

    Example: dsf symbolic metala --length 3
    """
    from dsf.symbolic import system as written

    made = written(system, length=length, size=size)
    print(made.latex() if latex else made.text())


# -- input and output --------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")


def _names(given: str | None) -> list[str] | None:
    return None if given is None else [n.strip() for n in given.split(",") if n.strip()]


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise DsfValueError(f"dsf: --dtype: expected one of {list(known)}, got {name!r}.")
    return known[name]


def _print_rows(title: str, rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([{k: _plain(v) for k, v in row.items()} for row in rows]))
        return
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    table = Table(title=escape(title), title_justify="left", row_styles=("", "dim"))
    for name, value in (rows[0] if rows else {}).items():
        text = isinstance(value, str)
        table.add_column(escape(name.replace("_", " ")), overflow="fold", no_wrap=name == "system",
                         justify="left" if text else "right")  # fmt: skip
    for row in rows:
        table.add_row(*[escape(show(value)) for value in row.values()])
    console.print(table)


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None if value != value else str(value)
    return value


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, only for a person at a terminal."""
    shown = sys.stderr.isatty() and not quiet
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("loading", total=None)

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(label))

        yield progress
