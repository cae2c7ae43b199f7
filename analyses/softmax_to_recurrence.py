"""Which recurrence stands in best for a softmax head, at an equal number of states?

Heads of MiniLM read a text under a causal mask. Each map is replaced by one with n states a token:
realised (`dsf.realise`, sequential decompositions), balanced and truncated at every step, from
orthogonal random features, from features drawn by their leverage on the head's own queries and
keys (the mean of three draws), tied over a tree (hierarchical attention), expanded to first order
(InLine) and to second (Taylor), and with elu + 1 features. Monarch has no finite state; it stands
where its keys read a token would be states. What is drawn is the relative Frobenius error of the
map, median over heads and its quartiles.

    python analyses/softmax_to_recurrence.py               # 128 tokens, 12 heads, two minutes
    python analyses/softmax_to_recurrence.py --tokens 64 --heads 1 --states 4 8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, causal_heads, causal_maps, flags, write
from torch import Tensor

import dsf
from dsf import plot
from dsf._panels import new_figure
from dsf.models._random_features import draw_directions, leverage_directions
from dsf.models.hierarchical_attention import hierarchical_attention_recurrence
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.monarch_attention import monarch_attention_recurrence
from dsf.models.random_feature_attention import random_feature_attention_recurrence
from dsf.models.taylor_attention import taylor_attention_recurrence
from dsf.trees import tree_from_branching

DRAWS = 3
REGULARISATION = 2.0**-8
LINES = {
    "realised": "realised", "balanced": "balanced truncation",
    "leverage": "leverage-weighted features", "orthogonal": "orthogonal random features",
    "hierarchical": "hierarchical", "inline": "InLine",
    "taylor": "Taylor, order 2", "linear": "linear, elu + 1",
    "monarch": "Monarch (keys read)",
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Approximate every head in every way, write the data set, the table and the figure."""
    args = _arguments()
    torch.set_num_threads(1)
    layers = causal_heads(args.text.read_text(encoding="utf-8"), args.tokens)
    rows: list[tuple[int, int, str, int, float]] = []
    for number, heads in enumerate(layers, 1):
        maps = causal_maps(heads)
        for head in range(args.heads):
            q = heads.query[:1, :, head : head + 1].double()
            k = heads.key[:1, :, head : head + 1].double()
            for kind, states, found in stand_ins(q, k, maps[head], args.states):
                left = torch.linalg.matrix_norm(found - maps[head])
                rows.append((number, head, kind, states,
                             float(left / torch.linalg.matrix_norm(maps[head]))))  # fmt: skip
        print(f"layer {number} of {len(layers)}", flush=True)
    columns = list(zip(*rows, strict=True))
    names = ("layer", "head", "kind", "states", "error")
    data = xr.Dataset({n: ("case", np.array(c)) for n, c in zip(names, columns, strict=True)},
                      attrs={"model": MODEL, "text": args.text.name, "tokens": len(maps[0]),
                             "error": "relative Frobenius error of the map",
                             "dsf_version": dsf.__version__})  # fmt: skip
    table = data.to_dataframe().groupby(["kind", "states"]).error.describe()
    print(table["50%"].unstack().to_string(float_format=lambda x: f"{x:.3f}", na_rep=""))
    write("softmax_to_recurrence", args.out, data, table, draw(data))


def stand_ins(q: Tensor, k: Tensor, weights: Tensor, states: list[int]) -> Iterator[
    tuple[str, int, Tensor]]:  # fmt: skip
    """(kind, states, map) of every replacement of one head."""
    length, width = q.shape[1], q.shape[3]
    vectors = torch.cat([q[0, :, 0], k[0, :, 0]]) * width**-0.25

    def map_of(system: Any) -> Tensor:
        return dsf.materialise(system)[0, 0]

    for n in states:
        for kind, gauge in (("realised", "input-normal"), ("balanced", "balanced")):
            r, _ = dsf.realise(weights[None, None], max_state=n, gauge=gauge, side="lower")  # type: ignore[arg-type]
            yield kind, n, map_of(r)
        for seed in range(DRAWS):
            draw_from = torch.Generator().manual_seed(seed)
            plain = draw_directions(n, width, orthogonal=True, generator=draw_from)
            yield "orthogonal", n, map_of(random_feature_attention_recurrence(q, k, plain))
            chosen, log_weight = leverage_directions(
                vectors, n, regularisation=REGULARISATION, generator=draw_from)  # fmt: skip
            yield (
                "leverage",
                n,
                map_of(random_feature_attention_recurrence(q, k, chosen, log_weight=log_weight)),
            )
    for branching in branchings(length):
        r = hierarchical_attention_recurrence(
            q, k, tree_from_branching(length, branching), rows="free", causal=True)  # fmt: skip
        assert isinstance(r, dsf.Recurrence)
        yield "hierarchical", r.n_state, map_of(r)
    yield "inline", width + 1, map_of(inline_attention_recurrence(q, k))
    r = taylor_attention_recurrence(q, k, order=2)
    assert isinstance(r, dsf.Recurrence)
    yield "taylor", r.n_state, map_of(r)
    yield "linear", width, map_of(linear_attention_recurrence(q, k))
    block = round(length**0.5)
    yield "monarch", block + -(-length // block), map_of(
        monarch_attention_recurrence(q, k, block=block, causal=True))  # fmt: skip


def branchings(length: int) -> list[tuple[int, ...]]:
    """Trees of `length` leaves with more and more siblings in a family, if it is a power of 2."""
    power = length.bit_length() - 1
    if 1 << power != length:
        return []
    sizes = [(2,) * power]
    while len(sizes[-1]) > 2:
        last = sorted(sizes[-1])
        sizes.append((*last[2:], last[0] * last[1]))
    return sizes


def draw(data: xr.Dataset) -> Any:
    """Median error over states, quartiles shaded; single points where there is one size."""
    with plot.styled():
        axes = new_figure((5.6, 3.6)).subplots()
        table = data.to_dataframe()
        for place, (kind, name) in enumerate(LINES.items()):
            errors = table[table.kind == kind].groupby("states").error
            if not len(errors):
                continue
            low, middle, high = (errors.quantile(p) for p in (0.25, 0.5, 0.75))
            style = "o-" if len(middle) > 1 else "D"
            colour = f"C{place}" if kind != "monarch" else "black"
            axes.loglog(middle.index, middle, style, color=colour, markersize=3.5, label=name)
            axes.fill_between(middle.index, low, high, color=colour, alpha=0.12, linewidth=0)
        ticks = 2 ** np.arange(1, 1 + int(np.log2(table.states.max())), 2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set(xlabel="states", ylabel="relative error of the map")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes.get_figure()


def _arguments() -> argparse.Namespace:
    parser = flags(__doc__, "softmax_to_recurrence", tokens=128)
    parser.add_argument("--heads", type=int, default=2, help="heads of each layer")
    parser.add_argument("--states", type=int, nargs="+", default=[2, 4, 8, 16, 32, 48])
    return parser.parse_args()


if __name__ == "__main__":
    main()
