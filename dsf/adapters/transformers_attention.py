"""transformers: every softmax layer that goes through the attention registry."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsf.adapters._calls import Calls, mask_of, reads_another_sequence
from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters._interface import base, implementation, registered, runs_as
from dsf.adapters._softmax import SYSTEM, attention_system, cross_attrs
from dsf.errors import DsfUnsupportedError

_SHAPING = frozenset({"scaling", "softcap", "s_aux", "sinks", "position_bias", "is_causal"})
_INERT = frozenset({
    "dropout", "sliding_window", "position_ids", "cache_position", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "deterministic", "token_type_ids", "logits_to_keep", "input_ids",
    "indices", "block_indices", "grid_thw",
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
    decodes = True
    systems = ("softmax_attention",)
    tapped = "the attention function and mask of the registry"
    covers = (
        "transformers: every attention layer of the attention registry (BERT, GPT-2, Llama, "
        "Qwen, Gemma, RecurrentGemma's attention, ViT, ...)",
    )

    def recognises(self, module: nn.Module) -> bool:
        """A class whose forward looks its function up in the registry."""
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        names = code.co_names if code is not None else ()
        # Kosmos-2.5 only names it, in a getattr that always gives its own eager function
        asks = "get_interface" in names or "getattr" not in names
        return asks and "ALL_ATTENTION_FUNCTIONS" in names

    def tap(
        self, modules: list[nn.Module], record: Callable
    ) -> contextlib.AbstractContextManager[None]:
        """Put the recording function in the place of each configuration's implementation."""

        def recording(original: str | None) -> Callable:
            def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                name = runs_as(original)
                result = implementation(module, name)(module, *args, **kwargs)
                named = [kwargs.pop(n) for n in ("query", "key", "value") if n in kwargs]
                call = TappedCall("attention", (*args, *named), kwargs, result, base(name))
                record(module, call)
                return result

            return attention

        return registered(modules, recording)

    def build(self, visit: Visit) -> list[Built]:
        """The system of the recorded calls; the readout runs the layer again around a given y."""
        calls = Calls.of(visit)
        query, key, value = calls.tensors()
        options = _known(visit, visit.taps[0])
        mask = calls.mask()
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
        cross = (visit.past is None and n_query != n_key) or reads_another_sequence(visit)
        system, values = attention_system(
            query, key, value, mask=mask, bias=bias,
            causal=any(_causal_flag(visit.module, call, options) for call in visit.taps),
            scale=options.get("scaling"), softcap=options.get("softcap"),
            sink=sink, past=visit.past, cross=cross,
        )  # fmt: skip
        replay = _readout(calls)
        return [Built(
            SYSTEM, system, values, lambda y: replay(y[:, y.shape[1] - n_query :]),
            first_tensor(visit.output), tapped=calls.results(),
            to_tapped=lambda y: y[:, y.shape[1] - n_query :],
            attrs=cross_attrs(n_key, n_query) if cross else {},
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


def _causal_flag(module: nn.Module, call: TappedCall, options: dict[str, Any]) -> bool:
    """sdpa reads a missing mask as causal where the layer says so; eager never does."""
    if mask_of(call) is not None or call.implementation == "eager" or call.args[0].shape[2] == 1:
        return False
    return bool(options.get("is_causal", getattr(module, "is_causal", True)))


def _readout(calls: Calls) -> Callable[[Tensor], Tensor]:
    """The layer run again with its attention function returning y, a part of it at each call."""
    visit = calls.visit

    def readout(y: Tensor) -> Tensor:
        parts = calls.split(y)

        def giving(original: str | None) -> Callable:
            return lambda *a, **k: (next(parts), None)

        with registered([visit.module], giving):
            return first_tensor(visit.module.forward(*visit.args, **visit.kwargs))

    return readout


ADAPTERS = [RegistryAttention]
