"""RG-LRU with several states a channel, written and read by keys and queries of the token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.models._heads import check_at_least, check_shapes
from dsf.models._mixer import SequenceMixer
from dsf.models._real_gates import DECAY_SCALE, decay_root, initial_decay_parameter
from dsf.recurrence import Recurrence
from dsf.scanning import step
from dsf.shapes import Float
from dsf.transitions import Diagonal

SYSTEM = "expanded_rglru"


def expanded_rglru_recurrence(
    recurrence_logit: Float[Tensor, "batch time channel"],
    key: Float[Tensor, "batch time state"],
    query: Float[Tensor, "batch time _state"],
    parameter: Float[Tensor, "_state _channel"],
    *,
    c: float = DECAY_SCALE,
    initial_state: Float[Tensor, "batch channel state"] | None = None,
) -> Recurrence:
    """The state-expanded RG-LRU: every channel a head of `state` states, values its inputs.

        log a_tn = -c sigmoid(recurrence_logit_t) softplus(parameter_n)
        A_t = diag a_t,   B_tn = sqrt(1 - a_tn^2) key_tn,   C_t = query_t^T,   D = 0

    Values (batch, time, channel, 1). The elementwise products of the RG-LRU become outer products
    of channels and states; with one state, a key that is the input gate of the channel and a
    query of 1 it would be the RG-LRU. State: `state` numbers a channel. Cost O(length channel
    state). Raises DsfShapeError. Source: Sieber et al. (2024), section 4.3, for the expansion; the
    authors' released experiments for this form (SELRU).
    """
    batch, length, channel = recurrence_logit.shape
    n_state = key.shape[-1]
    check_shapes(f"dsf.{SYSTEM}_recurrence", "recurrence_logit and key", {
        "key": (key, (batch, length, n_state)), "query": (query, (batch, length, n_state)),
        "parameter": (parameter, (n_state, channel)),
        "initial_state": (initial_state, (batch, channel, n_state)),
    })  # fmt: skip
    gate = torch.sigmoid(recurrence_logit)[..., None]
    log_decay = -c * gate * functional.softplus(parameter).mT
    return Recurrence(
        Diagonal(log_decay), (decay_root(log_decay) * key[:, :, None])[..., None],
        query[:, :, None, None],
        initial_state=None if initial_state is None else initial_state[..., None], system=SYSTEM,
    )  # fmt: skip


class ExpandedRglru(SequenceMixer):
    """y = W_o scan(x), with gate logits W_r x + b, key W_b x, query W_c x.

    Cost O(length x width x (width + n_state)), state n_state x width. Source: see
    `expanded_rglru_recurrence`.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "diag aₜₙ, log aₜₙ = −c rₜ softplus(Λₙ)", "B": "√(1 − aₜₙ²) bₜₙ", "C": "cₜᵀ",
        "D": "0",
    }  # fmt: skip
    source: ClassVar[str] = "Sieber et al. (2024), arXiv 2405.15731, section 4.3; released SELRU"

    def __init__(self, width: int, *, n_state: int = 16) -> None:
        super().__init__()
        check_at_least("ExpandedRglru", "n_state", 1, n_state)
        self.recurrent_gate = nn.Linear(width, width)
        self.key = nn.Linear(width, n_state, bias=False)
        self.query = nn.Linear(width, n_state, bias=False)
        self.recurrent_param = nn.Parameter(initial_decay_parameter(n_state, width))
        self.out = nn.Linear(width, width, bias=False)

    def recurrence(self, x: Tensor) -> tuple[Recurrence, Tensor]:
        """The gated system and the values x, one channel a head."""
        system = expanded_rglru_recurrence(
            self.recurrent_gate(x), self.key(x), self.query(x), self.recurrent_param
        )
        return system, x[..., None]

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Output projection."""
        return self.out(y[..., 0])

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        """One token; the state is h (batch, channel, state, 1)."""
        system, values = self.recurrence(x_t[:, None])
        y, state = step(system, values[:, 0], state)
        return self.readout(y, x_t), state


LAYER = ExpandedRglru
