"""What do zero-sum rows look like when they are very long?

One ZeroS layer as released, freshly initialised, on independent Gaussian tokens, with Gaussian
logits of unit variance (those of a fresh layer are next to zero): row sums, t times the spread,
negative shares, absolute mass with its bound, and the shares of the orders, at every t up to
131,072, separately for the radial weights r_tj and the full ones r_tj cos(q_t, k_j); beside them
linear attention and softmax over the same queries and keys. No map is made: sums and squares come
from scans, the signs of the radial rows from their ordered logits, and what needs every weight of
a row from rows read whole: log-spaced ones for the curves, a stratified sample for the means,
which then have a standard error; with --exact from every row, in tiles: no faster way is known
that is exact. Writes the data set, a table with what each number took, and the
figure, and reports its peak memory and time.

    python analyses/long_rows.py                    # 131,072 tokens, 8 heads: minutes, < 2 GB
    python analyses/long_rows.py --length 4096 --rows 16 --out results/short
    python analyses/long_rows.py --exact            # every row: minutes a head
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import dsf
from dsf import measures, plot, results
from dsf._panels import new_figure
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.models.zeros import ZeroS, zeros_radial_recurrence, zeros_recurrence

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = {
    "radial": "ZeroS, radial", "full": "ZeroS, full", "linear": "linear attention",
    "softmax": "softmax",
}  # fmt: skip
AT_ONCE = {"radial": 8, "full": 2, "linear": 4, "softmax": 8}
"""Heads measured together: as many as leave the memory below 2 GB."""
SIGNED = ("negative_count_share", "negative_mass", "l1_mass")
SUMS = ("row_sum", "scaled_spread")
OF_SOFTMAX = (*SUMS, "entropy", "participation")
COLUMNS: tuple[str, ...] = (
    "system",
    "quantity",
    "mean",
    "standard_error",
    "largest",
    "rows",
    "seconds",
    "method",
)


class Heads:
    """Queries, keys, logits and gates of some heads, (1, time, head, ...), in float64."""

    def __init__(self, parts: tuple[Tensor, ...], which: slice) -> None:
        self.q, self.k, self.s, self.first, self.higher = (x[:, :, which].double() for x in parts)

    def system(self, name: str) -> dsf.wrappers.System:
        """The system of this name over the heads' numbers."""
        gates = (self.s, self.first, self.higher)
        if name == "radial":
            return zeros_radial_recurrence(*gates, realisation="running_max")
        if name == "full":
            return zeros_recurrence(self.q, self.k, *gates, realisation="running_max")
        width = self.q.shape[-1]  # unit vectors, put back to the size of Gaussian ones
        q, k = width**0.5 * self.q, width**0.5 * self.k
        if name == "linear":
            return linear_attention_recurrence(q, k)
        return softmax_attention_recurrence(q, k)


