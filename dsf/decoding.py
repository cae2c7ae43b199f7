"""Decoding with a cache, traced call by call: what each layer does with the tokens it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsf.adapters import Adapter, unsupported
from dsf.adapters._contract import Visit
from dsf.adapters._one_token import Decoding
from dsf.adapters._selection import Chosen, layers_of, named_layers, refuse_compiled
from dsf.adapters._session import cache_has_seen, run_pass
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.tracing import LayerTrace, traces_of

_CACHES = ("past_key_values", "cache_params", "state")
"""The names that models have for their caches; "state" is RWKV's, a list of tensors."""
_MODULE_STATES = ("recurrent_states", "conv1d_state")
"""Where RecurrentGemma's modules hold their states."""
_BY_TOKEN = ("position_ids", "token_type_ids", "decoder_position_ids")
"""Inputs with one entry for each token, next to the tokens and their mask."""


def trace_decoding(
    model: nn.Module,
    inputs: Mapping[str, Any],
    n_token: int,
    layers: Sequence[str] | None = None,
    *,
    cache: Any = None,
    tolerance: float | None = None,
    precision: str = "auto",
    gradients: bool = False,
) -> list[dict[str, LayerTrace]]:
    """The layers of a transformers model as it decodes: one dict of traces for each call.

    The model is given all but the last n_token tokens of `inputs` in one call, then the last ones
    one by one, with a cache. To trace a generation give what was generated:
    `trace_decoding(model, {"input_ids": generated}, n_new)`.

    Each trace is of its call's tokens alone, and its recurrence starts from what the cache held:

        h_past = initial_state,   h_t = A_t h_{t-1} + B_t u_t,   y_t = C_t h_t + D_t u_t

    so the last state of one call is the first of the next, and the outputs side by side are those
    of `dsf.trace` on the whole sequence, if the model looks back alone. For softmax attention the
    state is the values in the cache's slots and `recurrence.C` the weights of the new queries over
    all of them. Cross-attention reads its whole other sequence at each call.

    Parameters
    ----------
    inputs: keyword arguments: input_ids (batch, time), and attention_mask if there is one. Of an
        encoder-decoder decoder_input_ids are the tokens, and the encoder runs in the first call.
    cache: an empty transformers cache (for instance a StaticCache) to decode with, which is
        written on; by default the one that the model makes.

    The other arguments, the check of each trace and what is put back are those of `dsf.trace`;
    attrs["past"] says how many tokens came before. Raises DsfValueError when n_token does not
    leave a token, DsfUnsupportedError for models and layers without a cache. Memory: for each
    call the keys and values of all slots.
    """
    refuse_compiled("dsf.trace_decoding", model)
    names = set(inspect.signature(model.forward).parameters)
    cache_name = next((name for name in _CACHES if name in names), None)
    if cache_name is None or not hasattr(model, "config"):
        raise DsfUnsupportedError(
            f"dsf.trace_decoding: model: expected a transformers model that takes "
            f"{' or '.join(_CACHES)}, got {type(model).__name__}, which takes no cache. Use "
            f"dsf.trace."
        )
    calls = _Calls(dict(inputs), n_token, attends=cache_name == "past_key_values")
    chosen = _chosen(model, layers)
    if precision not in ("auto", "native"):
        raise DsfValueError(
            f"dsf.trace_decoding: precision: expected 'auto' or 'native', got {precision!r}."
        )
    float64 = precision == "auto" and torch.float64 in {p.dtype for p in model.parameters()}

    def decode() -> None:
        _decode(model, calls, cache_name, cache)

    with _states_of_modules(model):
        visits = run_pass(model, decode, chosen, gradients=gradients, float64=float64)
    steps = []
    for past in calls.starts:
        of_call = [_without_cache(visit) for visit in visits if visit.past == past]
        found = traces_of(model, decode, of_call, chosen, layers, tolerance, gradients, float64)
        steps.append({
            name: dataclasses.replace(t, source=None, attrs={**t.attrs, "past": past})
            for name, t in found.items()
        })  # fmt: skip
    return steps


