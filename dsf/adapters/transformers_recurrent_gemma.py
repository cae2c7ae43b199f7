"""transformers: RecurrentGemma's RG-LRU, tapped at its scan method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters.transformers_mamba import require_transformers
from dsf.errors import DsfUnsupportedError
from dsf.recurrence import Recurrence
from dsf.transitions import Diagonal

_FILE = "transformers.models.recurrent_gemma.modeling_recurrent_gemma"
_METHOD = "_rnn_scan"
_STATES = ("recurrent_states", "conv1d_state")


class RecurrentGemma(Adapter):
    """The recurrent block, or its RG-LRU alone: h_t = a_t h_{t-1} + x_t, a_t = 0 at a reset.

    The state lives on the modules, where the block clears it; it is put back after each pass.
    """

    name = "transformers_recurrent_gemma"
    covers = ("transformers: RecurrentGemma's recurrent block and its RG-LRU",)
    classes = frozenset({f"{_FILE}:RecurrentGemmaRecurrentBlock", f"{_FILE}:RecurrentGemmaRglru"})

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Set the method on each instance, and take it off again."""
        require_transformers(self.name)
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(_states_kept(module))
                unit = _unit(module)
                original = getattr(unit, _METHOD)
                stack.enter_context(
                    _method(unit, _recording(module, original, record)))  # fmt: skip
            yield

    def build(self, visit: Visit) -> list[Built]:
        """From a_t, x_t, resets as they enter the scan; values (batch, time, channel, 1)."""
        if len(visit.taps) != 1:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of {_METHOD}, got {len(visit.taps)}."
            )
        given = visit.taps[0].kwargs
        x, decay = given["hidden_states"], given["recurrent_gate"]
        start = given["recurrent_states"]
        one = torch.ones(1, 1, 1, 1, 1, dtype=x.dtype, device=x.device)
        # The root sqrt(1 - a^2) and the input gate are in x already. They are not computed again:
        # the layer loses digits of 1 - a^2 in float32, and the trace is of the layer as it is.
        recurrence = Recurrence(
            Diagonal.from_decay((decay * ~given["reset"])[..., None]), one, one,
            initial_state=None if start is None else start.to(x.dtype)[..., None, None],
            system="rglru",
        )  # fmt: skip

        def readout(y: Tensor) -> Tensor:
            def giving(**kwargs: Any) -> tuple[Tensor, Tensor]:
                return result(y), result(y)[:, -1]

            with _states_kept(visit.module), _method(_unit(visit.module), giving):
                return first_tensor(visit.module.forward(*visit.args, **visit.kwargs))

        def result(y: Tensor) -> Tensor:
            return y.squeeze(-1)

        return [Built(
            "rglru", recurrence, x[..., None], readout, first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=result,
        )]  # fmt: skip


def _unit(module: nn.Module) -> nn.Module:
    return getattr(module, "rg_lru", module)


def _recording(module: nn.Module, original: Callable, record: Callable) -> Callable:
    def tapped(**kwargs: Any) -> Any:
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in kwargs.items()}
        result = original(**kwargs)
        record(module, TappedCall(_METHOD, (), kept, result, "torch"))
        return result

    return tapped


@contextlib.contextmanager
def _method(unit: nn.Module, function: Callable) -> Iterator[None]:
    before = unit.__dict__.get(_METHOD)
    unit.__dict__[_METHOD] = function
    try:
        yield
    finally:
        if before is None:
            del unit.__dict__[_METHOD]
        else:
            unit.__dict__[_METHOD] = before


@contextlib.contextmanager
def _states_kept(module: nn.Module) -> Iterator[None]:
    held = [
        (part, name, part.__dict__[name])
        for part in module.modules() for name in _STATES if name in part.__dict__
    ]  # fmt: skip
    copies = [v.clone() if isinstance(v, torch.Tensor) else v for _, _, v in held]
    try:
        yield
    finally:
        for (part, name, value), copy in zip(held, copies, strict=True):
            if isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(copy)
            part.__dict__[name] = value


ADAPTERS = [RecurrentGemma]
