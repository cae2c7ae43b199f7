"""One mixer a family of kernels: its arguments, and the same scan by the torch path of dsf."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from _train_mixer import EPS, Mixer, Path
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.models._hierarchical_core import node_sums
from dsf.models._hierarchical_stream import free_weights, group_table
from dsf.models._real_gates import decay_root, initial_decay_parameter
from dsf.models._step_size import initial_step_bias
from dsf.models.gated_delta_net import gated_delta_net_recurrence
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.mamba import mamba_recurrence
from dsf.models.monarch_attention import monarch_attention_recurrence
from dsf.models.rglru import rglru_recurrence
from dsf.models.zeros import zeros_recurrence
from dsf.transitions import Diagonal, Scalar
from dsf.trees import Tree, tree_from_branching

BRANCHING = (16, 8, 4, 2)
N_STATE = 16
"""States a channel of the selective scan."""


class Diagonals(Mixer):
    """RG-LRU: every channel by itself."""

    kernel_name, wide = "diagonal_scan", ("decay",)

    def __init__(self, width: int, n_head: int, path: Path) -> None:
        super().__init__(width, n_head, path)
        self.rate = nn.Parameter(initial_decay_parameter(width))

    def columns(self) -> dict[str, int]:
        return dict.fromkeys(("input", "forget", "write"), self.width)

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        decay = -8 * torch.sigmoid(parts["forget"]) * functional.softplus(self.rate)
        gain = torch.sigmoid(parts["write"]) * decay_root(decay)
        return {"decay": decay, "inputs": gain * parts["input"]}

    def options(self) -> dict[str, Any]:
        return {"log": True}

    def run_torch(self, decay: Tensor, inputs: Tensor) -> Tensor:
        one = inputs.new_ones(1, 1, 1, 1, 1)
        return self.scan(dsf.Recurrence(Diagonal(decay[..., None]), one, one), inputs[..., None])


class FusedGates(Diagonals):
    """RG-LRU again: its kernel makes decay and input from the projections itself."""

    kernel_name, wide = "rglru_scan", ("parameter",)

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"inputs": parts["input"], "recurrence_logit": parts["forget"],
                "input_logit": parts["write"], "parameter": self.rate}  # fmt: skip

    def options(self) -> dict[str, Any]:
        return {}

    def run_torch(self, inputs: Tensor, **gates: Any) -> Tensor:
        return self.scan(rglru_recurrence(**gates), inputs[..., None])[..., 0]


class Selective(Mixer):
    """Mamba's S6, gated."""

    kernel_name, wide = "selective_scan", ("A", "D", "bias")

    def __init__(self, width: int, n_head: int, path: Path) -> None:
        super().__init__(width, n_head, path)
        rates = torch.arange(1, N_STATE + 1, dtype=torch.float32).log()
        self.log_rate = nn.Parameter(rates.repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(initial_step_bias(width, 1e-3, 0.1))

    def columns(self) -> dict[str, int]:
        wide = dict.fromkeys(("u", "step_size", "z"), self.width)
        return wide | {"B": N_STATE, "C": N_STATE}

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        shared = {name: parts[name][:, :, None] for name in ("B", "C")}
        own = {"A": -self.log_rate.exp(), "D": self.skip, "bias": self.bias}
        return parts | shared | own

    def options(self) -> dict[str, Any]:
        return {"softplus": True}

    def run_torch(self, **a: Any) -> Tensor:
        system = mamba_recurrence(a["step_size"], a["A"], a["B"], a["C"], a["D"],
                                  step_bias=a["bias"], softplus=True)  # fmt: skip
        return self.scan(system, a["u"][..., None])[..., 0] * functional.silu(a["z"])


class MatrixState(Mixer):
    """Queries, keys, values, and one gate a head, or a state where `per_state`."""

    wide = ("log_decay",)
    per_state: ClassVar[bool] = False

    def columns(self) -> dict[str, int]:
        return super().columns() | {"gate": self.width if self.per_state else self.n_head}

    def options(self) -> dict[str, Any]:
        return {"scale": (self.width // self.n_head) ** -0.5}


class ScalarDecay(MatrixState):
    """Gated linear attention, one decay a head."""

    kernel_name = "scalar_decay_scan"

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        gate = parts.pop("gate")
        offset = torch.linspace(2.0, 6.0, self.n_head, device=gate.device)
        return super().arguments(parts) | {"log_decay": functional.logsigmoid(gate + offset)}

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
        A = Scalar(log_decay, n_state=key.shape[-1])
        C = self.options()["scale"] * query
        return self.scan(dsf.Recurrence(A, key[..., None], C[..., None, :]), value)


class DiagonalDecay(MatrixState):
    """GLA: one decay a state."""

    kernel_name, per_state = "diagonal_decay_scan", True

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        log_decay = functional.logsigmoid(self.heads(parts.pop("gate"))) / 16
        return super().arguments(parts) | {"log_decay": log_decay}

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
        C = self.options()["scale"] * query
        system = dsf.Recurrence(Diagonal(log_decay), key[..., None], C[..., None, :])
        return self.scan(system, value)


class Delta(MatrixState):
    """Gated delta rule on unit keys."""

    kernel_name, wide = "delta_scan", ("log_decay", "write_strength")

    def columns(self) -> dict[str, int]:
        return super().columns() | {"write": self.n_head}

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        gates = {
            "log_decay": functional.logsigmoid(parts.pop("gate") + 4.0),
            "write_strength": torch.sigmoid(parts.pop("write")),
        }
        found = super().arguments(parts)
        return found | gates | {"key": functional.normalize(found["key"], dim=-1)}

    def run_torch(self, **a: Any) -> Tensor:
        value = a.pop("value")
        return self.scan(gated_delta_net_recurrence(**a, **self.options()), value)


class Zeros(Mixer):
    """ZeroS: unit queries and keys, logits and two gates a head."""

    kernel_name, wide = "zeros_scan", ("logit", "first", "higher")

    def columns(self) -> dict[str, int]:
        return super().columns() | dict.fromkeys(self.wide, self.n_head)

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"logit": parts.pop("logit")}
        found |= {name: torch.sigmoid(parts.pop(name)) for name in ("first", "higher")}
        unit = {name: functional.normalize(self.heads(parts[name]), dim=-1)
                for name in ("query", "key")}  # fmt: skip
        return found | unit | {"value": self.heads(parts["value"])}

    def run_torch(self, **a: Any) -> Tensor:
        system = zeros_recurrence(
            a["query"], a["key"], a["logit"], a["first"], a["higher"], realisation="running_max"
        )
        return self.scan(system, a["value"])


class Inline(Mixer):
    """Causal InLine attention at the released scale."""

    kernel_name = "inline_scan"

    def options(self) -> dict[str, Any]:
        return {"scale": (self.width // self.n_head) ** -0.5, "over_count": True}

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.scan(inline_attention_recurrence(query, key), value)


class Monarch(Mixer):
    """MonarchAttention: every token sees all, so that masked tokens are to be restored."""

    kernel_name, causal = "monarch_attention", False

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        system = monarch_attention_recurrence(query, key)
        self.path.auto = "factored rows"
        return dsf.scan(system, value, "auto", allow_nonfinite=True)


@functools.lru_cache(maxsize=4)
def tree_of(length: int) -> Tree:
    """One tree a length, since it keeps its tables."""
    return tree_from_branching(length, BRANCHING)


class Hierarchical(Mixer):
    """Hierarchical attention as a stream."""

    kernel_name = "hierarchical_stream"

    def options(self) -> dict[str, Any]:
        return {"branching": BRANCHING}

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.path.auto = "sums of the groups"  # as a recurrence: a dense matrix over all groups
        tree = tree_of(query.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        weights = free_weights(q, k, real, tree, q.shape[-1] ** -0.5)
        groups = node_sums(v, tree)[:, :, group_table(tree).to(q.device)]
        return torch.einsum("bhts,bhtsp->bthp", weights, groups)


class Normalised(Mixer):
    """Linear attention over its kernel sum, on features elu + 1."""

    kernel_name = "normalised_scan"

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().arguments(parts)
        return found | {name: functional.elu(found[name]) + 1 for name in ("query", "key")}

    def options(self) -> dict[str, Any]:
        return {"eps": EPS}

    def run_torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.scan(
            linear_attention_recurrence(query, key, feature_map="identity", eps=EPS), value
        )


class Mlstm(MatrixState):
    """mLSTM under its running maximum."""

    kernel_name, wide = "mlstm_scan", ("input_gate", "forget_gate")

    def columns(self) -> dict[str, int]:
        return super().columns() | {"write": self.n_head}

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        gates = {"input_gate": parts.pop("write"), "forget_gate": parts.pop("gate") + 4.0}
        return super().arguments(parts) | gates

    def run_torch(self, **a: Any) -> Tensor:
        # one more column sums the keys; gates this small need no running maximum, whose loop over
        # time is the cost of the model's own recurrence
        key = a["input_gate"].exp()[..., None] * a["key"]
        A = Scalar(functional.logsigmoid(a["forget_gate"]), n_state=key.shape[-1])
        C = self.options()["scale"] * a["query"]
        system = dsf.Recurrence(A, key[..., None], C[..., None, :])
        value = functional.pad(a["value"], (0, 1), value=1.0)
        y = self.scan(system, value)
        return y[..., :-1] / y[..., -1:].abs().clamp(min=1.0)


FAMILIES: dict[str, type[Mixer]] = {
    "a": Diagonals, "a_gates": FusedGates, "b": Selective, "c": ScalarDecay, "d": DiagonalDecay,
    "e": Delta, "f_zeros": Zeros, "f_inline": Inline, "g_monarch": Monarch,
    "g_hierarchical": Hierarchical, "normalised": Normalised, "mlstm": Mlstm,
}  # fmt: skip
"""Mixers by the letters of the table of kernels."""
