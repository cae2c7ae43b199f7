"""flash-linear-attention: softmax layers, tapped at the attention function of their own file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.adapters._contract import Visit
from dsf.adapters._fla_ops import Given
from dsf.adapters.flash_linear_attention import FlashLinearAttention
from dsf.errors import DsfUnsupportedError
from dsf.models._heads import share_groups
from dsf.models.forgetting_attention import ForgettingRows, forgetting_attention_recurrence
from dsf.models.path_attention import path_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.recurrence import Recurrence

_VARLEN = "flash_attn_varlen_func"
_NAMES = {
    "flash_attn_func": "q k v dropout_p softmax_scale causal window_size",
    _VARLEN: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
             "causal window_size",
    "parallel_attn": "q k v g sink_bias scale window_size cu_seqlens",
    "parallel_forgetting_attn": "q k v g scale window_size cu_seqlens",
    "parallel_path_attn": "q k v w beta g scale cu_seqlens",
}  # fmt: skip
"""Arguments in order."""


def _window(a: Given) -> int | None:
    """Tokens that a query sees back to, itself included: a number, or flash-attn's (back, on)."""
    size = a.get("window_size")
    if isinstance(size, tuple | list):
        size = size[0] + 1 if size[0] >= 0 else None
    return size


def _softmax(a: Given) -> Recurrence:
    """Real tokens read real tokens; a row of padding is zero."""
    kept, bias, window = a.get("kept"), None, _window(a)
    if kept is not None:
        seen = kept[:, None, :, None]
        if window is not None and bool((~kept & ~_outside(kept)).any()):
            at = kept.cumsum(1)[:, None]  # a window counts tokens as they lay end to end
            seen, window = seen & (at[..., None] - at[..., None, :] < window), None
        bias = torch.zeros_like(seen, dtype=a["q"].dtype).masked_fill(~seen, -math.inf)
    system = softmax_attention_recurrence(
        a["q"], a["k"], causal=True, bias=bias, key_mask=kept, window=window,
        scale=a["softmax_scale"] if a["scale"] is None else a["scale"], sink=a.get("sink_bias"),
    )  # fmt: skip
    assert isinstance(system, Recurrence)
    return system


def _outside(kept: Tensor) -> Tensor:
    """Where all before, or all from there on, is padding."""
    return (kept.cumsum(1) == 0) | _behind(kept)


def _behind(kept: Tensor) -> Tensor:
    return kept.flip(1).cumsum(1).flip(1) == 0


def _forgetting(a: Given) -> Recurrence:
    """What a padded token wrote is not seen; behind the last real one all is forgotten."""
    kept, log_decay = a.get("kept"), a["g"]
    if kept is not None:
        log_decay = log_decay.masked_fill(_behind(kept)[..., None], -math.inf)
    r = forgetting_attention_recurrence(
        a["q"], a["k"], log_decay, scale=a["scale"], window=_window(a))  # fmt: skip
    if kept is None:
        return r
    rows = r.C
    assert isinstance(rows, ForgettingRows)
    scores = dataclasses.replace(rows.scores, key_mask=kept)
    return r.replace(C=dataclasses.replace(rows, scores=scores))


def _path(a: Given) -> Recurrence:
    """The op multiplies the sum of log forget gates by the scale, too."""
    scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    return path_attention_recurrence(
        a["q"], a["k"], a["w"], a["beta"], scale=scale, key_mask=a.get("kept"),
        log_decay=None if a.get("g") is None else scale * a["g"],
    )  # fmt: skip


class Softmax(FlashLinearAttention):
    """Attention over the values as they are given, those of shared heads repeated."""

    ops: ClassVar[dict[str, Callable[[Given], Recurrence]]] = {
        "flash_attn_func": _softmax, _VARLEN: _softmax, "parallel_attn": _softmax,
        "parallel_forgetting_attn": _forgetting, "parallel_path_attn": _path,
    }  # fmt: skip
    tapped = "the attention function of the layer's file"

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """Arguments by name, each function with its own order."""
        names = _NAMES[function].split()
        plain = {"scale": None, "softmax_scale": None}
        return {**plain, **dict(zip(names, args, strict=False)), **kwargs}

    def prepared(self, visit: Visit, given: Given) -> Given:
        """flash-attn's packed rows have no axis of batch, and must be read whole."""
        if given.get("causal", True) is not True:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: causal: expected True, got {given['causal']}."
            )
        if visit.taps[0].function != _VARLEN:
            return given
        packed = {n: given[n][None] for n in ("q", "k", "v")}
        return {**given, **packed, "cu_seqlens": given["cu_seqlens_q"]}

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The function that ran, and the values of every head."""
        return self.ops[function](given), share_groups(given["v"], given["q"].shape[2])

    def returned(self, function: str, y: Tensor, given: Given) -> Tensor:
        """Without an axis of batch where the function has none."""
        return y[0] if function == _VARLEN else y


ADAPTERS = [
    functools.partial(
        Softmax, "softmax_attention",
        "attn:Attention bitattn:BitAttention mla:MultiheadLatentAttention "
        "rodimus:SlidingWindowSharedKeyAttention yoco:YOCOCrossAttention",
    ),
    functools.partial(Softmax, "forgetting_attention", "forgetting_attn:ForgettingAttention"),
    functools.partial(Softmax, "path_attention", "path_attn:PaTHAttention"),
]  # fmt: skip
