"""Compare systems, traced layers and models by the same measures: one labelled table."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dsf import measures as measuring
from dsf.axes import clean_attrs
from dsf.errors import DsfError, DsfTypeError, DsfValueError
from dsf.factors import MixingRows
from dsf.maps import system_attrs
from dsf.models import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.rollouts import Progress
from dsf.scanning import scan
from dsf.tracing import LayerTrace, relative_error
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core

MEASURES = (
    "n_state", "row_sum", "spread", "negative_mass", "entropy", "effective_rank", "epsilon_rank",
    "injectivity", "first_token_share", "memory_half_life",
)  # fmt: skip
"""What is compared unless measures are named."""

SUMMARY = {
    "epsilon_rank": "max", "cut_rank": "max", "memory_half_life": "median",
    "minimal_state": "max", "injectivity_verdict": "min", "injectivity_margin": "min",
    "lyapunov_spectrum": "max", "transition_eigenvalues_log_modulus": "max",
    "monodromy_eigenvalues_log_modulus": "max", "stability_verdict": "min",
    "stability_margin": "min", "stability_step_margin": "min",
}  # fmt: skip
"""What stands for a head where a measure has many values for it; the mean unless named here."""

_AVERAGED = ("batch", "channel", "query", "key", "time", "state", "step", "output", "input")
MANY_PAIRS = 16
"""Above this many pairs of input and output, a head is measured by channels onto themselves."""


Comparable = System | LayerTrace | SequenceMixer | Mapping[str, LayerTrace]


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer of one system, ready to be measured. `error` is NaN where nothing tells it."""

    name: str
    layer: int
    system: System
    values: Tensor | None = None
    error: float = float("nan")


