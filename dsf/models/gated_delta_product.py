"""Gated DeltaProduct: several delta rule steps a token, a product of Householder matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dsf.errors import DsfShapeError
from dsf.models._delta_rule import DeltaMixer, SoftplusDecay
from dsf.recurrence import Recurrence
from dsf.shapes import Float
from dsf.transitions import DiagonalLowRank, Householder

SYSTEM = "gated_delta_product"


def gated_delta_product_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time head write state"],
    log_decay: Float[Tensor, "batch time head"] | None,
    write_strength: Float[Tensor, "batch time head write"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Gated DeltaProduct over values (batch, time, head, write, channel): n inputs a token.

        A_t = H_n ... H_1 exp(g_t),   H_j = I - beta_tj k_tj k_tj^T
        B_t[:, j] = beta_tj H_n ... H_{j+1} k_tj,   C_t = scale q_t^T,   D = 0

    Then H_n ... H_1 = I - B_t [k_t1 ... k_tn]^T, so A_t is diagonal plus rank n. log_decay None
    never decays; scale is state^(-1/2) unless given (the released naive code has 1). Cost
    O(length n^2 state) for B, state: state x channel a head. Raises DsfShapeError without a
    write. Source: Siems et al. (2025), eqs. 4-6.
    """
    if key.shape[3] < 1:
        raise DsfShapeError(
            f"dsf.{SYSTEM}_recurrence: key: expected axes (batch, time, head, write >= 1, state), "
            f"got {tuple(key.shape)}."
        )
    columns = key.new_zeros(*key.shape[:3], key.shape[4], 0)
    for k, beta in zip(key.unbind(3), write_strength.unbind(3), strict=True):
        later = Householder(beta, k).apply(columns)
        columns = torch.cat([later, (beta[..., None] * k)[..., None]], dim=-1)
    if log_decay is None:
        log_decay = torch.zeros_like(write_strength[..., 0])
    read = log_decay.exp()[..., None, None] * key.mT
    spread = log_decay[..., None].expand(*log_decay.shape, key.shape[4])
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    return Recurrence(
        DiagonalLowRank(spread, left=columns, right=read), columns, query[..., None, :],
        initial_state=initial_state, system=SYSTEM,
    )  # fmt: skip


class GatedDeltaProduct(DeltaMixer):
    """The Gated DeltaProduct layer: n_write keys, values and write strengths in (0, 2) a token.

    Otherwise as Gated DeltaNet; decays=False leaves the decay out (DeltaProduct). Cost O(length x
    n_write x width^2 / n_head), state width^2 / n_head. Source: Siems et al. (2025), section 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "e^gₜ Πⱼ(I − βₜⱼkₜⱼkₜⱼᵀ)", "B": "βₜⱼ Πᵢ﹥ⱼ(I − βₜᵢkₜᵢkₜᵢᵀ) kₜⱼ", "C": "qₜᵀ/√N",
        "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Siems et al. (2025), arXiv 2502.10297, eqs. 4-6"

    def __init__(
        self, width: int, n_head: int = 4, *, n_write: int = 2, decays: bool = True,
        conv_size: int = 4, negative_eigenvalues: bool = True, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, n_write=n_write, conv_size=conv_size, gate="silu", norm_eps=norm_eps,
            negative_eigenvalues=negative_eigenvalues,
        )  # fmt: skip
        self.step_size = nn.Linear(width, n_head, bias=False) if decays else None
        self.decay = SoftplusDecay(n_head) if decays else None

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The product of delta rules of this input and its values."""
        q, k, v = self.project(x)
        if self.n_write == 1:
            k, v = k[:, :, :, None], v[:, :, :, None]
        log_decay = None
        if self.decay is not None and self.step_size is not None:
            log_decay = self.decay(self.step_size(x))
        strength = self.write_strength(x).unflatten(-1, (self.n_head, -1))
        return gated_delta_product_recurrence(q, k, log_decay, strength), v


LAYER = GatedDeltaProduct
