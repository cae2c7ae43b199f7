"""What the scripts on heads of the pre-trained encoder share: input, flags, what is written."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

import dsf
from dsf import plot, results
from dsf.factors import SoftmaxRows
from dsf.pretrained import minilm
from dsf.wrappers import core

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "data" / "origin_of_species.txt"
MODEL = "all-MiniLM-L6-v2"


@torch.no_grad()
def causal_heads(text: str, tokens: int) -> list[SoftmaxRows]:
    """Each layer's queries and keys under a causal mask: softmax heads on real input that do not
    look ahead, though the encoder's own do."""
    model, tokenizer = minilm()
    inputs = dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens))
    rows: list[Any] = [core(trace.recurrence).C for trace in dsf.trace(model, inputs).values()]
    return [dataclasses.replace(r, causal=True, key_mask=None, bias=None) for r in rows]


def causal_maps(heads: SoftmaxRows) -> Tensor:
    """(head, query, key) in float64."""
    whole = slice(0, heads.query.shape[1])
    return torch.softmax(heads.logits(whole, whole).double(), -1)[0]


def flags(doc: str | None, name: str, tokens: int = 256) -> argparse.ArgumentParser:
    """--text, --tokens and --out, under the script's own page of help."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=tokens, help="at most so many are read")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / name)
    return parser


def write(name: str, folder: Path, data: xr.Dataset, table: Any, figure: Any) -> None:
    """The data set, the table (a data frame) and the figure, in files named after the script."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [results.save(data, folder / f"{name}.nc", overwrite=True)]
    written += [plot.save_figure(figure, folder / f"{name}.{kind}") for kind in ("pdf", "png")]
    table.to_csv(folder / f"{name}.csv")
    for path in [*written, folder / f"{name}.csv"]:
        print(f"wrote {path}")
