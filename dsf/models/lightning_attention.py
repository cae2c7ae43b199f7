"""Lightning attention: linear attention with constant decays, activated projections, no scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.models._gated_linear import gated_linear_recurrence
from dsf.models._projections import HeadedMixer
from dsf.recurrence import Recurrence
from dsf.shapes import Float

SYSTEM = "lightning_attention"
SLOPES = ("power", "linear")


def lightning_log_decays(
    n_head: int, layer: int = 0, n_layer: int = 1, *, slopes: str = "power"
) -> Float[Tensor, " head"]:
    """log decays a head, in float64, less steep in later layers.

        power:   -2^(-8 (h+1)/n_head) (1 - layer/(n_layer - 1 + 1e-5) + 1e-5)     (MiniMax)
        linear:  -8 h/n_head (1 - layer/n_layer)                                  (fla)

    Head 0 of `linear` does not decay at all. Raises DsfValueError for an unknown name. Source:
    Qin et al. (2024), section 3; the releases differ as above.
    """
    head = torch.arange(n_head, dtype=torch.float64)
    if slopes == "power":
        return -(2.0 ** (-8 * (head + 1) / n_head)) * (1 - layer / (n_layer - 1 + 1e-5) + 1e-5)
    if slopes == "linear":
        return -8 / n_head * (1 - layer / n_layer) * head
    raise DsfValueError(
        f"dsf.lightning_log_decays: slopes: expected one of {SLOPES}, got {slopes!r}."
    )


def lightning_attention_recurrence(
    query: Float[Tensor, "batch time head state"],
    key: Float[Tensor, "batch time group state"],
    log_decay: Float[Tensor, " head"],
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "#batch #head state channel"] | None = None,
) -> Recurrence:
    """Lightning attention over values (batch, time, head, channel); no normaliser.

        A = exp(log_decay_h) I,   B_t = k_t,   C_t = scale q_t^T,   D = 0

    MiniMax has no scale, fla state^(-1/2). Take a released layer's slopes from its buffer. State:
    state x channel a head. Raises DsfShapeError. Source: Qin et al. (2024), eqs. 1-3.
    """
    return gated_linear_recurrence(SYSTEM, query, key, log_decay[None, None], scale, initial_state)


class LightningAttention(HeadedMixer):
    """The lightning attention layer of MiniMax: SiLU on q, k and v, RMS norm over all heads.

        y_t = W_o (RMSNorm(o_t) * sigmoid(W_g x_t))

    layer and n_layer place the layer in its model (the slopes depend on it). Cost O(length x
    width^2 / n_head), state width^2 / n_head. Source: Qin et al. (2024); MiniMax-01 (2025).
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "e^(−sₕ) I, constant", "B": "kₜ = SiLU(xₜW_k)", "C": "qₜᵀ = SiLU(xₜW_q)ᵀ", "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Qin et al. (2024), arXiv 2401.04658; MiniMax (2025)"
    log_decay: Tensor

    def __init__(
        self, width: int, n_head: int = 4, *, layer: int = 0, n_layer: int = 1,
        slopes: str = "power", norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(
            width, n_head, activation="silu", norm="all", gate="sigmoid", norm_eps=norm_eps
        )
        decays = lightning_log_decays(n_head, layer, n_layer, slopes=slopes)
        self.register_buffer("log_decay", decays.to(torch.get_default_dtype()))

    def core(self, x: Tensor, start: int = 0) -> tuple[Recurrence, Tensor]:
        """The decaying system and the values."""
        q, k, v = self.project(x)
        return lightning_attention_recurrence(q, k, self.log_decay), v


LAYER = LightningAttention
