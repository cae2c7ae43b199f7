"""How far back does a head look, and is that what its states remember?

MiniLM reads a text: over distance, the share of each layer's absolute attention weight, against
weights that are all equal; and the distance that holds 90 % of it for every head. Systems with a
finite state read the same embeddings with random weights (so they show what a structure does
before training): the distance that holds 90 % of a head's map against the half-life of its states.
A single exponential has d = log2(10) times its half-life; the length of the text bounds d.

    python analyses/memory_horizon.py                                  # about half a minute
    python analyses/memory_horizon.py --systems gla retention --tokens 64
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import flags, write

import dsf
from dsf import measures, plot
from dsf._panels import new_figure
from dsf.comparison import parts_of, take_heads
from dsf.reading import PRETRAINED, Reading, read

SYSTEMS = ("retention", "mamba2", "gla", "hgrn2", "metala", "rglru")
HEADS = 12
MASS = 0.9


@torch.no_grad()
def main() -> None:
    """Measure, write the data set, the table and the figure."""
    args = _arguments()
    torch.set_num_threads(1)
    text = args.text.read_text(encoding="utf-8")
    reading = read(text, [PRETRAINED, *args.systems], max_tokens=args.tokens, seed=args.seed)
    data = encoder(reading).merge(states(reading, args.systems))
    data.attrs = {"text": args.text.name, "tokens": len(reading.tokens), "mass": MASS,
                  "weights": f"minilm pre-trained, others random, seed {args.seed}",
                  "dsf_version": dsf.__version__}  # fmt: skip
    for layer in data.layer.values:
        at = data.layer_horizon.sel(layer=layer)
        print(f"minilm layer {layer}: {100 * MASS:g} % of the weight within "
              f"{float(at.min()):.0f} to {float(at.max()):.0f} tokens")  # fmt: skip
    table = data[["horizon", "half_life"]].to_dataframe().dropna(how="all")
    write("memory_horizon", args.out, data, table, draw(data))


def encoder(reading: Reading) -> xr.Dataset:
    """MiniLM: (layer, step) share within a distance, its value for equal weights, and horizons."""
    shares, horizons = [], []
    for part in parts_of(PRETRAINED, reading.systems[PRETRAINED]):
        shares.append(measures.lag_mass(part.system).isel(batch=0).mean("head").values.cumsum())
        horizons.append(measures.effective_horizon(part.system, MASS).isel(batch=0).values)
    n = len(shares[0])
    lag = np.abs(np.arange(n)[:, None] - np.arange(n))
    equal = np.bincount(lag.ravel(), minlength=n).cumsum() / n**2
    return xr.Dataset(
        {"within": (("layer", "step"), np.array(shares),
                    {"long_name": "share of the absolute weight within a distance"}),
         "within_equal": ("step", equal),
         "layer_horizon": (("layer", "own_head"), np.array(horizons), {"units": "step"})},
        coords={"layer": np.arange(1, len(shares) + 1), "step": np.arange(n)},
    )  # fmt: skip


def states(reading: Reading, names: list[str]) -> xr.Dataset:
    """(system, head): the horizon of the map and the half-life of the states, in tokens."""
    found = np.full((2, len(names), HEADS), np.nan)
    for row, name in enumerate(names):
        (part,) = parts_of(name, reading.systems[name], reading.inputs)
        system = take_heads(part.system, HEADS)
        if isinstance(system, dsf.Recurrence):
            system = system.replace(D=None)  # the skip is no memory, and would hold most weight
        length = reading.inputs.shape[1]
        for place, values in enumerate((
            measures.effective_horizon(system, MASS, length=length),
            measures.memory_half_life(system),
        )):  # fmt: skip
            extra = [d for d in values.dims if d != "head"]
            mean = values.astype(float).mean(extra).values
            found[place, row, : len(mean)] = mean
    return xr.Dataset({"horizon": (("system", "head"), found[0], {"units": "step"}),
                       "half_life": (("system", "head"), found[1], {"units": "step"})},
                      coords={"system": list(names), "head": np.arange(HEADS)})  # fmt: skip


def draw(data: xr.Dataset) -> Any:
    """Shares over distance, horizons by layer, horizons against half-lives."""
    with plot.styled():
        figure = new_figure((7.2, 2.6))
        within, layers, lives = figure.subplots(1, 3)
        shade = np.linspace(0.85, 0.25, data.sizes["layer"])
        for layer, grey in zip(data.layer.values, shade, strict=True):
            label = f"layer {layer}" if layer in (1, data.sizes["layer"]) else None
            colour = (grey * 0.5, grey * 0.7, 0.9)
            within.plot(data.step, data.within.sel(layer=layer), color=colour, label=label)
        within.plot(data.step, data.within_equal, "k--", linewidth=1, label="equal weights")
        within.set(xlabel="distance", ylabel="share of |weight| within it", ylim=(0, 1.02))
        within.set_title("(a) MiniLM by layer", loc="left")
        within.legend(loc="lower right")
        for layer in data.layer.values:
            at = np.sort(data.layer_horizon.sel(layer=layer).values)
            spread = layer + np.linspace(-0.18, 0.18, len(at))
            layers.plot(spread, at, "o", color="C0", markersize=3, alpha=0.8)
        equal = int(np.argmax(data.within_equal.values >= MASS))
        layers.axhline(equal, color="black", linewidth=1, linestyle="--")
        layers.set(xlabel="layer", ylabel=f"distance with {100 * MASS:g} %", ylim=(0, None))
        layers.set_title("(b) each head of it", loc="left")
        for name in data.system.values:
            at = data.sel(system=name)
            lives.loglog(at.half_life, at.horizon, "o", markersize=3, label=str(name))
        ends = np.array([0.2, data.sizes["step"] / math.log2(1 / (1 - MASS))])
        lives.loglog(ends, ends * math.log2(1 / (1 - MASS)), "k--", linewidth=1)
        lives.set(xlabel="half-life of the states", ylabel=f"distance with {100 * MASS:g} %")
        lives.set_title("(c) untrained systems", loc="left")
        lives.legend(loc="lower right", fontsize="x-small")
    return figure


def _arguments() -> argparse.Namespace:
    parser = flags(__doc__, "memory_horizon", tokens=256)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
