"""Mamba (S6) and Mamba-2 (SSD) from the arguments of their scan functions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import ScanFunction, refuse_packed
from dsf.memory import require_memory
from dsf.models.mamba import mamba_recurrence
from dsf.models.mamba2 import mamba2_recurrence


class SelectiveScan(ScanFunction):
    """Base, S6: every channel a head; the gate z is applied inside the tapped function.

    A layer that scans its channels in several calls, each with B and C of its own (Zamba), is one
    system with as many groups.
    """

    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "dt": None, "A": None, "B": None, "C": None, "D": None, "z": None,
        "delta_bias": None, "delta_softplus": False,
    }  # fmt: skip

    def build(self, visit: Visit) -> list[Built]:
        """From u, dt, A, B, C, D, z as they enter the scan; values (batch, time, channel, 1)."""
        calls = [call.kwargs for call in visit.taps]
        refuse_packed(visit, calls[0])
        u = torch.cat([a["hidden_states"] for a in calls], 1).transpose(1, 2)
        dtype = u.dtype
        n_state = calls[0]["A"].shape[1]
        require_memory(
            "dsf.trace", f"{visit.path}: decays and B",
            ("field", "batch", "time", "head", "state"), (2, *u.shape, n_state), dtype,
            device=u.device,
            advice="Trace fewer layers at a time (layers=[...]) or a shorter sequence.",
        )  # fmt: skip

        def joined(name: str, dim: int) -> Tensor | None:
            parts = [a[name] for a in calls]
            return None if parts[0] is None else torch.cat(parts, dim).to(dtype)

        def by_group(name: str) -> Tensor:
            b = torch.stack([a[name] for a in calls], 2)  # (batch, state, call, time)
            return b.permute(0, 3, 2, 1).to(dtype)

        recurrence = mamba_recurrence(
            torch.cat([a["dt"] for a in calls], 1).transpose(1, 2).to(dtype),
            torch.cat([a["A"] for a in calls]).to(dtype), by_group("B"), by_group("C"),
            joined("D", 0), step_bias=joined("delta_bias", 0),
            softplus=bool(calls[0]["delta_softplus"]),
        )  # fmt: skip
        width = u.shape[2] // len(calls)

        def result(y: Tensor, given: dict[str, Any], number: int) -> Tensor:
            own = y[:, :, number * width : (number + 1) * width]
            scanned = own.squeeze(-1).transpose(1, 2)
            return scanned if given["z"] is None else scanned * functional.silu(given["z"])

        def to_tapped(y: Tensor) -> Tensor:
            return torch.cat([result(y, a, i) for i, a in enumerate(calls)], 1)

        return [Built(
            "mamba", recurrence, u[..., None], self.readout(visit, result),
            first_tensor(visit.output), to_tapped=to_tapped,
            tapped=torch.cat([first_tensor(call.result) for call in visit.taps], 1),
        )]  # fmt: skip


class ChunkScan(ScanFunction):
    """Base, SSD: one decay per head; norm and projection come after the tapped function.

    The gate does too, but for layers without a norm, which hand it to the function as z.
    """

    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "dt": None, "A": None, "B": None, "C": None, "chunk_size": None,
        "D": None, "dt_bias": None, "initial_states": None, "dt_softplus": False,
        "dt_limit": (0.0, math.inf), "z": None,
    }  # fmt: skip

    def build(self, visit: Visit) -> list[Built]:
        """From u, dt, A, B, C, D and the limits as given to the scan, not to the config."""
        a = self.arguments(visit)
        refuse_packed(visit, a)
        u = a["hidden_states"]
        dtype = u.dtype
        start = a["initial_states"]
        recurrence = mamba2_recurrence(
            a["dt"].to(dtype), a["A"].to(dtype), a["B"].to(dtype), a["C"].to(dtype),
            _cast(a["D"], dtype), step_bias=_cast(a["dt_bias"], dtype),
            softplus=bool(a["dt_softplus"]), limits=tuple(map(float, a["dt_limit"])),  # type: ignore[arg-type]
            initial_state=None if start is None else start.to(dtype).transpose(2, 3),
        )  # fmt: skip

        def result(y: Tensor, *_: Any) -> Tensor:
            y = y if a["z"] is None else y * functional.silu(a["z"])
            return y.contiguous()  # FalconH1 calls .view on it

        return [Built(
            "mamba2", recurrence, u, self.readout(visit, result), first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=result,
        )]  # fmt: skip


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
