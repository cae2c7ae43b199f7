"""transformers: short convolutions that are mixers of their own (LFM2, Inkling)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dsf.adapters._contract import Adapter, Built, Visit, first_tensor
from dsf.adapters._tapped import ScanFunction, transformers_classes
from dsf.short_convolution import short_convolution_recurrence, with_constant

SYSTEM = "short_convolution"


class ShortConvolution(ScanFunction):
    """A shift register a channel, tapped at its function; gates and projections are readout.

    A bias is a second, constant input of the values (`dsf.short_convolution.with_constant`).
    """

    name = "transformers_short_convolution"
    functions = ("causal_conv1d_fn", "causal_conv1d_update")
    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "weight": None, "bias": None, "activation": None,
    }  # fmt: skip
    states = frozenset({"conv_state"})
    decodes = True
    gates_first = True
    covers = ("transformers: short convolutions of LFM2, LFM2-MoE, LFM3, Inkling and Inkling 2",)
    classes = transformers_classes({
        "lfm2": "Lfm2ShortConv", "lfm2_moe": "Lfm2MoeShortConv", "lfm3": "Lfm3ShortConv",
        "inkling": "InklingShortConvolution", "inkling2": "Inkling2ShortConvolution",
    })  # fmt: skip

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """The one-token function takes the register of past inputs second."""
        if function == "causal_conv1d_update" and len(args) > 1:
            kwargs, args = {**kwargs, "conv_state": args[1]}, (args[0], *args[2:])
        return super().named(args, kwargs, function)

    def build(self, visit: Visit) -> list[Built]:
        """From what enters the convolution and its taps; values (batch, time, channel, 1)."""
        a = self.arguments(visit)
        layer_dtype = a["hidden_states"].dtype
        dtype = torch.promote_types(layer_dtype, torch.float32)
        weight, bias = a["weight"].to(dtype), None if a["bias"] is None else a["bias"].to(dtype)
        length, past = first_tensor(visit.output).shape[1], weight.shape[1] - 1
        x, cache = a["hidden_states"].to(dtype), a.get("conv_state")
        if cache is None:  # a cache's inputs may stand in front of this call's own
            cache, x = x[..., :-length], x[..., -length:]
        cache = functional.pad(cache.to(dtype), (past, 0))[..., cache.shape[-1] :]
        recurrence = short_convolution_recurrence(
            weight, bias, cache if visit.past is not None else None
        )
        activations = self.namespace(visit.module).get("ACT2FN", {})
        values = x.transpose(1, 2)[..., None]

        def to_tapped(y: Tensor) -> Tensor:
            y = y.squeeze(-1).transpose(1, 2)
            y = y if a["activation"] is None else activations[a["activation"]](y)
            return y.to(layer_dtype)

        return [Built(
            SYSTEM, recurrence, values if bias is None else with_constant(values),
            self.readout(visit, lambda y, *_: to_tapped(y)), first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result)[..., -length:], to_tapped=to_tapped,
        )]  # fmt: skip


class DynamicShortConvolution(Adapter):
    """Taps that depend on the token: fixed ones a channel plus ones projected from the input.

        y_t = (x_t + sum_i (w_i + (W d_t)_i) x_{t-i}) / sqrt(2 kernel + 1)

    d is the layer's second input; a head's channels share the projected taps. No call of the
    layer holds the taps, so they are computed from its weights.
    """

    name = "transformers_dynamic_short_convolution"
    covers = ("transformers: Inkling 2's dynamic short convolution",)
    classes = transformers_classes({"inkling2": "Inkling2DynamicShortConvolution"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """From the weights and both inputs; values (batch, time, channel, 1)."""
        layer: Any = visit.module
        names = ("hidden_states", "dynamic_input", "past_key_values", "conv_mask")
        given = {**dict(zip(names, visit.args, strict=False)), **visit.kwargs}
        x, mask, kernel = given["hidden_states"], given.get("conv_mask"), layer.conv_kernel_size
        dtype = torch.promote_types(x.dtype, torch.float32)
        own = layer.weight_proj(given["dynamic_input"]).to(dtype)
        own = own.unflatten(-1, (layer.num_heads, 1, kernel))
        shared = layer.static_weight.to(dtype).T.unflatten(0, (layer.num_heads, -1))
        taps = (shared + own).flatten(2, 3)
        register = short_convolution_recurrence(taps[0, 0])
        residual = x.to(dtype)
        values = residual if mask is None else residual * mask[..., None]

        def readout(y: Tensor) -> Tensor:
            return ((y.squeeze(-1) + residual) / math.sqrt(2 * kernel + 1)).to(x.dtype)

        return [Built(SYSTEM, register.replace(C=taps[..., None, :]), values[..., None], readout,
                      first_tensor(visit.output))]  # fmt: skip


ADAPTERS = [ShortConvolution, DynamicShortConvolution]
