"""transformers: RecurrentGemma's RG-LRU, tapped at its scan method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import Place, TappedLayer, method_of, transformers_classes
from dsf.recurrence import Recurrence
from dsf.transitions import Diagonal

_STATES = ("recurrent_states", "conv1d_state")


class RecurrentGemma(TappedLayer):
    """The recurrent block, or its RG-LRU alone: h_t = a_t h_{t-1} + x_t, a_t = 0 at a reset.

    The state lives on the modules, where the block clears it; it is put back after each pass.
    """

    name = "transformers_recurrent_gemma"
    systems = ("rglru",)
    tapped = "the scan method of the RG-LRU"
    covers = ("transformers: RecurrentGemma's recurrent block and its RG-LRU",)
    classes = transformers_classes(
        {"recurrent_gemma": "RecurrentGemmaRecurrentBlock RecurrentGemmaRglru"}
    )

    def places(self, module: nn.Module) -> list[Place]:
        """The scan method of the RG-LRU."""
        return [method_of(getattr(module, "rg_lru", module), "_rnn_scan")]

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Record the method, and put back the states that the pass changes."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(_states_kept(module))
            stack.enter_context(super().tap(modules, record))
            yield

    def build(self, visit: Visit) -> list[Built]:
        """From a_t, x_t, resets as they enter the scan; values (batch, time, channel, 1)."""
        given = self.arguments(visit)
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

        def result(y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            return y.squeeze(-1), y[:, -1].squeeze(-1)

        rest = self.readout(visit, result)

        def readout(y: Tensor) -> Tensor:
            with _states_kept(visit.module):
                return rest(y)

        return [Built(
            "rglru", recurrence, x[..., None], readout, first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=lambda y: y.squeeze(-1),
        )]  # fmt: skip


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
