"""Which modules of a model to trace, and what to call it with; refusals, also of the result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dsf.adapters import Adapter, adapters, unsupported
from dsf.adapters._contract import Built, Visit
from dsf.errors import DsfFidelityError, DsfTypeError, DsfUnsupportedError, DsfValueError

Chosen = dict[str, tuple[nn.Module, Adapter]]


def layers_of(model: nn.Module) -> Chosen:
    """Every covered module by path; a module inside a covered one belongs to it."""
    known = adapters()
    found: Chosen = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") if outer else path for outer in found):
            continue
        adapter = next((a for a in known if a.recognises(module)), None)
        if adapter is not None:
            found[path] = (module, adapter)
    return found


def named_layers(function: str, model: nn.Module, names: Iterable[str]) -> Chosen:
    """The modules meant by names: module paths, or a path and a part of it ("lstm.l0")."""
    known = adapters()
    modules = dict(model.named_modules())
    found: Chosen = {}
    for name in names:
        plain = name.split("#")[0]
        path = plain if plain in modules else plain.rpartition(".")[0]
        if path not in modules or (path == "" and plain and "." in plain):
            raise DsfValueError(
                f"{function}: layers: expected paths of modules of {type(model).__name__}, got "
                f"{name!r}. Covered here: {listed(layers_of(model))}."
            )
        module = modules[path]
        adapter = next((a for a in known if a.recognises(module)), None)
        if adapter is None:
            inner = [f"{path}.{p}" if path else p for p in layers_of(module)]
            if not inner:
                raise unsupported(function, module, path)
            raise DsfValueError(
                f"{function}: layers: {name!r} is a {type(module).__name__}, which holds the "
                f"layers {listed(inner)}. Name one of them."
            )
        found[path] = (module, adapter)
    return found


def refuse_compiled(function: str, model: nn.Module) -> None:
    """Compiled graphs hold the functions themselves, so no tap could see them."""
    for path, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise DsfUnsupportedError(
                f"{function}: module: expected an uncompiled model, got one compiled by "
                f"torch.compile{f' at {path!r}' if path else ''}; its graph hides the layers. "
                f"Pass the original module (compiled._orig_mod)."
            )
        if kinds & {"ScriptModule", "RecursiveScriptModule"}:
            raise DsfUnsupportedError(
                f"{function}: module: expected a Python module, got a TorchScript one"
                f"{f' at {path!r}' if path else ''}. Pass the original module."
            )


def refuse_cache(function: str, arguments: Mapping[str, Any]) -> None:
    """A trace is one pass over the whole sequence: a cache would start it in the middle.

    An empty mapping is none: fla's PaTH attention wants one to look into beside a mask.
    """
    for name in ("past_key_values", "cache_params", "past_key_value"):
        if arguments.get(name) is not None and arguments[name] != {}:
            raise DsfUnsupportedError(
                f"{function}: {name}: expected no cache, got {type(arguments[name]).__name__}. "
                f"Pass the whole sequence at once, or trace each call with a cache by "
                f"dsf.trace_decoding."
            )


def model_call(function: str, model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """The model on its inputs: a dict (or BatchEncoding), a tuple or list, or one tensor."""
    if inputs is None:
        raise DsfTypeError(
            f"{function}: inputs: expected the model's inputs (a dict of keyword arguments, a "
            f"tuple, or one tensor), got None."
        )
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, tuple | list):
        args = tuple(inputs)
    else:
        args = (inputs,)
    refuse_cache(function, kwargs)
    if kwargs.get("use_cache"):
        raise DsfUnsupportedError(
            f"{function}: use_cache: expected False, got True. Pass the whole sequence at once."
        )
    parameters = _parameters(model)
    takes = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes and _makes_a_cache(getattr(model, "config", None)):
        kwargs["use_cache"] = False
    return lambda: model(*args, **kwargs)


def _makes_a_cache(config: Any) -> bool:
    """Whether a configuration, or that of one part of a composite model, asks for a cache."""
    parts = [c for c in vars(config).values() if hasattr(c, "use_cache")] if config else []
    return any(getattr(c, "use_cache", False) for c in (config, *parts))


def layer_call(function: str, layer: nn.Module, args: tuple, kwargs: dict) -> Callable[[], Any]:
    """The layer on its own arguments; a missing one is named, with the form that supplies it."""
    refuse_cache(function, kwargs)
    parameters = _parameters(layer)
    positional = [n for n, p in parameters.items()
                  if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    given = {*positional[: len(args)], *kwargs}
    named = {n: p for n, p in parameters.items()
             if n not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}  # fmt: skip
    required = [n for n, p in named.items() if p.default is p.empty]
    if required:
        raise DsfTypeError(_missing(function, layer, required))
    if "use_cache" in named:
        kwargs = {**kwargs, "use_cache": False}

    def call() -> Any:
        try:
            return layer(*args, **kwargs)
        except (TypeError, AttributeError) as error:
            absent = [n for n, p in named.items() if p.default is None]
            if not absent:
                raise
            raise DsfTypeError(_missing(function, layer, absent, error)) from error

    return call


def _missing(function: str, layer: nn.Module, names: list[str], error: object = None) -> str:
    kind = type(layer).__name__
    cause = f" (it raised {type(error).__name__}: {error})" if error else ""
    return (
        f"{function}: {', '.join(names)}: expected by {kind}.forward, got nothing{cause}. Give "
        f"{'it' if len(names) == 1 else 'what it needs of them'}, or let the model supply it: "
        f"{form_c('path.to.layer')}."
    )


def form_c(path: str) -> str:
    """How to have the model supply a layer's arguments."""
    return f'dsf.from_layer(model, layer="{path}", inputs={{...}})'


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names for a message, cut when there are many."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more if names else "none"


def not_called(visit: Visit, adapter: Adapter) -> DsfUnsupportedError:
    """The error for a layer that ran without its tapped function being called."""
    where = visit.path or type(visit.module).__name__
    if "forward" in visit.module.__dict__:
        return DsfUnsupportedError(
            f"dsf.trace: {where}: expected a layer that runs its own forward, got one that was "
            f"given another (kernelize() and use_kernels=True do this), which never calls the "
            f"function that adapter {adapter.name!r} taps. Load the model without kernels."
        )
    return DsfUnsupportedError(
        f"dsf.trace: {where}: expected the layer to call the function that adapter "
        f"{adapter.name!r} taps, got no call. A subclass with its own forward, or a pass of one "
        f"token with a cache, goes around it. Pass the whole sequence, or add an adapter."
    )


def unfaithful(
    name: str, part: Built, error: float, scan_error: float | None, limit: float
) -> DsfFidelityError:
    """The error for a recurrence that does not give back the layer's output."""
    if bool(torch.isnan(part.output).any()):
        return DsfFidelityError(
            f"dsf.trace: {name}: expected a finite output of the layer, got NaN, which no "
            f"recurrence can reproduce. Look for rows of a mask that hide every key."
        )
    at = "" if scan_error is None else f" (at the scan, before the readout: {scan_error:.3g})"
    return DsfFidelityError(
        f"dsf.trace: {name}: expected the recurrence to reproduce the layer's output within "
        f"{limit:.3g}, got a relative difference of {error:.3g}{at}. Either the layer does "
        f"something that the adapter does not know, or its weights changed since the pass. To "
        f"look at the recurrence all the same, pass a larger tolerance=."
    )


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return {}
