"""Based: linear attention with the second-order Taylor features of the exponential."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor

from dsf.feature_maps import Taylor
from dsf.models._kernel_features import KernelMixer, KernelOptions, kernel_recurrence
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "based"


def based_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    **options: Unpack[KernelOptions],
) -> Recurrence:
    """Based's linear attention over values (batch, time, head, channel).

        M_tj = (1 + x + x^2/2) / (sum_i (1 + x + x^2/2) + eps),   x = scale q_t.k_j
        A = I,   B_t = phi(k_t),   C_t = phi(scale q_t)^T / eta_t,   D = 0

    phi holds every monomial up to degree 2 once: (width + 1)(width + 2)/2 states against 1 + width
    + width^2 as released. Options (scale, normalise, eps, initial states): see `KernelOptions`.
    Every weight is positive. State: feature x channel a head. Raises DsfShapeError. Source: Arora
    et al. (2024), eqs. 1-3.
    """
    return kernel_recurrence(SYSTEM, query, key, Taylor(2), **options)


class Based(KernelMixer):
    """The linear attention layer of Based: queries and keys of feature_width a head, no gate.

    (The model alternates it with windows of softmax attention: `sliding_window_attention`.) Cost
    O(length x feature x width), state feature x (width + n_head), feature = (feature_width + 1)
    (feature_width + 2)/2. Source: Arora et al. (2024), section 4.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I", "B": "φ(kₜ), φ(q)·φ(k) = 1 + q·k + (q·k)²/2", "C": "φ(qₜ/√d)ᵀ/ηₜ", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "Σ φ(q)·φ(k) + ε"
    source: ClassVar[str] = "Arora et al. (2024), arXiv 2402.18668, eqs. 1-3"

    @classmethod
    def small(cls, width: int) -> Based:
        """Four heads, features of two numbers."""
        return cls(width, 4, feature_width=2)

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The undivided system and the values."""
        q, k, v = self.project(x)
        return based_recurrence(q, k, normalise=False), v


LAYER = Based