def compare(
    systems: Mapping[str, Comparable],
    inputs: Tensor | None = None,
    *,
    measures: Sequence[str] | None = None,
    heads: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Every measure of every head of every layer: a Dataset with dims (system, layer, head).

    Parameters
    ----------
    systems: name -> a dsf system, a `LayerTrace`, what `dsf.trace` returned (its layers become
        the layer axis), or a model of `dsf.models`, which then reads `inputs`.
    inputs: (batch, time, width) for models.
    measures: names out of `dsf.measures.registered()`, by default `dsf.comparison.MEASURES`.
    heads: measure the first so many heads of each layer; by default all. A system of one head
        with many inputs and outputs (S5, LRU) counts as one head for each channel onto itself.
    progress: called before each layer with (done, total, label), for a progress bar.

    A measure that has a value for every query, channel or sample is averaged over them; of
    epsilon ranks the largest stands, of half-lives the median over the states. Entries that do
    not exist (fewer layers or heads) are NaN. Beside the measures: `error` (system, layer), the
    relative difference between the layer's own output and the one made through its recurrence
    (for models by the reference loop); coordinates `structure`, `direction`, `states` (real
    numbers stored per value channel) of each system.
    A measure that does not apply is NaN, and attrs `not_measured` says why, as JSON.
    Raises DsfValueError for unknown measures, DsfTypeError for other objects or missing inputs.
    """
    chosen = _chosen(measures)
    parts = [part for name, item in systems.items() for part in parts_of(name, item, inputs)]
    if not parts:
        raise DsfValueError("dsf.compare: systems: expected at least one, got none.")
    refused: dict[str, str] = {}
    rows = []
    for done, part in enumerate(parts):
        if progress is not None:
            progress(done, len(parts), f"{part.name}, layer {part.layer}")
        rows.append(_measured(part, chosen, heads, refused))
    if progress is not None:
        progress(len(parts), len(parts), "done")
    return _table(parts, rows, refused, list(systems))


def parts_of(name: str, item: Comparable, inputs: Tensor | None = None) -> list[Part]:
    """The layers of one thing to compare. Raises DsfTypeError on anything else."""
    if isinstance(item, Mapping):
        return [dataclasses.replace(part, name=name)
                for trace in item.values() for part in parts_of(name, trace)]  # fmt: skip
    if isinstance(item, LayerTrace):
        return [Part(name, item.layer, item.recurrence, item.values, item.error)]
    if isinstance(item, SequenceMixer):
        if inputs is None:
            raise DsfTypeError(
                f"dsf.compare: inputs: expected a tensor (batch, time, width) for the model "
                f"{name!r}, got None."
            )
        with torch.no_grad():
            system, values = item.recurrence(inputs)
            output = item.readout(scan(system, values, "reference").to(inputs.dtype), inputs)
            return [Part(name, 0, system, values, relative_error(output, item(inputs)))]
    if isinstance(item, System):
        return [Part(name, 0, item)]
    raise DsfTypeError(
        f"dsf.compare: systems: expected a dsf system, a LayerTrace, the result of dsf.trace or a "
        f"model of dsf.models for {name!r}, got {type(item).__name__}."
    )


def take_heads(system: System, count: int) -> System:
    """The first `count` heads. Rows computed together (softmax) are left as they are."""
    if isinstance(system, Gated):
        inner = take_heads(system.system, count)
        assert not isinstance(inner, Gated)
        whole = core(inner).n_head > count
        return Gated(inner, system.gate if whole else system.gate[:, :, :count])
    if isinstance(system, Anticausal):
        return dataclasses.replace(system, recurrence=_first_heads(system.recurrence, count))
    if isinstance(system, Bidirectional):
        if isinstance(system.causal.C, MixingRows):
            return system  # both directions share these rows: one object, one softmax
        future = _first_heads(system.anticausal.recurrence, count)
        return Bidirectional(
            _first_heads(system.causal, count), Anticausal(future, system.anticausal.strict)
        )
    return _first_heads(system, count)


def own_channels(system: System) -> System:
    """A system of one head and many inputs and outputs as one head for each channel i: u_i to y_i.

    Its whole map has inputs x outputs entries for each pair of tokens. Others are left alone.
    """
    if not isinstance(system, Recurrence) or system.n_input * system.n_output <= MANY_PAIRS:
        return system
    dense = isinstance(system.B, Tensor) and isinstance(system.C, Tensor)
    if not dense or system.n_input != system.n_output or system.n_head != 1:
        return system
    D = system.D
    return system.replace(
        B=system.B.movedim(4, 2).flatten(2, 3)[..., None],  # type: ignore[union-attr]
        C=system.C.movedim(3, 2).flatten(2, 3)[..., None, :],  # type: ignore[union-attr]
        D=None if D is None else D[:, :, 0].diagonal(dim1=-2, dim2=-1)[..., None, None],
        initial_state=None,
    )  # fmt: skip


# -- helpers -----------------------------------------------------------------------------------


def _first_heads(r: Recurrence, count: int) -> Recurrence:
    if isinstance(r.C, MixingRows) or r.n_head <= count:
        return r

    def cut(x: Any) -> Any:
        return x[:, :, :count] if isinstance(x, Tensor) and x.shape[2] > 1 else x

    h0 = r.initial_state
    return r.replace(
        A=r.A.map_tensors(cut), B=cut(r.B), C=cut(r.C), D=cut(r.D),
        initial_state=h0[:, :count] if h0 is not None and h0.shape[1] > 1 else h0,
    )  # fmt: skip


def _real_states(r: Recurrence) -> int:
    """Stored numbers per value channel: a complex state is two."""
    return r.n_state * (2 if r.dtype.is_complex else 1)


def _chosen(names: Sequence[str] | None) -> dict[str, Callable[..., Any]]:
    known = measuring.registered()
    wanted = MEASURES if names is None else names
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise DsfValueError(
            f"dsf.compare: measures: expected names out of {list(known)}, got {unknown}."
        )
    return {name: known[name] for name in wanted}


def _measured(
    part: Part, chosen: Mapping[str, Callable], heads: int | None, refused: dict[str, str]
) -> dict[str, xr.DataArray]:
    """The measures of one layer, each (head,)."""
    system = own_channels(part.system)
    system = system if heads is None else take_heads(system, heads)
    length = None if part.values is None else int(part.values.shape[1])
    given = {"values": part.values, "length": length}
    found: dict[str, xr.DataArray] = {}
    for name, measure in chosen.items():
        takes = inspect.signature(measure).parameters
        options = {k: v for k, v in given.items() if k in takes and v is not None}
        try:
            result = measure(system, **options)
        except DsfError as error:
            refused[f"{part.name}, layer {part.layer}, {name}"] = str(error)
            continue
        several = isinstance(result, xr.Dataset)
        arrays = (
            {f"{name}_{own}": array for own, array in result.data_vars.items()}
            if several else {name: result}
        )  # fmt: skip
        for own, array in arrays.items():
            if "head" in array.dims:
                found[own] = _per_head(own, array).isel(head=slice(heads))
    return found


def _per_head(name: str, array: xr.DataArray) -> xr.DataArray:
    """One number a head, as `SUMMARY` says; of texts and vectors the last query's."""
    others = [d for d in array.dims if d in _AVERAGED]
    extra = [d for d in array.dims if d not in (*_AVERAGED, "head")]
    if array.dtype.kind in "biuf" and not extra:
        wide = array.astype(np.float64)
        value = getattr(wide, SUMMARY.get(name, "mean"))(others) if others else wide
    else:
        value = array.isel({d: 0 if d == "batch" else -1 for d in others})
    value = value.transpose("head", *extra)
    return value.drop_vars(list(value.coords)).assign_attrs(array.attrs)


def _table(
    parts: Sequence[Part], rows: Sequence[Mapping[str, xr.DataArray]], refused: Mapping[str, str],
    names: Sequence[str],
) -> xr.Dataset:  # fmt: skip
    layers = sorted({part.layer for part in parts})
    lead = (len(names), len(layers))
    n_head = max((a.sizes["head"] for row in rows for a in row.values()), default=1)
    errors = np.full(lead, np.nan)
    for part in parts:
        errors[names.index(part.name), layers.index(part.layer)] = part.error
    columns: dict[str, xr.Variable] = {}
    for name in dict.fromkeys(own for row in rows for own in row):
        cells = {(names.index(part.name), layers.index(part.layer)): row[name]
                 for part, row in zip(parts, rows, strict=True) if name in row}  # fmt: skip
        columns[name] = _column(cells, lead, n_head)
    meta = {"units": "1", "long_name": "relative difference from the layer's own output"}
    labels = {part.name: system_attrs(part.system) for part in parts}
    states = {part.name: _real_states(core(part.system)) for part in parts}
    coords = {
        "system": list(names), "layer": layers, "head": np.arange(n_head),
        "structure": ("system", [labels[n]["structure"] for n in names]),
        "direction": ("system", [labels[n]["direction"] for n in names]),
        "states": ("system", [states[n] for n in names]),
    }  # fmt: skip
    import dsf

    attrs = {"dsf_version": dsf.__version__, "schema_version": 1, "torch_version":
             torch.__version__, "not_measured": json.dumps(refused)}  # fmt: skip
    variables = {"error": (("system", "layer"), errors, meta), **columns}
    return xr.Dataset(variables, coords, clean_attrs(attrs))


def _column(
    cells: Mapping[tuple[int, int], xr.DataArray], lead: tuple[int, int], n_head: int
) -> xr.Variable:
    """The cells (head, ...) side by side, padded by NaN (or empty text) where there are none."""
    first = next(iter(cells.values()))
    extra = [max(sizes) for sizes in zip(*(c.shape[1:] for c in cells.values()), strict=True)]
    is_text = first.dtype.kind in "US"
    width = max(c.dtype.itemsize for c in cells.values())
    dtype = np.dtype(f"U{max(width // 4, 1)}") if is_text else np.result_type(
        np.float64, *(c.dtype for c in cells.values()))  # fmt: skip
    values = np.full((*lead, n_head, *extra), "" if is_text else np.nan, dtype)
    for place, cell in cells.items():
        values[(*place, *(slice(size) for size in cell.shape))] = cell.values
    kept = ("units", "long_name", "method", "flag_values", "flag_meanings", "tolerance")
    meta = {k: first.attrs[k] for k in kept if k in first.attrs}
    packed = {} if is_text else {"zlib": True, "complevel": 1}  # for files: mostly padding
    return xr.Variable(("system", "layer", "head", *first.dims[1:]), values, meta, packed)
