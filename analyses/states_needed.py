"""How many states does each head of a real model need?

Every head of MiniLM reads a text under a causal mask. Its map is realised as a recurrence of n
states a step (`dsf.realise`, whose error is exact), and the fewest states are found that stay
within a relative Frobenius error of 10, 3, 1 and 0.1 %. Any map of L tokens is exact with L/2
states, so what is saved is read against that. Beside it: are the states a head needs its width, or
the degrees of freedom of its queries and keys?

    python analyses/states_needed.py                   # 128 tokens, a minute and a half
    python analyses/states_needed.py --tokens 64 --errors 0.1 0.01
"""

from __future__ import annotations

import argparse
import bisect
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, causal_heads, causal_maps, flags, write
from scipy.stats import spearmanr

import dsf
from dsf import measures, plot
from dsf._panels import new_figure

REGULARISATION = 1e-3
"""Of the largest singular value of exp(q.k): about where a part in a thousand still counts."""


def main() -> None:
    """Realise every head, write the data set, the table and the figure."""
    args = _arguments()
    torch.set_num_threads(1)
    layers = causal_heads(args.text.read_text(encoding="utf-8"), args.tokens)
    counts, errors, freedom = [], [], []
    for number, heads in enumerate(layers, 1):
        maps = causal_maps(heads)
        found = [needed(m, args.errors) for m in maps]
        counts.append([[n for n, _ in row] for row in found])
        errors.append([[e for _, e in row] for row in found])
        freedom.append(measures.degrees_of_freedom(heads, REGULARISATION).by_norm.values[0])
        middle = np.median(np.array(counts[-1]), 0)
        print(f"layer {number}: " + ", ".join(
            f"{100 * e:g} %: {n:.0f}" for e, n in zip(args.errors, middle, strict=True)
        ) + " states (median head)", flush=True)  # fmt: skip
    heads = layers[0]
    data = xr.Dataset(
        {"states": (("layer", "head", "error"), np.array(counts),
                    {"long_name": "states at every step", "units": "1"}),
         "reached": (("layer", "head", "error"), np.array(errors),
                     {"long_name": "relative Frobenius error", "units": "1"}),
         "degrees_of_freedom": (("layer", "head"), np.array(freedom), {"units": "1"})},
        coords={"layer": np.arange(1, len(layers) + 1), "error": args.errors},
        attrs={"model": MODEL, "text": args.text.name, "tokens": heads.query.shape[1],
               "head_width": heads.query.shape[3], "regularisation": REGULARISATION,
               "dsf_version": dsf.__version__},
    )  # fmt: skip
    write("states_needed", args.out, data, data.to_dataframe(), draw(data))


def needed(weights: torch.Tensor, errors: Sequence[float]) -> list[tuple[int, float]]:
    """For each error the fewest states at every step that stay within it, and what they leave."""
    size = float(torch.linalg.matrix_norm(weights))

    @functools.cache
    def left(most: int) -> float:
        return float(dsf.realise(weights[None, None], max_state=most, side="lower")[1]) / size

    full = (len(weights) + 1) // 2
    fewest = [bisect.bisect_left(range(full), True, key=lambda n, e=e: left(n + 1) <= e) + 1
              for e in errors]  # fmt: skip
    return [(n, left(n)) for n in fewest]


def draw(data: xr.Dataset) -> Any:
    """States by layer at each error; states at the 1 % error against degrees of freedom."""
    length, width = data.attrs["tokens"], data.attrs["head_width"]
    with plot.styled():
        figure = new_figure((7.2, 2.8))
        layers, freedom = figure.subplots(1, 2, width_ratios=(1.5, 1))
        n_error = data.sizes["error"]
        for place, error in enumerate(data.error.values):
            for layer in data.layer.values:
                at = np.sort(data.states.sel(layer=layer, error=error).values)
                centre = layer + 0.8 * ((place + 0.5) / n_error - 0.5)
                spread = centre + np.linspace(-0.06, 0.06, len(at))
                layers.plot(spread, at, "o", color=f"C{place}", markersize=2.5, alpha=0.8,
                            label=f"{100 * error:g} %" if layer == 1 else None)  # fmt: skip
        layers.axhline(length / 2, color="black", linewidth=1, linestyle="--")
        layers.axhline(width, color="0.5", linewidth=1, linestyle=":")
        layers.text(0.5, length / 2 + 1, "L/2", fontsize="small")
        layers.text(0.5, width + 1, "head width", fontsize="small", color="0.4")
        layers.set(xlabel="layer", ylabel="states needed", ylim=(0, 0.55 * length))
        layers.set_title("(a) by relative error of the map", loc="left")
        layers.legend(loc="upper center", ncols=n_error, bbox_to_anchor=(0.5, -0.22))
        error = data.error.values[min(2, n_error - 1)]
        states = data.states.sel(error=error)
        shade = freedom.scatter(data.degrees_of_freedom, states, s=10, cmap="viridis",
                                c=data.layer.broadcast_like(states))  # fmt: skip
        found: Any = spearmanr(data.degrees_of_freedom.values.ravel(), states.values.ravel())
        freedom.set(xlabel="degrees of freedom of q, k", ylabel=f"states at {100 * error:g} %")
        freedom.set_title(f"(b) every head, rank correlation {found.statistic:.2f}", loc="left")
        figure.colorbar(shade, ax=freedom, label="layer")
    return figure


def _arguments() -> argparse.Namespace:
    parser = flags(__doc__, "states_needed", tokens=128)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.1, 0.03, 0.01, 0.001])
    return parser.parse_args()


if __name__ == "__main__":
    main()
