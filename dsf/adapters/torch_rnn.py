"""torch.nn: LSTM, GRU, RNN and their cells: gates hidden in one call, made again from weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dsf.adapters._contract import Adapter, Built, Visit, first_tensor
from dsf.errors import DsfTypeError
from dsf.models import gru, lstm, rnn
from dsf.models._stacked import LayerRun


class RecurrentLayers(Adapter):
    """One trace for each layer and direction: "l0", "l0_reverse", "l1", ...

    The trace's output is (batch, time, unit) of that direction in the module's own layout (time
    first unless batch_first, no batch axis for unbatched input; a packed batch is padded, batch
    first). For the last layer it is what the module returned; lower layers' outputs, which the
    module does not return, are made by the same torch function run on that layer alone.
    """

    name = "torch_rnn"
    systems = ("lstm", "gru", "rnn")
    scope = "along trajectory"
    covers = ("torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN (each layer and direction)",)
    classes = frozenset(f"torch.nn.modules.rnn:{c}" for c in ("LSTM", "GRU", "RNN"))
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """The systems along the trajectory of the module's own input and initial states."""
        module = visit.module
        assert isinstance(module, nn.RNNBase)
        given = {**dict(zip(("input", "hx"), visit.args, strict=False)), **visit.kwargs}
        x, initial = given["input"], given.get("hx")
        runs, states = _runs(module, x, initial)
        real = layer_outputs(module, x, states, visit.output[0])
        return [self._built(module, x, run, real[run.layer]) for run in runs]

    def _built(self, module: nn.RNNBase, x: Any, run: LayerRun, output: Tensor) -> Built:
        backward = run.direction == "backward"
        if module.bidirectional:
            output = output.chunk(2, -1)[int(backward)]
        layout = _layout(module, x)
        return Built(
            module.mode.split("_")[0].lower(), run.system, run.values,
            lambda y: layout(run.readout(y)), output, layer=run.layer,
            suffix=f"l{run.layer}{'_reverse' if backward else ''}",
            attrs={"mode": "exact_along_trajectory", "direction": run.direction},
        )  # fmt: skip


def _runs(module: nn.RNNBase, x: Any, initial: Any) -> tuple[list[LayerRun], tuple | None]:
    """The runs of a module, and its initial states in the order of the batch it works in."""
    if isinstance(module, nn.LSTM):
        return lstm.recurrences_of(module, x, initial), initial
    states = None if initial is None else (initial,)
    if isinstance(module, nn.GRU):
        return gru.recurrences_of(module, x, initial), states
    if isinstance(module, nn.RNN):
        return rnn.recurrences_of(module, x, initial), states
    raise DsfTypeError(f"dsf.from_layer: module: expected LSTM, GRU or RNN, got {module.mode}.")


def _layout(module: nn.RNNBase, x: Any) -> Callable[[Tensor], Tensor]:
    """From (batch, time, unit) to the order of axes in which the module returns its output."""
    if isinstance(x, PackedSequence) or (x.ndim == 3 and module.batch_first):
        return lambda y: y
    return (lambda y: y.squeeze(0)) if x.ndim == 2 else (lambda y: y.transpose(0, 1))


def layer_outputs(module: nn.RNNBase, x: Any, initial: tuple | None, output: Any) -> list[Tensor]:
    """What each layer gave out, both directions side by side; `output` is the last one's."""
    outputs = []
    for layer in range(module.num_layers):
        if layer == module.num_layers - 1:
            outputs.append(_padded(output))
            break
        x = _single(module, layer, x.size(-1) if isinstance(x, Tensor) else x.data.size(-1))(
            x, _part(module, layer, initial)
        )[0]
        outputs.append(_padded(x))
    return outputs


def _padded(x: Any) -> Tensor:
    return pad_packed_sequence(x, batch_first=True)[0] if isinstance(x, PackedSequence) else x


def _part(module: nn.RNNBase, layer: int, initial: tuple | None) -> Any:
    if initial is None:
        return None
    n = 2 if module.bidirectional else 1
    parts = tuple(s[layer * n : (layer + 1) * n] for s in initial)
    return parts if isinstance(module, nn.LSTM) else parts[0]


def _single(module: nn.RNNBase, layer: int, width: int) -> nn.RNNBase:
    """One layer of a stack as a module of its own, on the same parameters."""
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, k))
    options: dict[str, Any] = {"nonlinearity": module.nonlinearity} if kind is nn.RNN else {}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    with torch.device("meta"):
        single = kind(
            width, module.hidden_size, bias=module.bias, batch_first=module.batch_first,
            bidirectional=module.bidirectional, **options,
        )  # fmt: skip
    for name, _ in list(single.named_parameters()):
        setattr(single, name, getattr(module, name.replace("_l0", f"_l{layer}")))
    return single.train(module.training)


class RecurrentCells(Adapter):
    """One call of a cell: a system of one step from the state that it was given.

    A cell in a loop gives a trace for each call, numbered by visit. Outputs are h', (batch, unit)
    or (unit,), also of an LSTMCell, whose c' is the scan's last state.
    """

    name = "torch_rnn.cells"
    systems = ("lstm", "gru", "rnn")
    scope = "along trajectory"
    covers = ("torch.nn.LSTMCell, torch.nn.GRUCell, torch.nn.RNNCell (each call)",)
    classes = frozenset(f"torch.nn.modules.rnn:{c}" for c in ("LSTMCell", "GRUCell", "RNNCell"))
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """The cell as a layer on a sequence of one."""
        cell = visit.module
        assert isinstance(cell, nn.RNNCellBase)
        given = {**dict(zip(("input", "hx"), visit.args, strict=False)), **visit.kwargs}
        x, initial = given["input"], given.get("hx")
        batched = x.ndim == 2
        states: tuple = initial if isinstance(initial, tuple) else (initial,)

        def stacked(state: Tensor) -> Tensor:  # (layer, batch, unit)
            return state[None] if batched else state[None, None]

        start = None if initial is None else tuple(stacked(s) for s in states)
        layer = _as_layer(cell)
        start = start if start is None or isinstance(layer, nn.LSTM) else start[0]
        (run,), _ = _runs(layer, x[:, None] if batched else x[None, None], start)
        return [Built(
            layer.mode.split("_")[0].lower(), run.system, run.values,
            lambda y: run.readout(y)[:, 0] if batched else run.readout(y)[0, 0],
            first_tensor(visit.output), attrs={"mode": "exact_along_trajectory"},
        )]  # fmt: skip


def _as_layer(cell: nn.RNNCellBase) -> nn.RNNBase:
    """A layer of one direction on the cell's parameters."""
    kinds = {"LSTMCell": nn.LSTM, "GRUCell": nn.GRU, "RNNCell": nn.RNN}
    kind = next(kinds[c.__name__] for c in type(cell).__mro__ if c.__name__ in kinds)
    options = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
    with torch.device("meta"):
        layer = kind(cell.input_size, cell.hidden_size, bias=cell.bias, batch_first=True,
                     **options)  # fmt: skip
    for name, _ in list(layer.named_parameters()):
        setattr(layer, name, getattr(cell, name.removesuffix("_l0")))
    return layer.eval()


ADAPTERS = [RecurrentLayers, RecurrentCells]
