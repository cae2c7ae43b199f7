"""ReBased: linear attention with a squared similarity of learned, normalised queries and keys."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor, nn

from dsf.feature_maps import Taylor
from dsf.models._kernel_features import KernelMixer, KernelOptions, kernel_recurrence
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "rebased"


def squared_features(x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead feature"]:
    """phi with phi(q).phi(k) = (q.k)^2: the width (width + 1)/2 monomials of degree 2."""
    return 2**0.5 * Taylor(2)(x)[..., 1 + x.shape[-1] :]


def rebased_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    **options: Unpack[KernelOptions],
) -> Recurrence:
    """ReBased over values (batch, time, head, channel), queries and keys made beforehand.

        M_tj = (scale q_t.k_j)^2 / (sum_i (scale q_t.k_i)^2 + eps)
        A = I,   B_t = phi(k_t),   C_t = phi(scale q_t)^T / eta_t,   D = 0

    Options (scale, normalise, eps, initial states): see `KernelOptions`. A weight can vanish, none
    is negative. State: feature x channel a head, feature = width (width + 1)/2. Raises
    DsfShapeError. Source: Aksenov et al. (2024), eq. 9.
    """
    return kernel_recurrence(SYSTEM, query, key, squared_features, **options)


class Rebased(KernelMixer):
    """The ReBased layer: q' = gamma_q LN(q) + beta_q and k' likewise, then squared similarity.

    LN has no weights of its own; gamma and beta are vectors of feature_width, shared by the
    heads and, if `shared` (as released), by queries and keys. Cost and state as in Based.
    Source: Aksenov et al. (2024), section 4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I", "B": "φ(k′ₜ), φ(q)·φ(k) = (q·k)²", "C": "φ(q′ₜ/√d)ᵀ/ηₜ", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ φ(q)·φ(k) + ε"
    source: ClassVar[str] = "Aksenov et al. (2024), arXiv 2402.10644, eq. 9"
    default_eps: ClassVar[float] = 1e-5

    def __init__(
        self, width: int, n_head: int = 4, *, feature_width: int = 16, shared: bool = True,
        eps: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(width, n_head, feature_width=feature_width, eps=eps)
        self.query_norm = nn.LayerNorm(feature_width)
        self.key_norm = None if shared else nn.LayerNorm(feature_width)

    @classmethod
    def small(cls, width: int) -> Rebased:
        """Four heads, features of three numbers."""
        return cls(width, 4, feature_width=3)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised query and key by head, value by head."""
        q, k, v = super().project(x)
        key_norm = self.query_norm if self.key_norm is None else self.key_norm
        return self.query_norm(q), key_norm(k), v

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The undivided system and the values."""
        q, k, v = self.project(x)
        return rebased_recurrence(q, k, normalise=False), v


LAYER = Rebased
