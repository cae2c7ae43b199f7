"""MLPs of a model, told by their names: what is not a mixer and works token by token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from dsf.freezing import Frozen

_MLP_NAMES = frozenset({
    "mlp", "mlp_block", "feed_forward", "feedforward", "intermediate", "shared_mlp",
    "block_sparse_moe",
})  # fmt: skip
_LAST_OF_MLP = {"linear2": "linear1", "ffn_output": "ffn", "fc2": "fc1"}
"""Last and first part of MLPs that are no module of their own: torch.nn's, ALBERT's, BART's."""
_MLP_CLASSES = re.compile(
    r"(MLP|Mlp|FeedForward|FFN|Intermediate|MoE|Moe|MoeBlock|Experts|DenseActDense|GatedActDense)$"
)


def gates_free(frozen: Frozen) -> tuple[Callable, Callable]:
    """Hooks around an MLP: inside, activations have their true derivatives."""

    def before(*_: Any) -> None:
        frozen.gates = False

    def after(*_: Any) -> None:
        frozen.gates = True

    return before, after


def mlps(
    members: Sequence[nn.Module], mixers: Sequence[nn.Module]
) -> list[tuple[nn.Module, nn.Module]]:
    """First and last part (often one) of what is named like an MLP and holds no mixer."""
    known = {id(m) for m in mixers}
    found = [pair for member in members for pair in _outermost(member, known)]
    return list({id(last): (first, last) for first, last in found}.values())


def _outermost(module: nn.Module, mixers: set[int]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for name, child in module.named_children():
        if id(child) in mixers:
            continue
        known = name in _MLP_NAMES or _MLP_CLASSES.search(type(child).__name__)
        if name in _LAST_OF_MLP:
            yield getattr(module, _LAST_OF_MLP[name], child), child
        elif known and not any(id(m) in mixers for m in child.modules()):
            yield child, child
        else:
            yield from _outermost(child, mixers)
