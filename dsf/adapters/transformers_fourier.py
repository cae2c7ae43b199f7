"""transformers: FNet, which mixes tokens by a Fourier transform."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsf.adapters._contract import Adapter, Built, Visit, first_tensor
from dsf.adapters._tapped import transformers_classes
from dsf.factors import ExplicitRows
from dsf.memory import require_memory
from dsf.models._cached import cache_recurrence
from dsf.wrappers import Bidirectional

SYSTEM = "fourier_mixing"


class Fourier(Adapter):
    """The real part of a transform over tokens and features, two heads of constant rows.

        y_t = sum_j cos(2 pi t j / L) (x_j C) - sin(2 pi t j / L) (x_j S),
        C_dc = cos(2 pi d c / D),   S_dc = sin(2 pi d c / D)

    t, j from 0; L tokens, D features. Not causal, and padding is mixed in as any token is.
    """

    name = "transformers_fourier"
    system = SYSTEM
    structure = "I (one state per token)"
    covers = ("transformers: the Fourier transform of FNet",)
    classes = transformers_classes({"fnet": "FNetBasicFourierTransform"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        """From the input alone; values (batch, time, head=2, feature)."""
        x: Any = visit.args[0] if visit.args else visit.kwargs["hidden_states"]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        features = torch.fft.fft(wide, dim=-1)
        values = torch.stack([features.real, -features.imag], 2)
        rows = ExplicitRows(_rows(x.shape[1], wide), causal=False)
        r = cache_recurrence(SYSTEM, rows)

        def readout(y: Tensor) -> Tensor:
            return y.sum(2).to(x.dtype)

        return [Built(SYSTEM, Bidirectional.from_rows(r), values, readout,
                      first_tensor(visit.output))]  # fmt: skip


def _rows(length: int, like: Tensor) -> Tensor:
    """(1, head, query, key): cosines and minus sines, their angles below a turn."""
    require_memory(
        "dsf.trace", "attention map", ("head", "query", "key"), (2, length, length), like.dtype,
        device=like.device, advice="Trace a shorter sequence.",
    )  # fmt: skip
    at = torch.arange(length, device=like.device)
    angle = 2 * math.pi / length * (at[:, None] * at % length).double()
    return torch.stack([angle.cos(), -angle.sin()])[None].to(like.dtype)


ADAPTERS = [Fourier]
