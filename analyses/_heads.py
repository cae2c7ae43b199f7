"""The heads of the pre-trained encoder on a text, as scripts here look at them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsf
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
