"""transformers: every softmax layer that goes through the attention registry."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters._softmax import SYSTEM, attention_system, cross_attrs
from dsf.errors import DsfUnsupportedError

_counter = itertools.count()
_originals: dict[str, str | None] = {}
"""Our names in the registry, while they are there, and what they stand for: taps may nest."""

_SHAPING = frozenset({"scaling", "softcap", "s_aux", "sinks", "position_bias", "is_causal"})
_INERT = frozenset({
    "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "deterministic", "token_type_ids", "logits_to_keep", "input_ids",
    "indices",
})  # fmt: skip
"""Keywords that eager and sdpa attention ignore: the mask already says what they mean."""

_OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Arguments that turn a layer's attention into one over another sequence."""


class RegistryAttention(Adapter):
    """BERT, GPT-2, Llama, Qwen, Gemma, ... : post-projection, post-rotation q, k, v and the mask.

    During the pass the layers' configurations name a function of ours, which records and hands
    on to the implementation that the model was loaded with, together with its mask function: the
    model's numbers do not change under eager and sdpa. flash and flex attention, whose masks are
    no tensors, are run by eager arithmetic instead.
    """

    name = "transformers_attention"
    decodes = True
    systems = ("softmax_attention",)
    tapped = "the attention function and mask of the registry"
    covers = (
        "transformers: every attention layer of the attention registry (BERT, GPT-2, Llama, "
        "Qwen, Gemma, RecurrentGemma's attention, ViT, ...)",
    )

    def recognises(self, module: nn.Module) -> bool:
        """An *Attention* class whose forward looks its function up in the registry."""
        if not any("Attention" in c.__name__ for c in type(module).__mro__):
            return False
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        names = code.co_names if code is not None else ()
        return "ALL_ATTENTION_FUNCTIONS" in names and "get_interface" in names

    def tap(
        self, modules: list[nn.Module], record: Callable
    ) -> contextlib.AbstractContextManager[None]:
        """Put the recording function in the place of each configuration's implementation."""

        def recording(original: str | None) -> Callable:
            def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                name = _runs_as(original)
                result = _implementation(module, name)(module, *args, **kwargs)
                record(module, TappedCall("attention", args, kwargs, result, _base(name)))
                return result

            return attention

        return _registered(modules, recording)

    def build(self, visit: Visit) -> list[Built]:
        """The system of the recorded calls; the readout runs the layer again around a given y."""
        query, key, value = _by_head(visit, [call.args[:3] for call in visit.taps])
        call = visit.taps[0]
        options = _known(visit, call)
        mask = call.args[3] if len(call.args) > 3 else call.kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: attention_mask: expected a tensor or None, got "
                f"{type(mask).__name__}. Load the model with attn_implementation='sdpa'."
            )
        bias = options.get("position_bias")
        bias = None if bias is None else bias[..., : key.shape[1]]
        if mask is not None and mask.dtype == torch.bool and bias is not None:
            # sdpa then hides keys by the least number, and a row without keys is an even one
            mask, bias = torch.where(mask, bias, torch.finfo(bias.dtype).min), None
        sink, sinks = options.get("s_aux"), options.get("sinks")
        if sinks is not None:  # one for each query: a shift of its row to a sink of logit zero
            bias, sink = -sinks if bias is None else bias - sinks, sinks.new_zeros(query.shape[2])
        n_query, n_key = query.shape[1], key.shape[1]
        cross = (visit.past is None and n_query != n_key) or _is_cross(visit)
        system, values = attention_system(
            query, key, value, mask=mask, causal=_causal_flag(visit.module, call, mask, options),
            bias=bias, scale=options.get("scaling"), softcap=options.get("softcap"),
            sink=sink, past=visit.past, cross=cross,
        )  # fmt: skip
        results = _joined([first_tensor(call.result) for call in visit.taps], 2)
        replay = _readout(visit, query.shape[2] // len(visit.taps))
        return [Built(
            SYSTEM, system, values, lambda y: replay(y[:, y.shape[1] - n_query :]),
            first_tensor(visit.output), tapped=results,
            to_tapped=lambda y: y[:, y.shape[1] - n_query :],
            attrs=cross_attrs(n_key, n_query) if cross else {},
        )]  # fmt: skip


def _by_head(visit: Visit, calls: list[tuple]) -> list[Tensor]:
    """Query, key, value (batch, time, head, width); several calls' maps are further heads."""
    first, *others = visit.taps
    for call in others:
        alike = [a.shape == b.shape for a, b in zip(first.args[:3], call.args[:3], strict=True)]
        if not all(alike) or not _same(first, call):
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of the attention function or calls "
                f"alike, got {len(visit.taps)} that differ in shape, mask or options. Write an "
                f"adapter for this layer."
            )
    return [_joined(parts, 1).transpose(1, 2) for parts in zip(*calls, strict=True)]


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _same(one: TappedCall, two: TappedCall) -> bool:
    """Whether two calls have the same mask and options."""

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and a == b

    rest = zip(one.args[3:], two.args[3:], strict=False)
    return all(alike(a, b) for a, b in rest) and all(
        alike(one.kwargs.get(n), two.kwargs.get(n)) for n in {*one.kwargs, *two.kwargs}
    )


