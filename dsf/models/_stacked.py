"""torch.nn's recurrent modules taken layer by layer and direction by direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dsf.errors import DsfShapeError, DsfTypeError, DsfUnsupportedError
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, System


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """One direction of one layer on one input: its system, and how to get its output back.

    `readout(scan(system, values))` is `output`, (batch, time, unit), zero at padding. The backward
    direction is an Anticausal with coefficients in natural order of time. `linearize()` gives the
    Jacobian linearisation of the same run, on changes of `inputs`.
    """

    layer: int
    direction: str
    system: System
    values: Tensor
    readout: Callable[[Tensor], Tensor]
    inputs: Tensor
    output: Tensor
    linearize: Callable[[], System]


@dataclasses.dataclass(frozen=True)
class DirectionRun:
    """One direction in its own order of time, as `lstm` and `gru` compute it (see LayerRun)."""

    recurrence: Recurrence
    values: Tensor
    readout: Callable[[Tensor], Tensor]
    output: Tensor
    linearize: Callable[[], Recurrence]


Weights = Mapping[str, Tensor | None]
RunDirection = Callable[[Weights, Tensor, Sequence[Tensor], Tensor | None], DirectionRun]
"""(weights by name without suffix, x, initial states (batch, unit), keep mask) -> DirectionRun."""

WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def driven(x: Tensor, weights: Weights) -> Tensor:
    """What the input adds to the preactivations: W x_t and both biases, where there are any."""
    weight_ih = weights["weight_ih"]
    assert weight_ih is not None
    u = x @ weight_ih.mT
    for name in ("bias_ih", "bias_hh"):
        bias = weights.get(name)
        u = u if bias is None else u + bias
    return u


def runs_of(
    module: nn.RNNBase, x: Any, initial: Any, widths: Sequence[int], run: RunDirection
) -> list[LayerRun]:  # fmt: skip
    """Every layer and direction of a stacked module on its own input, in the order it runs them.

    x as the module takes it (batch first or not, unbatched, packed); initial: the module's initial
    states as a tuple, or None for zeros; widths: the size of each of them.
    Raises DsfUnsupportedError for a module that would drop units at random.
    """
    if module.dropout > 0 and module.training and module.num_layers > 1:
        raise DsfUnsupportedError(
            f"dsf.models: module: expected no dropout between layers, got dropout="
            f"{module.dropout} in training mode. Call .eval()."
        )
    inputs, keep = _batched(module, x)
    states = _initial_states(module, inputs, initial, widths)
    n_direction = 2 if module.bidirectional else 1
    runs: list[LayerRun] = []
    for layer in range(module.num_layers):
        outputs = []
        for d in range(n_direction):
            weights = {
                name: getattr(module, f"{name}_l{layer}{'_reverse' if d else ''}", None)
                for name in WEIGHT_NAMES
            }
            start = [s[layer * n_direction + d] for s in states]
            runs.append(_one(layer, bool(d), weights, inputs, start, keep, run))
            outputs.append(runs[-1].output)
        inputs = torch.cat(outputs, -1)
    return runs


def _one(
    layer: int, backward: bool, weights: Weights, x: Tensor,
    start: Sequence[Tensor], keep: Tensor | None, run: RunDirection,
) -> LayerRun:  # fmt: skip
    if not backward:
        r = run(weights, x, start, keep)
        return LayerRun(
            layer, "forward", r.recurrence, r.values, r.readout, x, r.output,
            _guarded(r.linearize, keep),
        )  # fmt: skip
    r = run(weights, x.flip(1), start, None if keep is None else keep.flip(1))

    def readout(y: Tensor) -> Tensor:
        return r.readout(y.flip(1)).flip(1)

    return LayerRun(
        layer, "backward", Anticausal(r.recurrence.flip_time()), r.values.flip(1), readout, x,
        r.output.flip(1), _guarded(lambda: Anticausal(r.linearize().flip_time()), keep),
    )  # fmt: skip


def _guarded(linearize: Callable[[], Any], keep: Tensor | None) -> Callable[[], Any]:
    def checked() -> Any:
        if keep is not None and not bool(keep.all()):
            raise DsfUnsupportedError(
                "dsf.models: linearize: expected sequences of one length, got a packed batch of "
                "several. Linearise them one by one."
            )
        return linearize()

    return checked


def _batched(module: nn.RNNBase, x: Any) -> tuple[Tensor, Tensor | None]:
    """(batch, time, feature), and where tokens are real, (batch, time), if some are not."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        position = torch.arange(padded.shape[1], device=padded.device)
        return padded, position < lengths.to(padded.device)[:, None]
    if not isinstance(x, Tensor) or x.ndim not in (2, 3):
        raise DsfTypeError(
            f"dsf.models: x: expected a PackedSequence or a tensor of 2 or 3 axes, got "
            f"{tuple(x.shape) if isinstance(x, Tensor) else type(x)}."
        )
    if x.shape[-1] != module.input_size:
        raise DsfShapeError(
            f"dsf.models: x: expected feature={module.input_size}, got {x.shape[-1]}; feature is "
            f"fixed by the module."
        )
    if x.ndim == 2:
        return x[None], None
    return (x if module.batch_first else x.transpose(0, 1)), None


def _initial_states(
    module: nn.RNNBase, x: Tensor, initial: Any, widths: Sequence[int]
) -> list[Tensor]:
    n = module.num_layers * (2 if module.bidirectional else 1)
    shapes = [(n, x.shape[0], w) for w in widths]
    if initial is None:
        return [x.new_zeros(s) for s in shapes]
    given = [s[:, None] if s.ndim == 2 else s for s in initial]
    if [tuple(s.shape) for s in given] != shapes:
        raise DsfShapeError(
            f"dsf.models: initial: expected states {shapes} as (layer x direction, batch, unit), "
            f"got {[tuple(s.shape) for s in given]}."
        )
    return given
