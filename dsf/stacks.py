"""Traced layers put together with their residual streams: from one pass to a `Rollout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from dsf._frozen_pass import Stack, other_sequence, replay
from dsf.adapters._selection import layers_of, listed
from dsf.derivatives import Derivative
from dsf.errors import DsfFidelityError, DsfUnsupportedError, DsfValueError
from dsf.maps import system_attrs
from dsf.memory import require_memory
from dsf.rollouts import Rollout
from dsf.tracing import TOLERANCE, LayerTrace
from dsf.wrappers import core, is_cache

MARGIN = 10.0
"""The tolerance of one layer is widened by this for a whole stack, whose round-off adds up."""


def rollout(
    traces: Mapping[str, LayerTrace] | Sequence[LayerTrace],
    *,
    mlp: str = "omitted",
    end: str = "layers",
    stack: str | None = None,
    source: str = "own",
    tolerance: float | None = None,
) -> Rollout:
    """Traced layers composed with their residual streams: the map from token to token end to end.

    Parameters
    ----------
    traces: what `dsf.trace` found: every mixer of one stack of layers, from one pass.
    mlp: "omitted" leaves out what MLPs compute (their residual stays), "jacobian" takes their
        derivatives at the traced point.
    end: "layers" ends where the last layer does, "model" at the model's first output (final norm,
        head), so that a direction of a row may be one word of the vocabulary.
    stack: the path of the layers to compose where the model has several lists of them, such as
        "encoder.block" and "decoder.block" of T5; the mixers of the others are left out.
    source: "own" takes rows to the stack's own input tokens, "other" to the sequence that its
        cross-attention reads (a decoder's map to the encoder's tokens, with the encoder's output
        as `input`). Each holds the other fixed. That the encoder's output moves with its own
        input is a second factor, `to_encoder.apply(encoder.apply(x))` where no norm lies between
        the two stacks (BART; T5 has one).
    tolerance: largest accepted `Rollout.error`; by default `MARGIN` times that of a layer.

    The stack is the `ModuleList` (or `Sequential`) that holds the traced mixers, or the model
    itself; its own forward places residuals, norms and MLPs, and is run twice, or once without
    MLPs' Jacobians, under `dsf.freezing.Frozen`. Weights, the traced recurrences, and the
    activations of one batch stay in memory; of softmax layers also their maps.
    Raises DsfFidelityError where the stack is not linear once frozen (an unknown nonlinearity, or
    weights changed since the trace), DsfValueError for incomplete or mixed traces,
    DsfUnsupportedError for parts of one module (a torch.nn RNN) and steps with a cache. Source:
    the product of attention maps is Abnar and Zuidema (2020); this is what it approximates.
    """
    for name, value, known in (
        ("mlp", mlp, ("omitted", "jacobian")), ("end", end, ("layers", "model")),
        ("source", source, ("own", "other")),
    ):  # fmt: skip
        if value not in known:
            raise DsfValueError(
                f"dsf.rollout: {name}: expected {known[0]!r} or {known[1]!r}, got {value!r}."
            )
    given = list(traces.values()) if isinstance(traces, Mapping) else list(traces)
    chosen = _stack(given, stack)
    found = chosen.traces
    _require_maps(found)
    frozen = replay(chosen, end, mlps_constant=True)
    error = frozen.error
    assert error is not None
    limit = MARGIN * TOLERANCE.get(frozen.output.dtype, 1e-5) if tolerance is None else tolerance
    if not error <= limit:
        raise DsfFidelityError(
            f"dsf.rollout: expected the stack to be linear in its input, biases and MLP outputs "
            f"once norms and gates are held fixed, within {limit:.3g}, got a relative difference "
            f"of {error:.3g}. Something between its layers is neither a traced mixer, a norm that "
            f"dsf.freezing.Frozen knows, nor a module named like an MLP; to see its derivative "
            f"all the same, pass a larger tolerance=."
        )
    run = frozen if mlp == "omitted" else replay(chosen, end, mlps_constant=False)
    seen = run.input if source == "own" else run.other
    if seen is None:
        raise DsfValueError(
            f"dsf.rollout: source: expected 'own' for layers without cross-attention, got "
            f"{source!r}."
        )
    attrs = {
        name: found[0].attrs[name] for name in
        ("precision", "torch_version", "transformers_version") if name in found[0].attrs
    }  # fmt: skip
    names = tuple(t.name for t in found)
    attrs |= {"layers": [*names], "scope": "residual stream", "end": end,
              "direction": _direction(found) if source == "own" else "cross"}  # fmt: skip
    return Rollout(names, seen.detach(), run.output.detach(), mlp, source, error, attrs,
                   Derivative((seen,), run.output))  # fmt: skip


def _direction(traces: Sequence[LayerTrace]) -> str:
    """Cross-attention says nothing of a stack's own tokens."""
    own = [t for t in traces if other_sequence(t) is None]
    causal = all(system_attrs(t.recurrence)["direction"] == "causal" for t in own)
    return "causal" if causal else "bidirectional"


