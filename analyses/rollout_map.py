"""Which token does MiniLM's output come from: end to end, against the product of attention maps?

Attention rollout (Abnar and Zuidema, 2020) multiplies the layers' head-averaged maps, each mixed
half and half with the identity for the residual. It knows nothing of values, output projections,
norms or MLPs. `dsf.rollout` has them: the exact Jacobian of the model with its attention weights
and norms held fixed, whose blocks M_tj are reduced to their Frobenius norms. Drawn are the maps of
the whole model as shares of each row, and over depth the share of the token itself and the rank
correlation of attention rollout with the exact map, row by row without the diagonal. Needs no
network: the weights come with a package (`dsf.pretrained.minilm`).

    python analyses/rollout_map.py                       # exact maps: about a minute on one core
    python analyses/rollout_map.py --probes 64           # sketched throughout: half of that
    python analyses/rollout_map.py --text "The cat sat on the mat." --out results/cat
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import spearmanr

import dsf
from dsf import plot, results
from dsf._panels import colour_bar, new_figure
from dsf.pretrained import minilm

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The trophy does not fit in the suitcase because it is too big."
KINDS = {
    "attention": "attention rollout",
    "omitted": "exact, MLPs omitted",
    "jacobian": "exact, MLP Jacobians",
}
DEPTH_PROBES = 32
"""Random probes a query for the curves over depth; the maps are exact unless asked otherwise."""


def main() -> None:
    """Trace, compose, write the data set and the figure."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = minilm()
    inputs = dict(tokenizer(args.text, return_tensors="pt"))
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    layers, by_depth = model.encoder.layer, []
    for depth in range(1, len(layers) + 1):
        model.encoder.layer = layers[:depth]
        traces = dsf.trace(model, inputs)
        last = depth == len(layers)
        by_depth.append(maps(traces, tokens, args.probes if last else DEPTH_PROBES))
    data = dataset(by_depth, args.text)
    args.out.mkdir(parents=True, exist_ok=True)
    written = [results.save(data, args.out / "rollout_map.nc", overwrite=True)]
    figure = draw(data)
    written += [plot.save_figure(figure, args.out / f"rollout_map.{k}") for k in ("pdf", "png")]
    for kind, name in KINDS.items():
        at = data.sel(kind=kind).isel(depth=-1)
        print(f"{name:>22}: share of the token itself {float(at.own_share):.3f}", end="")
        agrees = f", rank correlation with attention rollout {float(at.rank_correlation):.3f}"
        print("" if kind == "attention" else agrees)
    for path in written:
        print(f"wrote {path}")


def maps(
    traces: Mapping[str, dsf.LayerTrace], tokens: list[str], probes: int | None
) -> dict[str, xr.DataArray]:
    """Each kind's map (query, key) from the embedding to the output of the last traced layer."""
    found = {"attention": attention_rollout(traces, tokens)}
    for mlp in ("omitted", "jacobian"):
        composed = dsf.rollout(traces, mlp=mlp)
        found[mlp] = composed.norm(probes=probes, tokens=tokens).isel(batch=0)
    return found


def attention_rollout(traces: Mapping[str, dsf.LayerTrace], tokens: list[str]) -> xr.DataArray:
    """The product over layers of half the head-averaged map and half the identity."""
    total: Any = None
    for trace in traces.values():
        layer = dsf.attention_map(trace.recurrence, tokens=tokens).isel(batch=0).mean("head")
        mixed = 0.5 * layer.values + 0.5 * np.eye(len(tokens))
        total = layer.copy(data=mixed if total is None else mixed @ total.values)
    return total


