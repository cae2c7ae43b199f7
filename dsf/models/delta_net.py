"""DeltaNet: linear attention that overwrites what its key held before."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dsf.models._delta_rule import DeltaMixer, delta_rule_recurrence
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "delta_net"


def delta_net_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    write_strength: Float[Tensor, "batch time head"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """DeltaNet over values (batch, time, head, channel), keys of length one beforehand.

        A_t = I - beta_t k_t k_t^T,   B_t = beta_t k_t,   C_t = scale q_t^T,   D = 0

    write_strength beta in (0, 2); scale is state^(-1/2) unless given. State: state x channel a
    head. Raises DsfShapeError when groups do not divide heads. Source: Yang et al. (2024), eq. 7.
    """
    return delta_rule_recurrence(
        SYSTEM, query, key, write_strength, scale=scale, initial_state=initial_state
    )


class DeltaNet(DeltaMixer):
    """The DeltaNet layer: convolved q, k, v with SiLU, unit q and k, RMS norm a head, no gate.

    Cost O(length x width^2 / n_head), state width^2 / n_head. Source: Yang et al. (2024), sec. 3.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I − βₜkₜkₜᵀ, βₜ = σ(xₜW_β)", "B": "βₜkₜ", "C": "qₜᵀ/√N", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Yang et al. (2024), arXiv 2406.06484, eq. 7"

    def __init__(
        self, width: int, n_head: int = 4, *, conv_size: int = 4, gate: str | None = None,
        negative_eigenvalues: bool = False, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, conv_size=conv_size, gate=gate, norm_eps=norm_eps,
            negative_eigenvalues=negative_eigenvalues,
        )  # fmt: skip

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The delta rule of this input and its values."""
        q, k, v = self.project(x)
        return delta_net_recurrence(q, k, self.write_strength(x)), v


LAYER = DeltaNet