def _is_cross(visit: Visit) -> bool:
    """Whether the layer was given another sequence for its keys."""
    parameters = list(inspect.signature(visit.module.forward).parameters)
    given = {**dict(zip(parameters, visit.args, strict=False)), **visit.kwargs}
    return any(given.get(name) is not None for name in _OTHER_SEQUENCE)


def _known(visit: Visit, call: TappedCall) -> dict[str, Any]:
    """The keywords that shape the map; an unknown one is refused, since it may change it."""
    given = {n: v for n, v in call.kwargs.items() if v is not None and n != "attention_mask"}
    unknown = sorted(set(given) - _SHAPING - _INERT)
    if unknown:
        raise DsfUnsupportedError(
            f"dsf.trace: {visit.path or type(visit.module).__name__}: expected attention keywords "
            f"out of {sorted(_SHAPING)} (or inert ones), got {unknown}. The adapter does not know "
            f"what they do to the map; leave them out of the inputs or add an adapter."
        )
    return {n: v for n, v in given.items() if n in _SHAPING}


def _causal_flag(
    module: nn.Module, call: TappedCall, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """sdpa reads a missing mask as causal where the layer says so; eager never does."""
    if mask is not None or call.implementation == "eager" or call.args[0].shape[2] == 1:
        return False
    return bool(options.get("is_causal", getattr(module, "is_causal", True)))


def _runs_as(original: str | None) -> str:
    """The implementation that a pass really uses."""
    return original if original is not None and original in ("sdpa", *_originals) else "eager"


def _base(name: str | None) -> str:
    """sdpa or eager: the implementation behind a name of ours."""
    while name in _originals:
        name = _originals[name]
    return "sdpa" if name == "sdpa" else "eager"


def _implementation(module: nn.Module, name: str) -> Callable:
    """The function that the layer's own file would have used under this name."""
    forward = inspect.unwrap(type(module).forward)
    namespace = forward.__globals__
    eager = next(
        (namespace[n] for n in forward.__code__.co_names if n.endswith("eager_attention_forward")),
        namespace.get("eager_attention_forward"),
    )
    return namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)


def _readout(visit: Visit, heads: int) -> Callable[[Tensor], Tensor]:
    """The layer run again with its attention function returning y, `heads` of it at each call."""
    module, args, kwargs = visit.module, visit.args, visit.kwargs

    def readout(y: Tensor) -> Tensor:
        parts = iter(y.split(heads, 2))

        def giving(original: str | None) -> Callable:
            # contiguous as the layer's own, which may be viewed in another shape
            return lambda *a, **k: (next(parts).contiguous(), None)

        with _registered([module], giving):
            return first_tensor(module.forward(*args, **kwargs))

    return readout


@contextlib.contextmanager
def _registered(
    modules: list[nn.Module], function: Callable[[str | None], Callable]
) -> Iterator[None]:
    """Switch every configuration of these modules to `function(its implementation)`, and back."""
    from transformers import AttentionInterface, AttentionMaskInterface

    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    before = [(config, config._attn_implementation) for config in configs.values()]
    names = []
    try:
        for config, original in before:
            name = f"dsf_tap_{next(_counter)}"
            names.append(name)
            _originals[name] = original
            AttentionInterface.register(name, function(original))
            masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS
            mask = masks.get(_runs_as(original))
            if mask is not None:
                AttentionMaskInterface.register(name, mask)
            config._attn_implementation_internal = name
        yield
    finally:
        for config, original in before:
            config._attn_implementation_internal = original
        for name in names:
            _originals.pop(name, None)
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


ADAPTERS = [RegistryAttention]
