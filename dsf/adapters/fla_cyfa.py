"""flash-linear-attention: cyclic flow attention, whose slots turn past the reader by a clock."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsf.adapters._fla_ops import Given
from dsf.adapters.flash_linear_attention import FlashLinearAttention
from dsf.memory import require_memory
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.transitions import Scalar


def _cyclic_flow(a: Given) -> Recurrence:
    """Slots of keys and values that stand still, written and read by a turning reader.

        V_t = e^(g_t) V_(t-1) + beta_t w_t v_t^T
        y_t = V_t^T R_t^T E^T softmax(E R_t K_t q_t / sqrt(d))
        w_t = R_t^T e,   R_t the turn of pair m by 2 pi m l_t / (slots - 1),   l_t = sum of delta

    K is V for the keys, E the readout in the basis of the pairs, e the impulse at slot zero. No
    value enters the softmax: A = e^g, B = beta w, C = all that stands before V. Memory O(length
    slots width) while K is made.
    """
    query, key = (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        for x, eps, weight in ((a["q"], a["q_norm_eps"], a["q_norm_weight"]),
                               (a["k"], a["k_norm_eps"], a["k_norm_weight"]))
    )  # fmt: skip
    table = a["readout"] @ _basis(a["readout"])
    n_slot = table.shape[-1]
    require_memory(
        "dsf.trace", "slots of keys", ("batch", "time", "head", "slot", "state"),
        (*key.shape[:3], n_slot, key.shape[-1]), key.dtype, device=key.device,
        advice="Trace a shorter sequence.",
    )  # fmt: skip
    period = n_slot - 1
    # in float64: a sum of many turns must keep its place on the circle
    clock = a["delta"].to(torch.float64).cumsum(1)[..., None]
    pair = torch.arange(n_slot // 2, device=key.device)
    phase = ((clock * pair).remainder(period) * (2 * math.pi / period)).to(key.dtype)
    written = a["beta"][..., None] * _turned(_basis(a["readout"])[0], -phase)
    every = torch.eye(n_slot, dtype=key.dtype, device=key.device)
    held = scan(
        Recurrence(Scalar(a["g"], n_state=n_slot), written[..., None], every[None, None, None]),
        key,
    )  # fmt: skip
    scale = key.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    logits = _turned((held @ query[..., None]).squeeze(-1) * scale, phase)
    read = torch.einsum("hrm,bthm->bthr", table, logits).softmax(-1)
    read = _turned(torch.einsum("hrm,bthr->bthm", table, read), -phase)
    if a.get("kept") is not None:
        read = read * a["kept"][..., None, None]
    return gated_linear_recurrence("cyclic_flow_attention", read, written, a["g"], scale=1.0)


def _basis(readout: Tensor) -> Tensor:
    """(slots - 1, slots): cosines and sines of the pairs on a circle, orthonormal."""
    period = readout.shape[-1]
    place = torch.arange(period, dtype=torch.float64, device=readout.device)[:, None]
    pair = torch.arange((period + 1) // 2, device=readout.device)
    angle = place * pair * (2 * math.pi / period)
    size = torch.where(pair == 0, 1, 2).to(torch.float64).div(period).sqrt()
    return (size[:, None] * torch.stack([angle.cos(), angle.sin()], -1)).flatten(-2).to(
        readout.dtype)  # fmt: skip


def _turned(x: Tensor, phase: Tensor) -> Tensor:
    """Pair (2m, 2m + 1) of x turned by phase m."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = phase.cos(), phase.sin()
    return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)


class CyclicFlow(FlashLinearAttention):
    """Reads by a softmax over slots, as gated slot attention does."""

    ops: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("chunk_cyfa", "fused_recurrent_cyfa"), _cyclic_flow)  # fmt: skip

    def __init__(self) -> None:
        super().__init__(
            "cyclic_flow_attention", "cyfa:CyclicFlowAttention", structure="αₜ I")  # fmt: skip


ADAPTERS = [CyclicFlow]
