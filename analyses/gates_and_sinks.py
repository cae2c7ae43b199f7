"""Where do the heads of a real encoder put weight that they do not need, and what gate is that?

MiniLM reads a text. (a) The share of each head's absolute weight on the first token and on the
last, which carry no word; equal weights would give 1/L. (b) A head whose sink has a small value is
a gated head: the gate that stands for it is one minus the sinks' share, for every query, drawn by
layer. (c) The largest and the median activation of the residual stream, where a
sink is kept up by massive ones (`dsf.measures.massive_activations`; Sun et al., 2024; Qiu et al.,
2025). The same numbers for gated attention with random weights on the same embeddings are printed.

    python analyses/gates_and_sinks.py                 # the whole text, about twenty seconds
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, flags, write

import dsf
from dsf import measures, plot
from dsf._panels import new_figure
from dsf.pretrained import minilm
from dsf.reading import read
from dsf.wrappers import Gated


@torch.no_grad()
def main() -> None:
    """Trace, measure, write the data set, the table and the figure."""
    args = flags(__doc__, "gates_and_sinks").parse_args()
    torch.set_num_threads(1)
    text = args.text.read_text(encoding="utf-8")
    data = encoder(text, args.tokens)
    data.attrs = {"model": MODEL, "text": args.text.name, "dsf_version": dsf.__version__,
                  **gated(text, args.tokens)}  # fmt: skip
    for layer in data.layer.values:
        at = data.sel(layer=layer)
        ratio = float(at.largest) / float(at["median"])
        print(f"layer {layer}: first token {float(at['first'].mean()):.3f}, "
              f"last {float(at['last'].mean()):.3f}, implied gate {float(at.gate.mean()):.3f}, "
              f"largest activation {ratio:.0f} times the median")  # fmt: skip
    print(f"gated attention, random weights: mean gate {data.attrs['random_gate']:.3f}")
    table = data[["first", "last"]].to_dataframe()
    write("gates_and_sinks", args.out, data, table, draw(data))


def encoder(text: str, tokens: int) -> xr.Dataset:
    """Shares on the two special tokens, the gate that they imply, activations, by layer."""
    model, tokenizer = minilm()
    inputs = dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens))
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1:]
    massive = measures.massive_activations({str(n): x for n, x in enumerate(hidden, 1)})
    first, last, gate = [], [], []
    for trace in dsf.trace(model, inputs).values():
        weights = dsf.attention_map(trace.recurrence).isel(batch=0).values
        weights = np.abs(weights) / np.abs(weights).sum(-1, keepdims=True)
        first.append(weights[..., 0].mean(-1))
        last.append(weights[..., -1].mean(-1))
        gate.append(1 - weights[..., 0] - weights[..., -1])
    return xr.Dataset(
        {"first": (("layer", "head"), np.array(first), {"units": "1"}),
         "last": (("layer", "head"), np.array(last), {"units": "1"}),
         "gate": (("layer", "head", "query"), np.array(gate), {"units": "1"}),
         "largest": ("layer", massive["largest"].values),
         "median": ("layer", massive["median"].values)},
        coords={"layer": np.arange(1, len(first) + 1)},
    )  # fmt: skip


def gated(text: str, tokens: int) -> dict[str, float]:
    """Gate scores of an untrained gated attention layer on the same tokens."""
    reading = read(text, ["gated_attention"], max_tokens=tokens)
    model: Any = reading.systems["gated_attention"]
    system, _ = model.recurrence(reading.inputs)
    assert isinstance(system, Gated)
    score = measures.gate_sparsity(system)
    return {"random_gate": float(score.gate_score.mean())}


def draw(data: xr.Dataset) -> Any:
    """Sinks by head, implied gates by layer, activations by layer."""
    layers = data.layer.values
    with plot.styled():
        figure = new_figure((7.2, 2.6))
        sinks, gates, sizes = figure.subplots(1, 3)
        for name, place, marker in (("first", -0.15, "o"), ("last", 0.15, "^")):
            for layer in layers:
                at = np.sort(data[name].sel(layer=layer).values)
                sinks.plot(layer + place + np.linspace(-0.1, 0.1, len(at)), at, marker,
                           color="C0" if name == "first" else "C1", markersize=3, linestyle="",
                           label=f"{name} token" if layer == 1 else None)  # fmt: skip
        sinks.axhline(1 / data.sizes["query"], color="black", linewidth=1, linestyle="--",
                      label="equal weights")  # fmt: skip
        top = 1.4 * float(max(data["first"].max(), data["last"].max()))
        sinks.set(xlabel="layer", ylabel="mean share of |weight|", ylim=(0, top), xticks=layers)
        sinks.set_title("(a) sinks of each head", loc="left")
        sinks.legend(loc="upper left")
        parts = gates.violinplot([data.gate.sel(layer=n).values.ravel() for n in layers],
                                 positions=layers, widths=0.8, showextrema=False,
                                 showmedians=True)  # fmt: skip
        for body in parts["bodies"]:
            body.set_alpha(0.4)
        gates.set(xlabel="layer", ylabel="1 - sinks' share", ylim=(0, 1.02), xticks=layers)
        gates.set_title("(b) gate that the sinks imply", loc="left")
        sizes.semilogy(layers, data.largest, "o-", markersize=3, label="largest")
        sizes.semilogy(layers, data["median"], "o-", markersize=3, label="median")
        sizes.set(xlabel="layer", ylabel="|activation|")
        sizes.set_title("(c) residual stream", loc="left")
        sizes.legend(loc="center right")
    return figure


if __name__ == "__main__":
    main()
