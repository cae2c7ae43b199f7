"""flash-linear-attention: delta rules with gates a channel, a preconditioner or a momentum."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dsf.adapters._delta_rule import unit
from dsf.adapters._fla_ops import Given, unit_keys
from dsf.adapters.flash_linear_attention import FlashLinearAttention
from dsf.memory import require_memory
from dsf.models._delta_rule import delta_rule_recurrence
from dsf.models._heads import share_groups
from dsf.recurrence import Recurrence
from dsf.scanning import scan
from dsf.transitions import Dense, Scalar


def _gdn2(a: Given) -> Recurrence:
    """S <- diag(e^g) S;  S <- S + k (w * v - S^T (b * k))^T: w * v are the values."""
    query, key = unit_keys(a)
    return delta_rule_recurrence(
        "gdn2", query, key, torch.ones_like(a["g"][..., 0]), erase=a["b"] * key,
        log_decay=a["g"], scale=a["scale"],
    )  # fmt: skip


def _preconditioned(system: str, a: Given, unit_length: Any = unit) -> Recurrence:
    """S <- e^g S;  S <- S + beta k~ (v - S^T k)^T, the written key k~ = k x^(-squash(log A)).

        A_t = e^(g~_t) A_(t-1) + beta~_t k_t^2,   squash(l) = r / (1 + |r|),   r = l - center

    A is a number a channel of the key, x bounds its power: k~ is between k / x and k x.
    """
    query, key = a["q"], a["k"]
    if a.get("use_qk_l2norm_in_kernel", unit_length is not unit):
        query, key = unit_length(query), unit_length(key)
    heads = a["v"].shape[2]
    sums = Recurrence(
        Scalar(a["g_atk"], n_state=1), a["beta_atk"][..., None, None],
        torch.ones_like(key[:1, :1, :1, :1, None]),
    )  # fmt: skip
    center = a.get("log_atk_scale")
    center = torch.as_tensor(-0.2 if center is None else center, dtype=key.dtype)
    r = torch.log(scan(sums, key.square()) + a.get("eps", 1e-6)) - center.to(key.device)[..., None]
    written = key * torch.exp(-math.log(a.get("x", 1.5)) * r / (1 + r.abs()))
    query, key, written = (share_groups(x, heads) for x in (query, key, written))
    return delta_rule_recurrence(
        system, query, written, a["beta"], erase=key, log_decay=a["g"], scale=a["scale"],
    )  # fmt: skip


def _momentum(a: Given) -> Recurrence:
    """M <- mu M - eta k (v - S^T p)^T;  S <- alpha S - beta M: a dense A on [S; M].

    The two blocks mix at a different rate each step, so no gauge makes A diagonal but for low
    rank without dividing by decays; p is the key, times alpha if asked for.
    """
    query, key = unit_keys(a)
    read = key if a.get("p") is None else a["p"]
    read = unit(read) if a.get("use_qk_l2norm_in_kernel", True) and read is not key else read
    alpha, mu = a["log_alpha"].exp(), a["log_mu"].exp()
    if a.get("use_p_times_alpha", True):
        read = read * alpha[..., None]
    one = torch.ones_like(alpha)
    beta, eta = (one if a.get(n) is None else a[n] for n in ("beta", "eta"))
    n_state = key.shape[-1]
    require_memory(
        "dsf.trace", "A", ("batch", "time", "head", "state", "state"),
        (*key.shape[:3], 2 * n_state, 2 * n_state), key.dtype, device=key.device,
        advice="Trace a shorter sequence.",
    )  # fmt: skip
    written = eta[..., None] * key
    erased = written[..., None] * read[..., None, :]
    eye = torch.eye(n_state, dtype=key.dtype, device=key.device)

    def times(x: Tensor) -> Tensor:
        return x[..., None, None] * eye

    upper = torch.cat([times(alpha) - beta[..., None, None] * erased, times(-beta * mu)], -1)
    lower = torch.cat([erased, times(mu)], -1)
    query = query * (n_state**-0.5 if a["scale"] is None else a["scale"])
    return Recurrence(
        Dense(torch.cat([upper, lower], -2)),
        torch.cat([beta[..., None] * written, -written], -1)[..., None],
        functional.pad(query, (0, n_state))[..., None, :], system="momentum_delta_rule",
    )  # fmt: skip


class Momentum(FlashLinearAttention):
    """The delta rule's write goes through a momentum, which is a second state."""

    ops: ClassVar = dict.fromkeys(
        ("chunk_momentum_delta_rule", "fused_recurrent_momentum_delta_rule"), _momentum
    )

    def __init__(self) -> None:
        super().__init__(
            "momentum_delta_rule", "momentum_deltanet:MomentumDeltaNet",
            structure="[[αₜI − βₜηₜkₜpₜᵀ, −βₜμₜI], [ηₜkₜpₜᵀ, μₜI]]",
        )  # fmt: skip


class Gdn2(FlashLinearAttention):
    """Gated DeltaNet 2: erases by a gate a key channel, writes by a gate a value channel."""

    ops: ClassVar = dict.fromkeys(("chunk_gdn2", "fused_recurrent_gdn2"), _gdn2)

    def __init__(self) -> None:
        super().__init__("gdn2", "gdn2:GatedDeltaNet2", structure="(I − kₜ(bₜ∘kₜ)ᵀ) diag αₜ")

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The op, its values the gated ones."""
        return _gdn2(given), given["w"] * given["v"]


class Preconditioned(FlashLinearAttention):
    """The key that is written is scaled a channel, by the keys so far."""

    ops: ClassVar = {
        **{f"{form}_precond_gated_delta_rule": functools.partial(
            _preconditioned, "precond_gated_delta_rule") for form in ("chunk", "fused_recurrent")},
        **{f"{form}_precond_kda": functools.partial(_preconditioned, "precond_kda")
           for form in ("chunk", "fused_recurrent")},
        "naive_recurrent_precond_gated_delta_rule": functools.partial(
            _preconditioned, "precond_gated_delta_rule",
            unit_length=functools.partial(functional.normalize, dim=-1)),
    }  # fmt: skip

    def recurrence(self, function: str, given: Given) -> tuple[Recurrence, Tensor]:
        """The op that ran; its x is a bound, not the values."""
        return self.ops[function](given), given["v"]

    def returned(self, function: str, y: Tensor, given: Given) -> Tensor:
        """y as it is."""
        return y


ADAPTERS = [
    Gdn2,
    Momentum,
    functools.partial(
        Preconditioned, "precond_gated_delta_rule", "precond_gated_deltanet:PrecondGatedDeltaNet",
        structure="αₜ(I − βₜk̃ₜkₜᵀ), k̃ₜ preconditioned",
    ),
    functools.partial(
        Preconditioned, "precond_kda", "precond_kda:PrecondKDA",
        structure="(I − βₜk̃ₜkₜᵀ) diag αₜ, k̃ₜ preconditioned",
    ),
]  # fmt: skip