def _stack(traces: Sequence[LayerTrace], wanted: str | None) -> Stack:
    """The layers that one residual stream goes through, all of whose mixers are traced."""
    if not traces or any(getattr(t, "source", None) is None for t in traces):
        raise DsfValueError(
            "dsf.rollout: traces: expected what dsf.trace returns for a model, got "
            f"{'none' if not traces else 'something else, or a trace without its pass'}."
        )
    sources = [t.source for t in traces if t.source is not None]
    model, call = sources[0].model, sources[0].call
    if any(s.model is not model or s.call is not call for s in sources):
        raise DsfValueError("dsf.rollout: traces: expected those of one pass, got several passes.")
    parts = [t.name for t, s in zip(traces, sources, strict=True)
             if t.name.split("#")[0] != s.visit.path]  # fmt: skip
    if parts:
        raise DsfUnsupportedError(
            f"dsf.rollout: traces: expected modules of one layer each, got parts of one module: "
            f"{listed(parts)}."
        )
    paths = [_container(model, s.visit.path) for s in sources]
    stacks = list(dict.fromkeys(paths))
    path = stacks[0] if wanted is None and len(stacks) == 1 else wanted
    if path not in stacks:
        raise DsfValueError(
            f"dsf.rollout: stack: expected one of {listed(stacks)}, the lists of layers that were "
            f"traced, got {wanted!r}. Name the one to compose."
        )
    chosen = [t for t, own in zip(traces, paths, strict=True) if own == path]
    container = model.get_submodule(path)
    is_list = isinstance(container, nn.ModuleList | nn.Sequential)
    given = {t.name.split("#")[0] for t in chosen}
    prefix = f"{path}." if path else ""
    inside = {p: m for p, (m, _) in layers_of(model).items() if p.startswith(prefix)}
    missing = [p for p in inside if p not in given]
    if missing:
        raise DsfValueError(
            f"dsf.rollout: traces: expected every mixer of {path or 'the model'}, got none of "
            f"{listed(missing)}. Trace without layers=."
        )
    others = [m for p, (m, _) in layers_of(model).items() if p not in inside]
    return Stack(chosen, model, path, list(container) if is_list else [container], others,
                 sources[0].float64)  # fmt: skip


def _require_maps(traces: Sequence[LayerTrace]) -> None:
    """Refuse what would not fit: the maps of softmax layers, kept on the graph."""
    caches = [core(t.recurrence) for t in traces if is_cache(core(t.recurrence))]
    if not caches:
        return
    batch, query, head, _, key = caches[0].C.shape
    require_memory(
        "dsf.rollout", "softmax maps on the graph", ("layer", "batch", "head", "query", "key"),
        (len(caches), batch, head, query, key), caches[0].dtype, device=caches[0].device,
        advice="Trace a shorter sequence or fewer sequences at a time.",
    )  # fmt: skip


def _container(model: nn.Module, path: str) -> str:
    """The outermost list of modules above a mixer; the model itself if there is none."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if isinstance(model.get_submodule(above), nn.ModuleList | nn.Sequential):
            return above
    return ""
