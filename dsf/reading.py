"""What every system makes of one text: a pre-trained encoder and the registered models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf.comparison import Comparable, own_channels, parts_of, take_heads
from dsf.errors import DsfValueError
from dsf.maps import attention_map
from dsf.models import build, registered
from dsf.tracing import trace

PRETRAINED = "minilm"
"""The name under which the pre-trained encoder (all-MiniLM-L6-v2, BERT) is compared."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One text as every chosen system reads it.

    `systems` is what `dsf.compare` takes; models read `inputs`, the encoder's embedding of the
    tokens (batch 1, time, width). `weights` says for each system where its weights come from.
    """

    tokens: list[str]
    inputs: Tensor
    systems: dict[str, Comparable]
    weights: dict[str, str]


def read(
    text: str,
    names: Sequence[str] | None = None,
    *,
    max_tokens: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Reading:
    """Tokens, embeddings and systems for `text`.

    names: "minilm" (pre-trained, every layer traced on its real forward pass) and names out of
    `dsf.models.registered()`, by default all. Models have random weights, drawn from `seed`, and
    read the encoder's embeddings of the same tokens; the text is cut after `max_tokens` tokens.
    Raises DsfValueError for unknown names or an empty text, and what `dsf.pretrained.minilm`
    raises where the encoder is not installed.
    """
    from dsf.pretrained import minilm

    known = [PRETRAINED, *registered()]
    wanted = list(dict.fromkeys(known if names is None else names))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise DsfValueError(f"dsf.read: names: expected some of {known}, got {unknown or wanted}.")
    with _no_bars():
        model, tokenizer = minilm()
    model = model.to(dtype)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens)
    if ids["input_ids"].shape[1] <= 2:
        raise DsfValueError("dsf.read: text: expected at least one word, got none.")
    with torch.no_grad():
        inputs = model.embeddings(ids["input_ids"]).detach()
    systems: dict[str, Any] = {}
    weights = {}
    for name in wanted:
        if name == PRETRAINED:
            systems[name], weights[name] = trace(model, dict(ids)), "pre-trained"
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            systems[name] = build(name, inputs.shape[-1]).to(dtype).eval()
        weights[name] = f"random, seed {seed}"
    tokens = tokenizer.convert_ids_to_tokens(ids["input_ids"][0].tolist())
    return Reading(tokens, inputs, systems, weights)


def maps_of(
    reading: Reading, *, heads: int = 4, layers: Sequence[int] | None = None
) -> dict[str, xr.DataArray]:
    """The implied attention maps (head, query, key) of every system and chosen layer.

    The first `heads` heads; of a map that differs by channel, input or output
    the first. `layers`: by
    default the first and the last of each system. Refused, with its size, where a map would not
    fit in memory.
    """
    found = {}
    for name, item in reading.systems.items():
        parts = parts_of(name, item, reading.inputs)
        ends = {parts[0].layer, parts[-1].layer} if layers is None else set(layers)
        for part in parts:
            if part.layer not in ends:
                continue
            label = f"{name}, layer {part.layer}" if len(parts) > 1 else name
            map_ = attention_map(
                take_heads(own_channels(part.system), heads), tokens=reading.tokens,
                length=len(reading.tokens), layer=part.layer, weights=reading.weights[name],
            )  # fmt: skip
            map_ = map_.isel(batch=0, head=slice(heads), drop=True)
            spare = {d: 0 for d in ("channel", "output", "input") if d in map_.dims}
            found[label] = map_.isel(spare, drop=True)
    return found


def stacked(maps: Mapping[str, xr.DataArray]) -> xr.Dataset:
    """The maps as one Dataset (system, head, query, key) for a file; missing heads are NaN."""
    n_head = max(m.sizes["head"] for m in maps.values())
    first = next(iter(maps.values()))
    values = np.full((len(maps), n_head, first.sizes["query"], first.sizes["key"]), np.nan)
    for row, map_ in zip(values, maps.values(), strict=True):
        row[: map_.sizes["head"]] = map_.values
    labels = ("structure", "direction", "weights", "mode", "gauge", "precision")
    coords = {
        "system": list(maps), "head": np.arange(n_head),
        **{k: ("system", [str(m.attrs[k]) for m in maps.values()]) for k in labels},
        **{name: first[name] for name in ("query", "key", "query_token", "key_token")},
    }  # fmt: skip
    data = xr.DataArray(
        values.astype(np.float32), dims=("system", "head", "query", "key"), coords=coords,
        name="attention_map", attrs={"units": "1", "long_name": "implied attention weight"},
    )  # fmt: skip
    kept = {k: first.attrs[k] for k in ("dsf_version", "schema_version")}
    return data.to_dataset().assign_attrs(kept)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The library is silent: no progress bar of transformers while weights are loaded."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield  # the loader says what is missing
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
