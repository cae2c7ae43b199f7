"""transformers: short convolutions that layers compute by themselves, from weights and input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dsf.adapters._contract import Adapter, Built, Visit
from dsf.adapters._tapped import transformers_classes
from dsf.errors import DsfUnsupportedError
from dsf.factors import OneHot
from dsf.grid_rows import GridRows
from dsf.recurrence import Recurrence
from dsf.short_convolution import short_convolution_recurrence
from dsf.transitions import Dense, Identity, Shift
from dsf.wrappers import Bidirectional

SYSTEM = "short_convolution"


class GridConvolution(Adapter):
    """A gated depthwise convolution over patches: not causal, every channel a head.

        y_t = W_o (c_t * sum_j M_tj (b_j * u_j)),   (b, c, u) = W_i x,   M: `dsf.grid_rows`

    Patches come in blocks that are merged later; images and videos stand one behind another.
    """

    name = "transformers_grid_convolution"
    systems = (SYSTEM,)
    covers = ("transformers: the vision convolution of LFM3-VL",)
    classes = transformers_classes({"lfm3_vl": "Lfm3VlVisionShortConv"})
    needs_tap = False
    gates_first = True

    def build(self, visit: Visit) -> list[Built]:
        """From the weights; values (batch=1, patch, channel, 1)."""
        layer: Any = visit.module
        given = _arguments(visit)
        x = given["hidden_states"]
        gate, gate_out, u = layer.in_proj(x).chunk(3, dim=-1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        values = (gate * u).to(dtype)[None, ..., None]
        weight = layer.spatial_conv.weight[:, 0].to(dtype)
        rows = GridRows.of(weight, given["grid_thw"], layer.spatial_merge_size)
        n = len(x)
        r = Recurrence(Identity(n), OneHot(n, n), rows, system=SYSTEM, gauge="one state per patch")

        def readout(y: Tensor) -> Tensor:
            return layer.out_proj(gate_out * y[0, ..., 0].to(x.dtype))

        return [Built(SYSTEM, Bidirectional.from_rows(r), values, readout, visit.output)]


class CompressedProjection(Adapter):
    """ZAYA's convolutions of queries, keys and values, one part each; heads mix their features.

        query, key:  y_t = sum_k M_k p_{t-k} + b + residual,   M_k = sum_{i+j=k} G_j diag(d_i)
        value:       half of the channels of this token, half of the one before

    d are the depthwise taps (of the lag i), G the grouped ones. A head's register holds its last
    projected inputs p, all features of each; b comes with a further, constant input.
    """

    name = "transformers_compressed_projection"
    systems = (SYSTEM,)
    covers = ("transformers: the projection of ZAYA's compressed convolutional attention",)
    classes = transformers_classes({"zaya": "ZayaCCAProjection"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """From the weights; query and key with values (batch, time, head, input, 1)."""
        layer: Any = visit.module
        given = _arguments(visit)
        if given.get("past_key_values") is not None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: past_key_values: expected no cache, got one. Pass the "
                f"whole sequence at once."
            )
        x, mask = given["hidden_states"], given.get("conv_mask")
        x = x if mask is None else x * mask[..., None].to(x.dtype)
        n_query, n_key, width = (
            layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)  # fmt: skip
        query, key = (p(x).unflatten(-1, (-1, width)) for p in (layer.q_proj, layer.k_proj))
        residual = (query + key.repeat_interleave(n_query // n_key, 2)) / 2
        residuals = residual, residual.unflatten(2, (n_key, -1)).mean(3)
        taps, bias = _composed(layer.conv_qk_depthwise, layer.conv_qk_grouped, width)
        outputs = visit.output
        parts = []
        for i, (name, values) in enumerate((("query", query), ("key", key))):
            heads = slice(0, n_query) if i == 0 else slice(n_query, n_query + n_key)
            ones = torch.ones_like(values[..., :1])
            parts.append(Built(
                SYSTEM, _register(taps[heads], bias[heads]),
                torch.cat([values, ones], -1).to(taps.dtype)[..., None],
                _added(residuals[i]), outputs[i], suffix=name,
            ))  # fmt: skip
        return [*parts, _delayed(layer, x, outputs[2])]


def _added(residual: Tensor) -> Any:
    return lambda y: y[..., 0].to(residual.dtype) + residual


def _composed(first: Any, second: Any, width: int) -> tuple[Tensor, Tensor]:
    """Taps (head, lag, output, input) and bias (head, output) of one convolution after another."""
    dtype = torch.promote_types(first.weight.dtype, torch.float32)
    lone = first.weight[:, 0].to(dtype).flip(1).unflatten(0, (-1, width))
    own = second.weight.to(dtype).flip(2).unflatten(0, (-1, width))
    n = lone.shape[-1], own.shape[-1]
    taps = own.new_zeros(len(own), sum(n) - 1, width, width)
    for i in range(n[0]):
        for j in range(n[1]):
            taps[:, i + j] += own[..., j] * lone[:, None, :, i]
    bias = second.bias.to(dtype).unflatten(0, (-1, width))
    early = first.bias.to(dtype).unflatten(0, (-1, width))
    return taps, bias + torch.einsum("hoij,hi->ho", own, early)


def _register(taps: Tensor, bias: Tensor) -> Recurrence:
    """A time-invariant register of whole heads: state (lag, feature)."""
    _, n, width, _ = taps.shape
    eye = torch.eye(width, dtype=taps.dtype, device=taps.device)
    shift = Shift(n).as_dense().reshape(n, n).to(taps)
    B = taps.new_zeros(1, 1, 1, n * width, width + 1)
    B[0, 0, 0, :width, :width] = eye
    C = taps.permute(0, 2, 1, 3).flatten(2)[None, None]
    D = torch.nn.functional.pad(bias[..., None], (width, 0))[None, None]
    return Recurrence(
        Dense(torch.kron(shift, eye)[None, None, None]), B, C, D, system=SYSTEM, gauge="register"
    )


def _delayed(layer: Any, x: Tensor, output: Tensor) -> Built:
    """A register of two: the first half of the channels is read now, the other a token later."""
    now, later = layer.v_proj_current, layer.v_proj_delayed
    values = torch.cat([now(x), later(x)], -1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    half, channel = now.out_features, values.shape[-1]
    taps = values.new_zeros(channel, 2, dtype=dtype)
    taps[:half, 1] = taps[half:, 0] = 1
    before = torch.cat([now(x.new_zeros(x.shape[-1])), later(x.new_zeros(x.shape[-1]))])
    before = before.to(dtype)[None, :, None].expand(len(x), -1, 1)
    shape = output.shape

    def readout(y: Tensor) -> Tensor:
        return y[..., 0].to(x.dtype).reshape(shape)

    return Built(SYSTEM, short_convolution_recurrence(taps, None, before),
                 values.to(dtype)[..., None], readout, output, suffix="value")  # fmt: skip


def _arguments(visit: Visit) -> dict[str, Any]:
    names = list(inspect.signature(type(visit.module).forward).parameters)[1:]
    return {**dict(zip(names, visit.args, strict=False)), **visit.kwargs}


ADAPTERS = [GridConvolution, CompressedProjection]