class _Calls:
    """The arguments of each call, by how many tokens came before it."""

    def __init__(self, inputs: dict[str, Any], n_token: int, *, attends: bool) -> None:
        self.inputs, self.attends = inputs, attends  # without attention: a mask of new tokens
        self.tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        ids = inputs.get(self.tokens)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise DsfTypeError(
                f"dsf.trace_decoding: inputs: expected a dict with {self.tokens} (batch, time), "
                f"got {type(ids).__name__ if not isinstance(ids, Tensor) else tuple(ids.shape)}."
            )
        for name in (*_CACHES, "use_cache"):
            if inputs.get(name) is not None:
                raise DsfUnsupportedError(
                    f"dsf.trace_decoding: {name}: expected none in inputs, got one. Pass an empty "
                    f"cache as cache=, and all tokens in {self.tokens}."
                )
        self.length = ids.shape[1]
        if not 1 <= n_token < self.length:
            raise DsfValueError(
                f"dsf.trace_decoding: n_token: expected 1 to {self.length - 1}, got {n_token}; "
                f"{self.tokens} has {self.length} tokens, and the first call takes one at least."
            )
        self.starts = [0, *range(self.length - n_token, self.length)]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        mask = "decoder_attention_mask" if self.tokens.startswith("decoder") else "attention_mask"
        for start, stop in zip(self.starts, [*self.starts[1:], self.length], strict=True):
            kwargs = dict(self.inputs)
            for name in (self.tokens, *_BY_TOKEN):
                if isinstance(kwargs.get(name), Tensor):
                    kwargs[name] = kwargs[name][..., start:stop]
            if isinstance(kwargs.get(mask), Tensor):
                kwargs[mask] = kwargs[mask][:, 0 if self.attends else start : stop]
            yield start, kwargs


def _decode(model: Any, calls: _Calls, cache_name: str, cache: Any) -> None:
    encoder: dict[str, Any] = {}
    both = bool(getattr(model.config, "is_encoder_decoder", False))
    # a model that reads another sequence makes a cache of two parts by itself
    reads = both or calls.inputs.get("encoder_hidden_states") is not None
    if cache is None and cache_name == "past_key_values" and not reads:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    if cache is None and cache_name == "state":
        cache = _rwkv_start(model, calls)
    for start, kwargs in calls:
        cache_has_seen(start)
        out = model(**{**kwargs, **encoder}, use_cache=True, return_dict=True,
                    **{cache_name: cache})  # fmt: skip
        cache = cache if cache is not None else getattr(out, cache_name, None)
        if cache is None:
            raise DsfUnsupportedError(
                f"dsf.trace_decoding: model: expected {type(model).__name__} to return its "
                f"{cache_name}, got none. Pass an empty one as cache=."
            )
        if both:
            encoder = {"encoder_outputs": (out.encoder_last_hidden_state,)}


def _rwkv_start(model: Any, calls: _Calls) -> list[Tensor]:
    """The state that RwkvModel makes: two last inputs, two sums, their unit's logarithm.

    In the model's own precision where that is more than the float32 of its sums.
    """
    weight = next(model.parameters())
    shape = (len(calls.inputs[calls.tokens]), model.config.hidden_size,
             model.config.num_hidden_layers)  # fmt: skip
    sums = torch.promote_types(weight.dtype, torch.float32)
    state = [weight.new_zeros(shape, dtype=weight.dtype if i < 2 else sums) for i in range(5)]
    state[4] -= 1e30
    return state


def _without_cache(visit: Visit) -> Visit:
    """So that the layer, run again around its output, neither reads nor writes the cache.

    A layer that was given none, such as an encoder's, has no past.
    """

    def is_cache(x: Any) -> bool:
        return any(c.__name__ == "Cache" for c in type(x).__mro__)

    cached = any(map(is_cache, (*visit.args, *visit.kwargs.values())))
    cached = cached or visit.kwargs.get("state") is not None
    return dataclasses.replace(
        visit, past=visit.past if cached else None,
        args=tuple(None if is_cache(x) else x for x in visit.args),
        kwargs={n: None if is_cache(x) else x for n, x in visit.kwargs.items()},
    )  # fmt: skip


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> Chosen:
    """The layers and, around the adapter of each, what reads its calls with a cache."""
    function = "dsf.trace_decoding"
    found = layers_of(model) if layers is None else named_layers(function, model, layers)
    if not found:
        raise unsupported(function, model)
    around = {id(adapter): Decoding(adapter) for _, adapter in found.values()}
    for path, (module, adapter) in found.items():
        if not around[id(adapter)].decodes:
            raise DsfUnsupportedError(
                f"dsf.trace_decoding: {path}: expected a layer whose calls with a cache are "
                f"known, got a {type(module).__name__}, {_why(module, adapter)}. Name the other "
                f"layers in layers=, or use dsf.trace."
            )
    return {path: (module, around[id(adapter)]) for path, (module, adapter) in found.items()}


def _why(module: nn.Module, adapter: Adapter) -> str:
    names = set(inspect.signature(type(module).forward).parameters)
    if not names & {*_CACHES, "layer_past"}:
        return "which takes no cache"
    return f"of which adapter {adapter.name!r} reads whole sequences alone"


@contextlib.contextmanager
def _states_of_modules(model: nn.Module) -> Iterator[None]:
    """States that modules hold begin empty, and are as they were afterwards."""
    held = [
        (module, name, module.__dict__[name])
        for module in model.modules() for name in _MODULE_STATES if name in module.__dict__
    ]  # fmt: skip
    try:
        for module, name, _ in held:
            module.__dict__[name] = None
        yield
    finally:
        for module, name, value in held:
            module.__dict__[name] = value
