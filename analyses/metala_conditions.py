"""Which linear models can take the place of a real softmax head, by MetaLA's conditions?

Left: the table of the paper, every verdict from a construction that is run (`dsf.measures.
conditions`). Right: what a fixed decay costs on real heads. Every head of MiniLM reads a text, its
queries and keys under a causal mask give a map p, and a model with a channel for each row needs
keys p_tj / a^(t-j): the largest over all rows up to a length, against the 1 that is enough without
a decay and, without any key, with a dynamic one. The first head is built and its map compared.

    python analyses/metala_conditions.py                  # the whole text, about ten seconds
    python analyses/metala_conditions.py --tokens 64 --decays 0.5 0.9
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, causal_heads, causal_maps, flags, write
from torch import Tensor

import dsf
from dsf import plot
from dsf._panels import new_figure
from dsf.measures.linear_conditions import FAMILIES, conditions, static_approximation

BUILT = 64
"""Tokens of the map that is built as a recurrence: it takes a state for every token."""
NAMES = {
    "C0": "C0\nlinear\ncost", "C1": "C1\ndynamic\nmemory", "C2": "C2\nany\nmap",
    "C3": "C3\nfewest\ngroups",
}  # fmt: skip


def main() -> None:
    """Maps of real heads, the keys they need, the table, the figure."""
    args = _arguments()
    torch.set_num_threads(1)
    layers = causal_heads(args.text.read_text(encoding="utf-8"), args.tokens)
    maps = torch.cat([causal_maps(heads) for heads in layers])
    lengths = np.unique(np.linspace(2, maps.shape[-1], 40).astype(int))
    needed = [[largest_keys(m, a, lengths) for m in maps] for a in args.decays]
    data = xr.Dataset(
        {"largest_key": (("decay", "head", "length"), np.array(needed),
                         {"units": "1", "long_name": "largest key that a fixed decay needs"})},
        coords={"decay": args.decays, "length": lengths},
        attrs={"model": MODEL, "text": args.text.name,
               "dsf_version": dsf.__version__},
    )  # fmt: skip
    table = conditions()
    first = maps[0][:BUILT, :BUILT]
    for name in ("metala", "linear_attention", "retention"):
        _, made = static_approximation(FAMILIES[name], first, decay=args.decays[0])
        data.attrs[f"error_{name}"] = float(made.error)
        print(f"{name:>17} built for one head: error {float(made.error):.1e}, "
              f"largest key {float(made.largest_key):.3g}")  # fmt: skip
    write(
        "metala_conditions", args.out, data.merge(table), table.to_dataframe(), draw(data, table)
    )


def largest_keys(weights: Tensor, decay: float, lengths: np.ndarray) -> np.ndarray:
    """max p_tj / decay^(t-j) over t < n, for every n of `lengths`."""
    lag = torch.arange(len(weights))[:, None] - torch.arange(len(weights))
    keys = torch.where(lag >= 0, weights * decay ** -lag.double(), 0.0)
    return keys.amax(1).cummax(0).values[torch.from_numpy(lengths) - 1].numpy()


def draw(data: xr.Dataset, table: xr.Dataset) -> Any:
    """The table as marks beside the keys that are needed, median and range over heads."""
    with plot.styled():
        figure = new_figure((7.0, 3.1))
        marks, keys = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
        systems = [str(s) for s in table.system.values]
        for x, condition in enumerate(NAMES):
            for y, system in enumerate(systems):
                yes = int(table[condition].sel(system=system)) == 1
                marks.plot(x, y, "o", color="C0" if yes else "0.6", markersize=5,
                           fillstyle="full" if yes else "none")  # fmt: skip
        marks.set_xticks(range(len(NAMES)), list(NAMES.values()))
        marks.xaxis.tick_top()
        marks.set_yticks(range(len(systems)), systems)
        marks.set_ylim(len(systems) - 0.4, -0.6)
        marks.set_xlim(-0.5, len(NAMES) - 0.5)
        marks.tick_params(length=0)
        marks.spines[:].set_visible(False)
        for decay in data.decay.values:
            line = data.largest_key.sel(decay=decay)
            (middle,) = keys.semilogy(data.length, line.median("head"), label=f"decay {decay:g}")
            keys.fill_between(data.length, line.min("head"), line.max("head"), alpha=0.15,
                              color=middle.get_color(), linewidth=0)  # fmt: skip
        keys.axhline(1.0, color="black", linewidth=1, linestyle="--",
                     label="no decay, or tied to the key")  # fmt: skip
        marks.set_title("(a) verdicts", loc="left")
        keys.set_title("(b) what a fixed decay needs, MiniLM's heads", loc="left")
        keys.set_xlabel("tokens")
        keys.set_ylabel("largest key needed")
        keys.legend(loc="upper left")
    return figure


def _arguments() -> argparse.Namespace:
    parser = flags(__doc__, "metala_conditions", tokens=256)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.99])
    return parser.parse_args()


if __name__ == "__main__":
    main()
