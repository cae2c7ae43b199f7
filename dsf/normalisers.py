"""Normalisers eta of separable attention, M_tj = phi(q_t).psi(k_j) / eta_t, and the two gauges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import Identity, Scalar
from dsf.wrappers import Bidirectional, System, anticausal

GAUGES = {"identity": "A = I", "dsf": "A = eta_(t-1)/eta_t"}
"""identity: A = I and 1/eta_t in C_t. dsf: A_t = eta_(t-1)/eta_t and 1/eta_t in B_t."""


def log_exp(z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log eta of eta = exp(z). Source: Sieber et al. (2024), eq. 22."""
    return z


def log_softplus(z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log eta of eta = softplus(z); z itself far below zero, where softplus(z) = exp(z).

    Source: Sieber et al. (2024), eq. 29.
    """
    small = z < -37.0  # below, log softplus(z) = z - exp(z)/2 differs from z by less than 1e-16
    z_safe = z.masked_fill(small, 0.0)
    return torch.where(small, z, torch.log(torch.logaddexp(z_safe, torch.zeros_like(z))))


def log_sigmoid(z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log eta of eta = sigmoid(z). Source: Sieber et al. (2024), eq. 30."""
    return torch.nn.functional.logsigmoid(z)


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": log_exp, "softplus": log_softplus, "sigmoid": log_sigmoid, "one": torch.zeros_like,
    "exp_of_exp": torch.exp, "exp_of_elu": torch.nn.functional.elu,
    "exp_of_sigmoid": torch.sigmoid,
    "exp_of_softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
}  # fmt: skip
"""z = W_eta u -> log eta, by name. `exp_of_g` are the later variants, 1/eta = exp(-g(z))."""


def log_normaliser(which: str, z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log eta of the named normaliser. Raises DsfValueError for an unknown name."""
    if which not in NORMALISERS:
        raise DsfValueError(
            f"dsf.log_normaliser: which: expected one of {list(NORMALISERS)}, got {which!r}."
        )
    return NORMALISERS[which](z)


def kernel_sum(
    query_features: Float[Tensor, "batch time head feature"],
    key_features: Float[Tensor, "batch time head feature"],
    *,
    causal: bool = True,
    initial_key_sum: Float[Tensor, "#batch #head feature"] | None = None,
) -> Float[Tensor, "batch time head"]:
    """eta_t = phi(q_t) . (z_0 + sum_{j<=t} psi(k_j)), over all j if not causal.

    The token itself is in the sum (the printed eta_(t-1) of the paper's main text is an erratum).
    Source: Sieber et al. (2024), eq. 16 and appendix B.
    """
    total = key_features.cumsum(1) if causal else key_features.sum(1, keepdim=True)
    if initial_key_sum is not None:
        total = total + initial_key_sum[:, None]
    return (query_features * total).sum(-1)


def separable_system(
    query_features: Float[Tensor, "#batch #time #head feature"],
    key_features: Float[Tensor, "#batch #time #head feature"],
    log_eta: Float[Tensor, "#batch #time #head"] | None = None,
    sign: Float[Tensor, "#batch #time #head"] | None = None,
    *,
    gauge: str = "identity",
    causal: bool = True,
    system: str = "separable_attention",
    initial_state: Float[Tensor, "#batch #head feature channel"] | None = None,
) -> System:
    """The recurrence of M_tj = phi(q_t).psi(k_j) / eta_t with eta = sign exp(log_eta).

        identity: A = I,                  B_t = psi(k_t),          C_t = phi(q_t)^T / eta_t
        dsf:      A_t = eta_(t-1)/eta_t,  B_t = psi(k_t) / eta_t,  C_t = phi(q_t)^T

    The map is the same; only A, and so its eigenvalues, depend on the gauge. With a zero initial
    state eta_0 is taken as eta_1 (A_1 = 1), with a given one as 1. Not causal: the map of all
    pairs, as the sum of a causal and a strictly anticausal half. State: feature x channel a head.
    Raises DsfValueError on an unknown gauge. Source: Sieber et al. (2024), eqs. 13-15.
    """
    if gauge not in GAUGES:
        raise DsfValueError(f"dsf.{system}: gauge: expected one of {list(GAUGES)}, got {gauge!r}.")
    if not causal and initial_state is not None:
        raise DsfValueError(
            f"dsf.{system}: initial_state: expected None for causal=False, got a tensor."
        )
    n_state = query_features.shape[-1]
    label = GAUGES[gauge]

    def recurrence(A: Identity | Scalar, psi: Tensor, phi: Tensor) -> Recurrence:
        return Recurrence(
            A, psi[..., None], phi[..., None, :], initial_state=initial_state, system=system,
            gauge=label,
        )  # fmt: skip

    if log_eta is None or gauge == "identity":
        phi = query_features if log_eta is None else query_features * _inverse(log_eta, sign)
        r = recurrence(Identity(n_state), key_features, phi)
        return r if causal else Bidirectional(r, anticausal(r, strict=True))
    psi = key_features * _inverse(log_eta, sign)
    given = initial_state is not None
    r = recurrence(_ratio(log_eta, sign, n_state, 1, given), psi, query_features)
    if causal:
        return r
    back = recurrence(_ratio(log_eta, sign, n_state, -1, given), psi, query_features)
    return Bidirectional(r, anticausal(back, strict=True))


def log_and_sign(
    eta: Float[Tensor, "*any"],
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """log|eta| and the sign of eta; an eta of exactly zero counts as 1.

    With features that are not negative eta_t = 0 means that every phi(q_t).psi(k_j) is zero, so
    the row is zero whatever divides it.
    """
    eta = torch.where(eta == 0, 1.0, eta)
    return eta.abs().log(), eta.detach().sign()


def _inverse(log_eta: Tensor, sign: Tensor | None) -> Tensor:
    inverse = torch.exp(-log_eta)
    return (inverse if sign is None else inverse * sign)[..., None]


def _ratio(log_eta: Tensor, sign: Tensor | None, n_state: int, lag: int, given: bool) -> Scalar:
    """eta_(t-lag)/eta_t as a decay: lag 1 looks back, lag -1 ahead (the anticausal half)."""

    def earlier(x: Tensor, start: float) -> Tensor:
        edge = x[:, :1] if lag > 0 else x[:, -1:]
        edge = torch.full_like(edge, start) if given else edge
        return torch.cat([edge, x[:, :-1]] if lag > 0 else [x[:, 1:], edge], dim=1)

    log_decay = earlier(log_eta, 0.0) - log_eta
    return Scalar(
        log_decay, None if sign is None else sign * earlier(sign, 1.0), n_state=n_state
    )  # fmt: skip
