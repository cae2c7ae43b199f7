"""flash-linear-attention: layers whose map is no plain softmax, made from the op's arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dsf.adapters._contract import Visit
from dsf.adapters._fla_ops import Given
from dsf.adapters.flash_linear_attention import FlashLinearAttention, given_mask
from dsf.factors import ExplicitRows
from dsf.memory import require_memory
from dsf.models._cached import cache_recurrence
from dsf.models._heads import share_groups
from dsf.recurrence import Recurrence

_NAMES = {
    "parallel_wall_attn": "q k v g", "parallel_parallax": "q r k v scale window_size cu_seqlens",
    "deltaformer_attn": "q k v beta attention_mask cu_seqlens",
    "parallel_stickbreaking_attn": "q k v scale attend_current cu_seqlens",
    "chunk_log_linear_attn": "q k v g level_scales",
}  # fmt: skip
"""Arguments in order."""


def _seen(a: Given, *, itself: bool = True) -> Tensor:
    """(batch or 1, 1, query, key): real tokens up to the query's, within the window.

    A window counts real tokens, as they lay end to end.
    """
    at = torch.arange(a["q"].shape[1], device=a["q"].device)[None]
    seen = at[:, :, None] - at[:, None] >= (0 if itself else 1)
    kept = a.get("kept")
    if kept is not None:
        at = kept.cumsum(1)
        seen = seen & kept[:, :, None] & kept[:, None]
    if a.get("window_size") is not None:
        seen = seen & (at[:, :, None] - at[:, None] < a["window_size"])
    return seen[:, None]


def _products(query: Tensor, key: Tensor) -> Tensor:
    """q_t.k_j (batch, head, query, key), keys of shared heads repeated."""
    key = share_groups(key, query.shape[2])
    return torch.einsum("bthd,bshd->bhts", query, key)


def _scale(a: Given) -> float:
    return a["q"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]


def _softmax(z: Tensor, seen: Tensor) -> Tensor:
    """Rows without a key are zero."""
    return torch.softmax(z.masked_fill(~seen, -math.inf), -1).masked_fill(~seen, 0.0)


def _wall(a: Given) -> Tensor:
    """softmax_j(scale sum_n q_tn k_jn exp(sum of g_n over j < i <= t) + sum of g_scalar)."""
    query, key, seen = a["q"], share_groups(a["k"], a["q"].shape[2]), _seen(a)
    total, rows = a["g"].cumsum(1), []
    for t in range(query.shape[1]):
        faded = (total[:, t, None] - total[:, : t + 1]).exp() * key[:, : t + 1]
        z = _scale(a) * torch.einsum("bhd,bshd->bhs", query[:, t], faded)
        rows.append(functional.pad(z, (0, query.shape[1] - t - 1)))
    z = torch.stack(rows, 2) if rows else query.new_zeros(*query.shape[:1], query.shape[2], 0, 0)
    if a.get("g_scalar") is not None:
        more = a["g_scalar"].cumsum(1).transpose(1, 2)
        z = z + more[..., None] - more[..., None, :]
    sink = a.get("sink_bias")
    if sink is None:
        return _softmax(z, seen)
    column = sink[None, :, None, None].expand(*z.shape[:3], 1)
    extended = functional.pad(seen.expand(-1, -1, *z.shape[2:]), (0, 1), value=True)
    return _softmax(torch.cat([z, column], -1), extended)[..., :-1].masked_fill(~seen, 0.0)


def _parallax(a: Given) -> Tensor:
    """p (1 + sum_i p_i s_i - s_j): softmax p, corrected by s = r.k, which is not scaled."""
    p = _softmax(_scale(a) * _products(a["q"], a["k"]), _seen(a))
    s = _products(a["r"], a["k"])
    return p * (1 + (p * s).sum(-1, keepdim=True) - s)


def _deltaformer(a: Given) -> Tensor:
    """softmax . (I + beta softmax over earlier keys)^(-1): each value less what is known of it.

    The layer hides padding from the outer softmax alone.
    """
    z = _scale(a) * _products(a["q"], a["k"])
    earlier = _softmax(z, _seen({"q": a["q"]}, itself=False))
    if a.get("beta") is not None:
        earlier = a["beta"].transpose(1, 2)[..., None] * earlier
    outer = _softmax(z, _seen(a))
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.linalg.solve_triangular(
        earlier + eye, outer, upper=False, left=False, unitriangular=True)  # fmt: skip


def _stick_breaking(a: Given) -> Tensor:
    """sigmoid(z_tj) prod over j < l of 1 - sigmoid(z_tl): the nearest key breaks the stick first.

    A query reads itself only if attend_current.
    """
    z = _scale(a) * _products(a["q"], a["k"])
    seen = _seen(a, itself=bool(a.get("attend_current", False)))
    left = functional.logsigmoid(-z).masked_fill(~seen, 0.0)
    after = left.flip(-1).cumsum(-1).flip(-1) - left
    return (functional.logsigmoid(z) + after).masked_fill(~seen, -math.inf).exp()


def _log_linear(a: Given) -> Tensor:
    """scale q_t.k_j exp(sum of g over j < i <= t) l_(t, level), a level a power of two of lag.

    The level of (t, j) is the place of the highest bit in which t and j differ, 0 for t = j: the
    tokens before t fall into blocks as bits are cleared from t. The layer keeps a state a level.
    """
    length, scales = a["q"].shape[1], a["level_scales"]
    head = a["v"].shape[2]
    query, key = (share_groups(a[n], head) for n in ("q", "k"))
    at = torch.arange(length, device=query.device)
    differ = at[:, None] ^ at
    level = torch.where(differ > 0, torch.log2(differ.clamp(min=1).double()).long() + 1, 0)
    total = a["g"].cumsum(1).transpose(1, 2)
    fade = (total[..., None] - total[..., None, :]).masked_fill(~_seen(a), -math.inf).exp()
    by_level = scales.transpose(1, 2).gather(
        -1, level.clamp(max=scales.shape[-1] - 1).expand(len(scales), head, -1, -1))  # fmt: skip
    scale = _scale(a) if "scale" in a else 1.0
    return scale * _products(query, key) * fade * by_level


class Maps(FlashLinearAttention):
    """Length x length numbers a head, kept as they are: no state of fixed size says the same."""

    ops: ClassVar[dict[str, Callable[[Given], Any]]] = {
        "parallel_wall_attn": _wall, "parallel_parallax": _parallax,
        "deltaformer_attn": _deltaformer, "parallel_stickbreaking_attn": _stick_breaking,
        "chunk_log_linear_attn": _log_linear,
    }  # fmt: skip

    def __init__(self, system: str, layers: str) -> None:
        super().__init__(system, layers, structure="I (one state per token)")

    def named(self, args: tuple, kwargs: dict[str, Any], function: str = "") -> dict[str, Any]:
        """Arguments by name, each function with its own order."""
        return {**dict(zip(_NAMES[function].split(), args, strict=False)), **kwargs}

    def prepared(self, visit: Visit, given: Given) -> Given:
        """Where the op itself is given the mask, the tokens are all there."""
        if given.get("attention_mask") is None:
            return given
        return {**given, "real": given_mask(visit)}

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The rows of the op's map, and the values of every head."""
        a = given if given.get("real") is None else {**given, "kept": given["real"]}
        batch, length, head = a["q"].shape[0], a["q"].shape[1], max(
            a["q"].shape[2], a["v"].shape[2])  # fmt: skip
        require_memory(
            "dsf.trace", "attention map", ("batch", "head", "query", "key"),
            (batch, head, length, length), a["q"].dtype, device=a["q"].device,
            advice="Trace a shorter sequence.",
        )  # fmt: skip
        rows = ExplicitRows(self.ops[function](a))
        return cache_recurrence(self.system, rows), share_groups(a["v"], head)


ADAPTERS = [
    functools.partial(Maps, "wall_attention", "wall_attn:WallAttention"),
    functools.partial(Maps, "parallax", "parallax:Parallax"),
    functools.partial(Maps, "deltaformer", "deltaformer:DeltaFormerAttention"),
    functools.partial(Maps, "log_linear_mamba2", "log_linear_mamba2:LogLinearMamba2"),
    functools.partial(
        Maps, "stick_breaking_attention", "stickbreaking_attn:StickBreakingAttention"),
]  # fmt: skip
