"""torch.nn.MultiheadAttention, recomputed from weights and the real arguments of the call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.adapters._contract import Adapter, Built, Visit, first_tensor
from dsf.adapters._softmax import SYSTEM, attention_system, cross_attrs
from dsf.errors import DsfUnsupportedError

_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
              "average_attn_weights", "is_causal")  # fmt: skip


class MultiheadAttention(Adapter):
    """Self-attention and cross-attention with every option.

    Keys and queries of different number are two sequences, keys first; as many of them share one
    axis of time. bias_k and bias_v become a slot behind the cache that holds its value from the
    start, add_zero_attn a sink of logit zero.
    """

    name = "torch_nn.multihead_attention"
    systems = ("softmax_attention",)
    covers = ("torch.nn.MultiheadAttention (inside TransformerEncoderLayer and others as well)",)
    classes = frozenset({"torch.nn.modules.activation:MultiheadAttention"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """From the projections' weights and the arguments of the call."""
        layer, given = visit.module, _named(visit)
        assert isinstance(layer, nn.MultiheadAttention)
        output = first_tensor(visit.output)
        query, key, value = given["query"], given["key"], given["value"]
        if query.is_nested or key.is_nested or value.is_nested:
            raise DsfUnsupportedError(
                "dsf.from_layer: query: expected dense tensors, got a nested one. Pad it and "
                "pass key_padding_mask."
            )
        batched = query.ndim == 3
        q, k, v = (_batch_first(x, layer.batch_first) for x in (query, key, value))
        q, k, v = (x.unflatten(-1, (layer.num_heads, -1)) for x in _projected(layer, q, k, v))
        hint = _hint_alone(given)
        mask = None if hint else _mask(given, q, batched)
        # with the hint alone torch masks by position, which hides the slots behind the last token
        extra = None
        if layer.bias_k is not None and layer.bias_v is not None and not hint:
            extra = (layer.bias_k.unflatten(-1, (layer.num_heads, -1)),
                     layer.bias_v.unflatten(-1, (layer.num_heads, -1)))  # fmt: skip
        sink = q.new_zeros(layer.num_heads) if layer.add_zero_attn and not hint else None
        n_query, n_key = q.shape[1], k.shape[1]
        cross = n_query != n_key
        system, values = attention_system(
            q, k, v, mask=mask, causal=hint, sink=sink, extra=extra, cross=cross)  # fmt: skip

        def readout(y: Tensor) -> Tensor:
            out = layer.out_proj(y[:, y.shape[1] - n_query :].flatten(-2))
            if not batched:
                return out.squeeze(0)
            return out if layer.batch_first else out.transpose(0, 1)

        attrs = cross_attrs(n_key, n_query) if cross else {}
        return [Built(SYSTEM, system, values, readout, output, attrs=attrs)]


def _named(visit: Visit) -> dict[str, Any]:
    defaults = {"key_padding_mask": None, "need_weights": True, "attn_mask": None,
                "is_causal": False}  # fmt: skip
    return {**defaults, **dict(zip(_ARGUMENTS, visit.args, strict=False)), **visit.kwargs}


def _batch_first(x: Tensor, batch_first: bool) -> Tensor:
    if x.ndim == 2:
        return x[None]
    return x if batch_first else x.transpose(0, 1)


def _projected(layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    if layer.in_proj_weight is not None:
        weights: tuple = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return [functional.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True)]


def _hint_alone(given: dict[str, Any]) -> bool:
    """Whether torch drops attn_mask and goes by is_causal, as it does under these conditions."""
    return bool(
        given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]
    )


def _mask(given: dict[str, Any], query: Tensor, batched: bool) -> Tensor | None:
    """attn_mask and key_padding_mask (torch: True hides) as one mask (batch, head, query, key)."""
    batch, _, heads, _ = query.shape
    parts = []
    attention, padding = given["attn_mask"], given["key_padding_mask"]
    if attention is not None:
        lead = (1, 1) if attention.ndim == 2 else (batch, heads)
        parts.append(attention.reshape(*lead, *attention.shape[-2:]))
    if padding is not None:
        padding = padding if batched else padding[None]
        parts.append(padding[:, None, None, :])
    if not parts:
        return None
    if all(p.dtype == torch.bool for p in parts):
        hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return ~hidden
    numbers = [
        torch.zeros_like(p, dtype=query.dtype).masked_fill(p, -math.inf)
        if p.dtype == torch.bool else p.to(query.dtype)
        for p in parts
    ]  # fmt: skip
    return numbers[0] if len(numbers) == 1 else numbers[0] + numbers[1]


ADAPTERS = [MultiheadAttention]
