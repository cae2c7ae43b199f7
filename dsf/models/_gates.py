"""Gates of gated attention: how scores are made, shared, applied; rows whose keys are gated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dsf.errors import DsfShapeError, DsfValueError
from dsf.factors import SoftmaxRows
from dsf.mixing_rows import MixingRows
from dsf.shapes import Float, Inexact
from dsf.transitions._base import register

Activation = Callable[[Tensor], Tensor]


def non_sparse_sigmoid(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """0.5 + 0.5 sigmoid(x), in [0.5, 1]. Source: Qiu et al. (2025), table 4."""
    return 0.5 + 0.5 * torch.sigmoid(x)


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu, "identity": lambda x: x,
    "non_sparse_sigmoid": non_sparse_sigmoid,
}  # fmt: skip
SHARED = (None, "logits", "scores")


def gate_scores(
    logits: Float[Tensor, "#batch #time head width"],
    activation: str | Activation = "sigmoid",
    shared: str | None = None,
) -> Float[Tensor, "#batch #time _head width"]:
    """activation(logits), averaged over heads before ("logits") or after ("scores") it, or not.

    The text does not settle which of the two head-shared gates takes. Raises DsfValueError on an
    unknown name. Source: Qiu et al. (2025), section 2.2.
    """
    if shared not in SHARED:
        raise DsfValueError(
            f"dsf.gate_scores: shared: expected one of {list(SHARED)}, got {shared!r}."
        )
    act = activation_of(activation)
    if shared == "logits":
        return act(logits.mean(2, keepdim=True))
    scores = act(logits)
    return scores if shared is None else scores.mean(2, keepdim=True)


def activation_of(which: str | Activation) -> Activation:
    """The activation of that name, or the callable itself; DsfValueError for an unknown name."""
    if not isinstance(which, str):
        return which
    if which not in ACTIVATIONS:
        raise DsfValueError(
            f"dsf.gate_scores: activation: expected one of {list(ACTIVATIONS)} or a callable, got "
            f"{which!r}."
        )
    return ACTIVATIONS[which]


def split_query_gate(
    weight: Float[Tensor, "row width"], n_group: int, per_group: int, head_width: int
) -> tuple[Float[Tensor, "_query width"], Float[Tensor, "_gate width"]]:
    """Query and gate rows of a released widened query projection.

    In each of n_group groups per_group heads of query rows come first, gate rows after them.
    Released gated_attention: n_group key-value groups. Qwen3-Next: every head a group of one.
    """
    rows = weight.shape[0] // n_group
    query = per_group * head_width
    if rows * n_group != weight.shape[0] or rows < query:
        raise DsfShapeError(
            f"dsf.split_query_gate: weight: expected {n_group} groups of {query} query rows and "
            f"their gate rows, got {weight.shape[0]} rows."
        )
    grouped = weight.unflatten(0, (n_group, rows))
    return grouped[:, :query].flatten(0, 1), grouped[:, query:].flatten(0, 1)


@register
@dataclasses.dataclass(frozen=True)
class GatedRows(MixingRows):
    """Softmax rows with a number a query and a number a key: M_tj = query_gate_t a_tj key_gate_j.

    query_gate (batch, time, head) scales C_t, key_gate (batch, key, head) stands for
    B_j = key_gate_j e_j. Either may be None.
    """

    rows: SoftmaxRows
    query_gate: Tensor | None = None
    key_gate: Tensor | None = None

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """As C: (batch, time, head, 1, key)."""
        return self.rows.shape

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """As the rows."""
        return self.rows.causal

    @property
    def query_start(self) -> int:  # type: ignore[override]
        """As the rows."""
        return self.rows.query_start

    def tile(self, queries: slice, keys: slice) -> Inexact[Tensor, "batch head query key"]:
        """The softmax tile times the gates of its rows and columns."""
        weights = self.rows.tile(queries, keys)
        if self.query_gate is not None:
            weights = weights * self.query_gate[:, queries].transpose(1, 2)[..., None]
        if self.key_gate is not None:
            weights = weights * self.key_gate[:, keys].transpose(1, 2)[:, :, None]
        return weights

    def mix(
        self, values: Inexact[Tensor, "batch head key channel"]
    ) -> Inexact[Tensor, "out_batch out_head query channel"]:
        """The softmax rows times gated values, then gated."""
        if self.key_gate is not None:
            values = values * self.key_gate.transpose(1, 2)[..., None]
        y = self.rows.mix(values)
        return y if self.query_gate is None else y * self.query_gate.transpose(1, 2)[..., None]

    def time_slice(self, start: int, stop: int) -> GatedRows:
        """The rows of steps start..stop-1 over the same keys."""
        gate = None if self.query_gate is None else self.query_gate[:, start:stop]
        return GatedRows(self.rows.time_slice(start, stop), gate, self.key_gate)

    def shape_faults(self) -> list[str]:
        """The rows' own, and gates that fit them."""
        faults = self.rows.shape_faults()
        if faults:
            return faults
        batch, time, head, _, key = self.shape
        for name, gate, axis, size in [
            ("query_gate", self.query_gate, "time", time), ("key_gate", self.key_gate, "key", key),
        ]:  # fmt: skip
            if gate is not None and tuple(gate.shape) not in (
                (batch, size, head),
                (1, size, head),
            ):
                faults.append(
                    f"C.{name}: expected axes (batch={batch}, {axis}={size}, head={head}), got "
                    f"{tuple(gate.shape)}."
                )
        return faults