def dataset(by_depth: list[dict[str, xr.DataArray]], text: str) -> xr.Dataset:
    """Shares of rows at full depth, and how own shares and agreement go with depth."""
    kinds, depth = list(KINDS), np.arange(1, len(by_depth) + 1)
    shared = [{k: shares(maps[k]) for k in kinds} for maps in by_depth]
    own = [[float(np.diag(at[k].values).mean()) for at in shared] for k in kinds]
    rank = [[agreement(at["attention"].values, at[k].values) for at in shared] for k in kinds]
    bare = [shared[-1][k].reset_coords(drop=True) for k in kinds]
    final = xr.concat(bare, "kind", combine_attrs="drop")
    final = final.assign_coords(
        query_token=("query", shared[-1]["omitted"]["query_token"].values),
        key_token=("key", shared[-1]["omitted"]["key_token"].values),
    )  # fmt: skip
    final.attrs = {"long_name": "share of row", "units": "1", "direction": "bidirectional"}
    attrs = {
        "text": text, "model": "all-MiniLM-L6-v2", "dsf_version": dsf.__version__,
        "maps": by_depth[-1]["omitted"].attrs["reduction"], "error": max(
            float(m["omitted"].attrs["error"]) for m in by_depth),
        "curves": f"{DEPTH_PROBES} random probes below full depth",
    }  # fmt: skip
    return xr.Dataset(
        {
            "share": final,
            "own_share": (("kind", "depth"), np.array(own)),
            "rank_correlation": (("kind", "depth"), np.array(rank)),
        },
        coords={"kind": kinds, "depth": depth}, attrs=attrs,
    )  # fmt: skip


def shares(map_: xr.DataArray) -> xr.DataArray:
    """Rows divided by their sums."""
    return (map_ / map_.sum("key")).transpose("query", "key")


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman correlation of two maps' rows without the diagonal, averaged over rows."""
    off = ~np.eye(len(a), dtype=bool)
    rows = [spearmanr(a[t][off[t]], b[t][off[t]]).statistic for t in range(len(a))]
    return float(np.mean(rows))


def draw(data: xr.Dataset) -> Any:
    """Three maps on one scale above two curves over depth."""
    panels = [data["share"].sel(kind=k, drop=True) for k in KINDS]
    for panel in panels:
        panel.attrs = data["share"].attrs
    with plot.styled():
        figure = new_figure((7.0, 4.6))
        above, below = figure.subfigures(2, 1, height_ratios=(1.55, 1))
        axes, norm = above.subplots(1, 3), plot.shared_norm(panels)
        for letter, ax, panel, name in zip("abc", axes, panels, KINDS.values(), strict=True):
            plot.plot_map(panel, ax=ax, norm=norm, colorbar=False)
            ax.set_title(f"({letter}) {name}", loc="left")
            if letter != "a":
                ax.set_yticks([])
                ax.set_ylabel("")
        colour_bar(
            above, axes[0].images[0], list(axes), panels[0], shrink=0.85, aspect=22, pad=0.01
        )
        curves = below.subplots(1, 2)
        for kind, name in KINDS.items():
            line = data.sel(kind=kind)
            curves[0].plot(data.depth, line.own_share, marker="o", markersize=3, label=name)
            if kind != "attention":
                curves[1].plot(data.depth, line.rank_correlation, marker="o", markersize=3,
                               label=name, color=curves[0].lines[-1].get_color())  # fmt: skip
        curves[0].set_title("(d) share of the token itself", loc="left")
        curves[0].set_ylabel("mean share of row")
        curves[1].set_title("(e) agreement of attention rollout with the exact map", loc="left")
        curves[1].set_ylabel("mean rank correlation")
        tops = (1.25 * float(data.own_share.max()), 1.0)
        for ax, top, corner in zip(curves, tops, ("upper right", "lower left"), strict=True):
            ax.set_xlabel("layers composed")
            ax.set_ylim(0.0, top)
            ax.set_xticks(data.depth.values)
            ax.legend(loc=corner)
    return figure


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default=TEXT)
    parser.add_argument(
        "--probes", type=int, default=None, help="random probes a query (default: exact maps)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "rollout_map")
    return parser.parse_args()


if __name__ == "__main__":
    main()
