"""The recurrence of each op of flash-linear-attention, from the arguments that it is called with.

Tensors are (batch, time, head, ...); an op without a scale takes width^(-1/2). The released
kernels differ from their papers in places, which is said where they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsf.adapters._delta_rule import unit
from dsf.memory import require_memory
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models.based import based_recurrence
from dsf.models.comba import comba_recurrence
from dsf.models.delta_net import delta_net_recurrence
from dsf.models.gated_delta_net import gated_delta_net_recurrence
from dsf.models.gated_delta_product import gated_delta_product_recurrence
from dsf.models.gated_slot_attention import (
    bounded_memory_log_decay,
    gated_slot_attention_recurrence,
)
from dsf.models.gla import gla_recurrence
from dsf.models.hgrn import hgrn_recurrence
from dsf.models.kimi_delta_attention import kimi_delta_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.rebased import rebased_recurrence
from dsf.models.retention import retention_recurrence
from dsf.models.rwkv6 import rwkv6_recurrence
from dsf.models.rwkv7 import rwkv7_recurrence
from dsf.recurrence import Recurrence

Given = dict[str, Any]

LINEAR_EPS = 1e-10
"""What linear_attn adds to its divisor."""
BASED_EPS = 1e-6
"""What based's parallel form adds to its divisor."""


def unit_keys(a: Given) -> tuple[Tensor, Tensor]:
    """Queries and keys of length one where the op makes them so, queries on all value heads."""
    q, k = a["q"], a["k"]
    if a.get("use_qk_l2norm_in_kernel"):
        q, k = unit(q), unit(k)
    heads = a["v"].shape[2]
    return (q if q.shape[2] == heads else q.repeat_interleave(heads // q.shape[2], 2)), k


def decay_and_strength(a: Given) -> tuple[Tensor, Tensor]:
    """log decay and write strength, through the gates where the op has them inside.

    g = -exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) (g + dt_bias)).
    """
    g, beta = a.get("g"), a.get("beta")
    beta = torch.ones_like(a["v"][..., 0]) if beta is None else beta
    if a.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if a.get("allow_neg_eigval") else 1)
    if g is None:
        g = torch.zeros_like(beta)
    if a.get("use_gate_in_kernel"):
        heads = g.shape[2]
        rate = 1.0 if a.get("A_log") is None else a["A_log"].exp()
        if g.ndim == 4 and isinstance(rate, Tensor):
            rate = rate[:, None]
        if a.get("dt_bias") is not None:
            g = g + (a["dt_bias"] if g.ndim == 3 else a["dt_bias"].view(heads, -1))
        lowest = a.get("lower_bound")
        g = -rate * functional.softplus(g) if lowest is None else lowest * (rate * g).sigmoid()
    return g, beta


def _gla(a: Given) -> Recurrence:
    decay = a["g"] if a.get("gk") is None else a["gk"]
    return gla_recurrence(a["q"], a["k"], decay, scale=a["scale"])


def _simple_gla(a: Given) -> Recurrence:
    return gated_linear_recurrence("gla", a["q"], a["k"], a["g"], a["scale"])


def _lightnet(a: Given) -> Recurrence:
    """Keys and decays of a running softmax along time: k = exp(x - z), g_t = z_{t-1} - z_t."""
    kept = torch.ones_like(a["k"], dtype=torch.bool)
    if a.get("kept") is not None:
        kept = kept & a["kept"][..., None, None]
    x = a["k"].masked_fill(~kept, -torch.inf)
    z = torch.logcumsumexp(x, 1)
    before = torch.cat([torch.full_like(z[:, :1], -torch.inf), z[:, :-1]], 1)
    key = torch.where(kept, (x - z).exp(), 0.0)
    decay = torch.where(before.isfinite(), before - z, 0.0)  # nothing yet to forget
    return gla_recurrence(a["q"], key, decay, scale=a["scale"])


def _retention(a: Given) -> Recurrence:
    return retention_recurrence(a["q"], a["k"], scale=a["scale"])


def _linear(a: Given) -> Recurrence:
    system = linear_attention_recurrence(
        a["q"], a["k"], feature_map="identity", normalise=bool(a["normalize"]), eps=LINEAR_EPS,
        scale=a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"],
    )  # fmt: skip
    assert isinstance(system, Recurrence)
    return system


def _based(a: Given) -> Recurrence:
    return based_recurrence(
        a["q"], a["k"], scale=a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"],
        normalise=a.get("use_norm", True), eps=BASED_EPS,
    )  # fmt: skip


def _rebased(a: Given) -> Recurrence:
    return rebased_recurrence(
        a["q"], a["k"], scale=a["q"].shape[-1] ** -0.5 if a.get("use_scale", True) else 1.0,
        normalise=a.get("use_normalize", True), eps=a.get("eps", 1e-5),
    )  # fmt: skip


def _hgrn(a: Given) -> Recurrence:
    return hgrn_recurrence(a["g"], write=torch.ones_like(a["g"][:1, :1]))


def _gsa(a: Given) -> Recurrence:
    return gated_slot_attention_recurrence(
        a["q"], a["k"], a["g"], write=a["s"], scale=a["scale"])  # fmt: skip


def _abc(a: Given) -> Recurrence:
    """Slots that hold means: what a token writes is exp(s_t) of the sum of exp(s) so far."""
    write = (a["s"] - torch.logcumsumexp(a["s"], 1)).exp()
    log_decay = bounded_memory_log_decay(a["s"])
    return gated_slot_attention_recurrence(
        a["q"], a["k"], log_decay, write=write, scale=a["scale"])  # fmt: skip


def _delta(a: Given) -> Recurrence:
    return delta_net_recurrence(*unit_keys(a), decay_and_strength(a)[1], scale=a["scale"])


def _gated_delta(a: Given) -> Recurrence:
    return gated_delta_net_recurrence(
        *unit_keys(a), *decay_and_strength(a), scale=a["scale"])  # fmt: skip


def gated_delta_product(a: Given) -> Recurrence:
    """Keys (batch, time, write, head, state) and strengths (batch, time, write, head)."""
    q, k, beta = a["q"], a["k"], a["beta"].transpose(2, 3)
    if a.get("use_qk_l2norm_in_kernel"):
        q, k = unit(q), unit(k)
    return gated_delta_product_recurrence(
        q, k.transpose(2, 3), a["g"], beta, scale=a["scale"])  # fmt: skip


def _comba(a: Given) -> Recurrence:
    """What is read for erasing is read before the decay, as the kernels do."""
    q, k = unit_keys(a)
    p = unit(a["p"]) if a.get("use_qk_l2norm_in_kernel") else a["p"]
    heads = a["v"].shape[2]
    k, p = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, p))
    return comba_recurrence(
        q, k, p, *decay_and_strength(a), decay_first=False, scale=a["scale"])  # fmt: skip


