"""transformers: every softmax layer that goes through the attention registry."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters._softmax import SYSTEM, attention_system
from dsf.errors import DsfUnsupportedError

_counter = itertools.count()
_originals: dict[str, str | None] = {}
"""Our names in the registry, while they are there, and what they stand for: taps may nest."""

_SHAPING = frozenset({"scaling", "softcap", "s_aux", "position_bias", "is_causal"})
_INERT = frozenset({
    "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "deterministic", "token_type_ids", "logits_to_keep",
})  # fmt: skip
"""Keywords that eager and sdpa attention ignore: the mask already says what they mean."""


class RegistryAttention(Adapter):
    """BERT, GPT-2, Llama, Qwen, Gemma, ... : post-projection, post-rotation q, k, v and the mask.

    During the pass the layers' configurations name a function of ours, which records and hands
    on to the implementation that the model was loaded with, together with its mask function: the
    model's numbers do not change under eager and sdpa. flash and flex attention, whose masks are
    no tensors, are run by eager arithmetic instead.
    """

    name = "transformers_attention"
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
        """The system of the recorded call; the readout runs the layer again around a given y."""
        if len(visit.taps) > 1:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of the attention function, got "
                f"{len(visit.taps)}. The layer mixes several maps; write an adapter for it."
            )
        (call,) = visit.taps
        query, key, value = call.args[:3]
        options = _known(visit, call)
        mask = call.args[3] if len(call.args) > 3 else call.kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: attention_mask: expected a tensor or None, got "
                f"{type(mask).__name__}. Load the model with attn_implementation='sdpa'."
            )
        bias = options.get("position_bias")
        system, values = attention_system(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            mask=mask, causal=_causal_flag(visit.module, call, mask, options),
            bias=None if bias is None else bias[..., : key.shape[2]],
            scale=options.get("scaling"), softcap=options.get("softcap"),
            sink=options.get("s_aux"),
        )  # fmt: skip
        return [Built(
            SYSTEM, system, values, _readout(visit), first_tensor(visit.output),
            tapped=first_tensor(call.result), to_tapped=lambda y: y,
        )]  # fmt: skip


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
    if mask is not None or call.implementation == "eager":
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


def _readout(visit: Visit) -> Callable[[Tensor], Tensor]:
    """The layer run again with its attention function returning y."""
    module, args, kwargs = visit.module, visit.args, visit.kwargs

    def readout(y: Tensor) -> Tensor:
        def giving(original: str | None) -> Callable:
            return lambda *a, **k: (y, None)

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
