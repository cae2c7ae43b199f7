"""Which mechanisms confuse the queries of a real encoder, and which look close by?

All heads of MiniLM read a text; the queries and keys of each are given to softmax, to linear
attention with two feature maps and to InLine. Left: of the pairs of queries at least half a root
mean square apart, the share whose weights are nearly the same, against what "nearly" means. The
verdict of injectivity is beside the name: it is about all queries there are, not about these.
Right: the share of the absolute weight on the token and its two neighbours, by layer, against
equal weights. Questions of Han et al. (2024), figures 2 and 3, on a text encoder, with the numbers
that the paper leaves out (`dsf.measures.confusion_counts`, `local_share`).

    python analyses/injectivity.py                     # the whole text, about half a minute
    python analyses/injectivity.py --tokens 64
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from _heads import MODEL, causal_heads, flags, write
from torch import Tensor

import dsf
from dsf import measures, plot
from dsf._panels import new_figure
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence

KINDS = {
    "softmax": "softmax", "inline": "InLine", "relu": "linear, ReLU", "elu": "linear, elu + 1",
}  # fmt: skip
VERDICTS = {1: "injective", 0: "undecided", -1: "not injective"}
EPSILON = tuple(np.geomspace(1e-3, 0.3, 11).round(6))
ETA = 0.5
WINDOW = 3


@torch.no_grad()
def main() -> None:
    """Count, judge, write the data set, the table and the figure."""
    args = flags(__doc__, "injectivity").parse_args()
    torch.set_num_threads(1)
    layers = causal_heads(args.text.read_text(encoding="utf-8"), args.tokens)
    found: dict[str, list[Any]] = {"confused": [], "far": [], "local": [], "verdict": []}
    chance = float("nan")
    for heads in layers:
        q, k = heads.query.double(), heads.key.double()
        rows: dict[str, list[Any]] = {name: [] for name in found}
        for kind in KINDS:
            system = mixer(kind, q, k)
            counts = measures.confusion_counts(
                system, q, epsilon=EPSILON, eta=(ETA,), moduli=0)  # fmt: skip
            rows["confused"].append(counts["count"].sum(("batch", "head")).isel(eta=0).values)
            rows["far"].append(int(counts.far_pairs.sum()))
            local = measures.local_share(system, WINDOW)
            chance = float(local.chance.mean())
            rows["local"].append(float(local.mean()))
            rows["verdict"].append(judged(kind, k))
        for name, row in rows.items():
            found[name].append(row)
    data = dataset(found, layers[0].query.shape[1], chance, args.text.name)
    for kind, name in KINDS.items():
        at = data.sel(kind=kind)
        rate = float(at.confused.sel(epsilon=1e-2, method="nearest").sum() / at.far.sum())
        heads = ", ".join(f"{int((at.injective == v).sum())} {VERDICTS[v]}" for v in VERDICTS)
        print(f"{name:>16}: {100 * rate:.3g} % of pairs within 1 %; heads: {heads}")
    table = data[["local_share", "injective"]].to_dataframe()
    write("injectivity", args.out, data, table, draw(data))


def mixer(kind: str, q: Tensor, k: Tensor) -> Any:
    """The mechanism over all tokens, on a head's own queries and keys."""
    if kind == "softmax":
        return softmax_attention_recurrence(q, k, causal=False)
    if kind == "inline":
        return inline_attention_recurrence(q, k, causal=False)
    phi = {"relu": "relu", "elu": "elu_plus_one"}[kind]
    return linear_attention_recurrence(q, k, feature_map=phi, causal=False)


def judged(kind: str, k: Tensor) -> list[int]:
    """Whether queries of R^d are told apart by their weights over all keys, for every head."""
    name = kind if kind in ("softmax", "inline") else "linear"
    phi = {"relu": "relu", "elu": "elu_plus_one"}.get(kind, "identity")
    return [int(measures.query_injectivity(k[0, :, h], name, feature_map=phi).verdict[-1])
            for h in range(k.shape[2])]  # fmt: skip


def dataset(found: dict[str, list[Any]], tokens: int, chance: float, text: str) -> xr.Dataset:
    """Everything by kind and layer."""
    return xr.Dataset(
        {
            "confused": (("layer", "kind", "epsilon"), np.array(found["confused"])),
            "far": (("layer", "kind"), np.array(found["far"])),
            "local_share": (("layer", "kind"), np.array(found["local"]), {"units": "1"}),
            "injective": (("layer", "kind", "head"), np.array(found["verdict"])),
        },
        coords={"layer": np.arange(1, len(found["far"]) + 1), "kind": list(KINDS),
                "epsilon": list(EPSILON)},
        attrs={"model": MODEL, "text": text, "tokens": tokens, "eta": ETA, "window": WINDOW,
               "chance": chance, "dsf_version": dsf.__version__},
    )  # fmt: skip


def draw(data: xr.Dataset) -> Any:
    """Rates over epsilon beside local shares over layers."""
    with plot.styled():
        figure = new_figure((7.2, 2.8))
        rates, local = figure.subplots(1, 2)
        for kind, name in KINDS.items():
            at = data.sel(kind=kind)
            rate = at.confused.sum("layer") / at.far.sum("layer")
            said = VERDICTS[int(np.median(at.injective))]
            rates.loglog(data.epsilon, rate.where(rate > 0), "o-", markersize=3,
                         label=f"{name}: {said}")  # fmt: skip
            local.plot(data.layer, at.local_share, "o-", markersize=3, label=name)
        rates.set(xlabel="relative distance of weights", ylabel="share of pairs confused")
        rates.set_title(f"(a) pairs of queries {data.attrs['eta']:g} rms apart", loc="left")
        rates.legend(loc="upper left")
        local.axhline(data.attrs["chance"], color="black", linewidth=1, linestyle="--",
                      label="equal weights")  # fmt: skip
        local.set(xlabel="layer", ylabel="share of |weight|", ylim=(0, None))
        local.set_title(f"(b) on the nearest {data.attrs['window']} tokens", loc="left")
        local.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    main()