def main() -> None:
    """Measure, write the data set, the table and the figure."""
    args = arguments()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    data, rows = measure(args)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    data.attrs.update(seconds=seconds, peak_bytes=peak, threads=args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    written = [results.save(data, args.out / "long_rows.nc", overwrite=True)]
    written.append(args.out / "long_rows.csv")
    with written[-1].open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    figure = draw(data)
    written += [plot.save_figure(figure, args.out / f"long_rows.{k}") for k in ("pdf", "png")]
    for row in rows:
        print(
            f"{row['system']:>8} {row['quantity']:>21}: {row['mean']:.6g} "
            f"+- {row['standard_error']:.2g}, {row['rows']} rows, {row['seconds']:.0f} s"
        )
    print(f"{args.length} tokens, {args.heads} heads: {seconds:.0f} s on {args.threads} threads, "
          f"peak memory {peak / 2**30:.2f} GiB")  # fmt: skip
    for path in written:
        print(f"wrote {path}")


def measure(args: argparse.Namespace) -> tuple[xr.Dataset, list[dict[str, Any]]]:
    """Every quantity of every system: the data set, and one row of the table for each."""
    parts = layer_parts(args)
    found: dict[str, xr.DataArray] = {}
    table: list[dict[str, Any]] = []
    at = curve_rows(args.length)

    def keep(system: str, work: Callable[[Heads], xr.Dataset], kind: str) -> None:
        begin = time.perf_counter()
        size = AT_ONCE[system]
        groups = [slice(h, min(h + size, args.heads)) for h in range(0, args.heads, size)]
        heads = [work(Heads(parts, group)).isel(batch=0) for group in groups]
        joined = xr.concat(heads, "head", join="override", combine_attrs="override")
        joined = joined.assign_coords(head=np.arange(args.heads))
        took = time.perf_counter() - begin
        for name, values in joined.data_vars.items():
            if kind != "sample":
                renamed = values.rename(query="row") if kind == "curve" else values
                found[f"{system}_{name}"] = renamed.reset_coords(drop=True)
            if kind != "curve":
                table.append(row_of(system, str(name), values, took / len(joined.data_vars)))
        print(f"{system}, {', '.join(map(str, joined))}: {took:.0f} s", file=sys.stderr)

    def statistics(system: str, names: tuple[str, ...], queries: Any = None):
        return lambda heads: measures.row_statistics(heads.system(system), names, queries=queries)

    keep("radial", statistics("radial", SUMS), "all")
    keep(
        "radial", lambda heads: measures.zero_sum_signs(heads.s, heads.first, heads.higher), "all"
    )
    keep("radial", lambda heads: measures.zero_sum_bounds(
        heads.s, heads.first, heads.higher)[["mass_bound"]], "all")  # fmt: skip
    keep("radial", orders, "all")
    keep("full", statistics("full", SUMS), "all")
    keep("linear", statistics("linear", SUMS), "all")
    if args.exact:
        keep("full", full_signs, "all")
        keep("softmax", statistics("softmax", OF_SOFTMAX), "all")
    else:
        keep("full", statistics("full", SIGNED, at), "curve")
        keep("full", statistics("full", SIGNED, args.rows), "sample")
        keep("softmax", statistics("softmax", OF_SOFTMAX, at), "curve")
        keep("softmax", statistics("softmax", OF_SOFTMAX, args.rows), "sample")
    flags = {name: getattr(args, name) for name in ("length", "width", "seed", "logit_std")}
    attrs = {**flags, "input": "independent Gaussian tokens", "dsf_version": dsf.__version__,
             "torch_version": torch.__version__}  # fmt: skip
    found = {name: values.drop_vars([c for c in values.coords if c not in values.dims])
             for name, values in found.items()}  # fmt: skip
    return xr.Dataset(found, attrs=attrs), table


def layer_parts(args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Unit queries and keys, logits, and the two gates of a fresh ZeroS layer.

    The logits are Gaussian with the deviation asked for, the layer's own when that is 0.
    """
    torch.manual_seed(args.seed)
    layer = ZeroS(args.width, args.heads)
    x = torch.randn(1, args.length, args.width)
    with torch.no_grad():
        query, key = layer.unit_query_key(x)
        gates = layer.gates(x)
        drawn = args.logit_std * torch.randn(1, args.length, args.heads)
        logits = drawn if args.logit_std else layer.logits(x)
        return query, key, logits, gates.first, gates.higher


def full_signs(heads: Heads) -> xr.Dataset:
    """Signs and mass of every full row, every pair of tokens looked at."""
    gates = (heads.s, heads.first, heads.higher)
    return measures.zero_sum_signs(*gates, query=heads.q, key=heads.k)


def orders(heads: Heads) -> xr.Dataset:
    """Shares of the first and the higher orders in the squared radial weight, and their cross."""
    none = torch.zeros_like(heads.first)
    parts = {
        name: zeros_radial_recurrence(heads.s, *gates, realisation="running_max")
        for name, gates in (("first", (heads.first, none)), ("higher", (none, heads.higher)))
    }
    found = measures.order_shares(parts)
    shares = {f"{name}_order_share": found["share"].sel(order=name, drop=True) for name in parts}
    return xr.Dataset({**shares, "order_cross_term": found["cross_term"]})


def curve_rows(length: int) -> list[int]:
    """About eight positions an octave, for curves over log t."""
    t = np.unique(np.geomspace(2, length, 4 * int(np.log2(length))).round().astype(int))
    return [int(n) - 1 for n in t]


def row_of(system: str, name: str, values: xr.DataArray, seconds: float) -> dict[str, Any]:
    """One line of the table: mean over heads and rows t >= 2 (row 1 is zero by construction)."""
    mean = measures.query_mean(values, start=1)
    error = np.sqrt((mean["standard_error"] ** 2).sum()) / mean.sizes["head"]
    return {
        "system": system, "quantity": name, "mean": float(mean["mean"].mean()),
        "standard_error": float(error), "largest": float(abs(values).max()),
        "rows": values.sizes["query"], "seconds": seconds, "method": values.attrs["method"],
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process has held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


# -- figure ------------------------------------------------------------------------------------


def draw(data: xr.Dataset) -> Any:
    """Spread, negative share, mass and orders over t: medians, and bands that hold half."""
    with plot.styled():
        figure = new_figure((7.0, 4.4))
        axes = figure.subplots(2, 2)
        for name, label in SYSTEMS.items():
            curve(axes[0, 0], data[f"{name}_scaled_spread"], label)
        for name in ("radial", "full"):
            curve(axes[0, 1], data[f"{name}_negative_count_share"], SYSTEMS[name])
            curve(axes[1, 0], data[f"{name}_l1_mass"], SYSTEMS[name])
        curve(axes[1, 0], data["radial_mass_bound"], "bound", color="0.4", linestyle="--")
        for name, label in (("first_order_share", "first order"),
                            ("higher_order_share", "higher orders"),
                            ("order_cross_term", "cross term")):  # fmt: skip
            curve(axes[1, 1], data[f"radial_{name}"], label)
        titles = (
            ("(a) spread", "t × spread"), ("(b) negative weights", "share of the keys"),
            ("(c) absolute mass", r"$\sum_j|w_{tj}|$"),
            ("(d) orders of the radial rows", "share of squared weight"),
        )  # fmt: skip
        for ax, (title, label) in zip(axes.flat, titles, strict=True):
            ax.set_title(title, loc="left")
            ax.set_ylabel(label)
            ax.set_xscale("log", base=2)
            ax.set_xlabel("t")
            ax.legend()
        axes[0, 0].set_yscale("log")
        axes[1, 0].set_ylim(0.0, 1.5 * axes[1, 0].get_ylim()[1])
        axes[1, 0].legend(loc="upper right", ncols=3)
    return figure


def curve(ax: Any, values: xr.DataArray, label: str, **style: Any) -> None:
    """Medians over heads and over the rows of a third of an octave, with their quartiles."""
    axis = str(values.dims[-1])
    t, array = values[axis].values + 1, values.values
    kept = t > 1
    t, array = t[kept], array[:, kept]
    inside = [array[:, cell] for cell in octave_cells(t)]
    centre = np.array([np.exp(np.log(t[cell]).mean()) for cell in octave_cells(t)])
    middle = np.array([np.nanmedian(x) for x in inside])
    line = ax.plot(centre, middle, label=label, **style)[0]
    if "linestyle" not in style:
        low, high = (np.array([np.nanquantile(x, q) for x in inside]) for q in (0.25, 0.75))
        ax.fill_between(centre, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def octave_cells(t: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each third of an octave that has any."""
    cell = np.floor(3 * np.log2(t - 0.5)).astype(int)  # a last t = 2^n joins those before
    for number in np.unique(cell):
        yield np.flatnonzero(cell == number)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The flags, of the command line unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--length", type=int, default=131_072)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=128, help="of the layer: heads times the width of a head")
    add("--rows", type=int, default=32, help="rows sampled where every weight is needed")
    add("--exact", action="store_true", help="every row instead: O(length^2) time, same memory")
    add("--logit-std", type=float, default=1.0, help="of the logits; 0: the layer's own")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--out", type=Path, default=ROOT / "results" / "long_rows")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