def _kda(a: Given) -> Recurrence:
    return kimi_delta_attention_recurrence(
        *unit_keys(a), *decay_and_strength(a), scale=a["scale"])  # fmt: skip


def _rwkv6(a: Given) -> Recurrence:
    scale = a["r"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    return rwkv6_recurrence(a["r"], a["k"], a["w"], a["u"], scale=scale)


def _rwkv7(a: Given) -> Recurrence:
    if a.get("kk") is None:
        removal, replacement = -a["a"], a["b"]
    else:  # the fused form makes both from the unit key itself
        removal, replacement = a["kk"], a["kk"] * a["a"]
    scale = 1.0 if a["scale"] is None else a["scale"]
    return rwkv7_recurrence(a["r"], a["k"], a["w"], removal, replacement, scale=scale)


def _forms(names: str, build: Callable[[Given], Recurrence]) -> dict:
    return dict.fromkeys(names.split(), build)


OPS: dict[str, Callable[[Given], Recurrence]] = {
    **_forms("chunk_gla fused_chunk_gla fused_recurrent_gla", _gla),
    **_forms("chunk_simple_gla fused_recurrent_simple_gla", _simple_gla),
    **_forms("chunk_lightnet fused_recurrent_lightnet", _lightnet),
    **_forms("chunk_retention fused_chunk_retention parallel_retention fused_recurrent_retention",
             _retention),
    **_forms("chunk_linear_attn fused_chunk_linear_attn fused_recurrent_linear_attn", _linear),
    **_forms("parallel_based", _based),
    **_forms("parallel_rebased", _rebased),
    **_forms("chunk_hgrn fused_recurrent_hgrn", _hgrn),
    **_forms("chunk_gsa fused_recurrent_gsa", _gsa),
    **_forms("chunk_abc", _abc),
    **_forms("chunk_delta_rule fused_recurrent_delta_rule", _delta),
    **_forms("chunk_gated_delta_rule fused_recurrent_gated_delta_rule", _gated_delta),
    **_forms("chunk_gated_delta_product", gated_delta_product),
    **_forms("chunk_comba fused_recurrent_comba", _comba),
    **_forms("chunk_kda fused_recurrent_kda", _kda),
    **_forms("chunk_rwkv6 fused_recurrent_rwkv6", _rwkv6),
    **_forms("chunk_rwkv7 fused_mul_recurrent_rwkv7", _rwkv7),
}  # fmt: skip
"""By the name in a layer's own file; every op has several forms that compute the same."""


def maps_by_row(
    query: Tensor, kept: Tensor | None, weights_of: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The maps of all batch rows (batch, head, query, key), zero at padding.

    query (batch, time, head, ...); kept (batch, time) tells the real tokens, None for all;
    weights_of(row, its real tokens) gives one row's map among these.
    """
    batch, length, head = query.shape[:3]
    require_memory(
        "dsf.trace", "attention map", ("batch", "head", "query", "key"),
        (batch, head, length, length), query.dtype, device=query.device,
        advice="Trace a shorter sequence.",
    )  # fmt: skip
    weights = query.new_zeros(batch, head, length, length)
    for row in range(batch):
        real = torch.arange(length, device=query.device)
        real = real if kept is None else real[kept[row]]
        weights[row, :, real[:, None], real] = weights_of(row, real)
    return weights
