"""What do zero-sum weights do with real queries and keys that weights summing to one do not?

Every head of MiniLM reads a text under a causal mask; five mechanisms get its queries and keys:
softmax, linear attention (elu + 1), InLine, and ZeroS, whose logit of a key is the one that the
head's first query gives it (ZeroS has one logit a key, not one a pair), with both gates at one
half; its radial weights sum to zero, its full ones carry the cosine of query and key besides.
Drawn over t, median and quartiles of heads and rows: t times the spread (0 for equal weights), the
share of the absolute weight that is negative, and the absolute weight of a row, the most that
values of size 1 can give. At 131,072 tokens: `long_rows.py`.

    python analyses/zero_sum_spread.py                 # the whole text, about twenty seconds
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, causal_heads, flags, write
from torch import Tensor
from torch.nn.functional import normalize

import dsf
from dsf import measures, plot
from dsf._panels import new_figure
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.models.zeros import zeros_radial_recurrence, zeros_recurrence

KINDS = {
    "softmax": "softmax", "linear": "linear, elu + 1", "inline": "InLine",
    "radial": "ZeroS, radial", "full": "ZeroS, full",
}  # fmt: skip
SHOWN = {
    "scaled_spread": "t × spread", "negative_mass": "negative share of |weight|",
    "l1_mass": "|weight| of a row",
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Measure every row of every head, write the data set, the table and the figure."""
    args = flags(__doc__, "zero_sum_spread").parse_args()
    torch.set_num_threads(1)
    layers = causal_heads(args.text.read_text(encoding="utf-8"), args.tokens)
    rows = [xr.concat([measured(kind, heads.query.double(), heads.key.double())
                       for kind in KINDS], "kind") for heads in layers]  # fmt: skip
    data = xr.concat(rows, "layer", combine_attrs="drop")
    data = data.assign_coords(kind=list(KINDS), layer=np.arange(1, len(layers) + 1))
    data.attrs = {"model": MODEL, "text": args.text.name, "gates": "0.5, 0.5",
                  "logits": "of the head's first query",
                  "dsf_version": dsf.__version__}  # fmt: skip
    last = data.isel(query=-1).median(("layer", "head")).to_dataframe()
    print("last row, median over heads:")
    print(last[["row_sum", *SHOWN]].map("{:.3g}".format).to_string())
    write("zero_sum_spread", args.out, data, last, draw(data))


def measured(kind: str, q: Tensor, k: Tensor) -> xr.Dataset:
    """(head, query) of one mechanism on the queries and keys of one layer."""
    found = measures.row_statistics(mixer(kind, q, k), ["row_sum", *SHOWN])
    found = found.isel(batch=0, drop=True)
    return found.drop_vars([c for c in found.coords if c not in found.dims])


def mixer(kind: str, q: Tensor, k: Tensor) -> Any:
    """The mechanism on these queries and keys."""
    if kind == "softmax":
        return softmax_attention_recurrence(q, k)
    if kind == "linear":
        return linear_attention_recurrence(q, k)
    if kind == "inline":
        return inline_attention_recurrence(q, k)
    logits = torch.einsum("bhn,bjhn->bjh", q[:, 0], k) * q.shape[3] ** -0.5
    half = torch.full_like(logits, 0.5)
    if kind == "radial":
        return zeros_radial_recurrence(logits, half, half)
    return zeros_recurrence(normalize(q, dim=-1), normalize(k, dim=-1), logits, half, half)


def draw(data: xr.Dataset) -> Any:
    """Median and quartiles of each number over the heads and the rows of a stretch of t."""
    n = data.sizes["query"]
    edges = np.unique(np.geomspace(2, n + 1, 18).round().astype(int))
    middles = np.sqrt(edges[:-1] * (edges[1:] - 1))
    with plot.styled():
        figure = new_figure((7.2, 2.8))
        panels = figure.subplots(1, 3)
        for ax, letter, (name, label) in zip(panels, "abc", SHOWN.items(), strict=True):
            for place, kind in enumerate(KINDS):
                values = data[name].sel(kind=kind).transpose("query", ...).values.reshape(n, -1)
                low, middle, high = np.array([
                    np.quantile(values[a - 1 : b - 1], (0.25, 0.5, 0.75))
                    for a, b in itertools.pairwise(edges)
                ]).T  # fmt: skip
                dashes = (3, 2) if kind == "softmax" else (None, None)
                ax.plot(middles, middle, color=f"C{place}", label=KINDS[kind], dashes=dashes,
                        zorder=3 if kind == "softmax" else 2)  # fmt: skip
                ax.fill_between(middles, low, high, color=f"C{place}", alpha=0.13, linewidth=0)
            ax.set(xlabel="t", xscale="log", yscale="log" if letter == "a" else "linear")
            ax.set_title(f"({letter}) {label}", loc="left")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS))
    return figure


if __name__ == "__main__":
    main()
