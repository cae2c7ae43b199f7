"""transformers: Mamba (S6) and Mamba-2 (SSD) mixers, tapped at their scan function."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.adapters._contract import (
    Adapter,
    Built,
    TappedCall,
    Visit,
    first_tensor,
    known_class,
)
from dsf.adapters._session import replaced
from dsf.errors import DsfUnsupportedError
from dsf.memory import require_memory
from dsf.models.mamba import mamba_recurrence
from dsf.models.mamba2 import mamba2_recurrence

OLDEST = (5, 15)


def _classes(table: dict[str, str]) -> frozenset[str]:
    return frozenset(f"transformers.models.{f}.modeling_{f}:{c}" for f, c in table.items())


class _ScanFunction(Adapter):
    """Base: one function of the modelling file holds the whole recurrence."""

    function: ClassVar[str] = ""
    parameters: ClassVar[dict[str, Any]] = {}
    """The function's parameters in order, with their defaults."""

    def namespace(self, module: nn.Module) -> dict[str, Any]:
        """The names of the modelling file that defines the layer."""
        name = known_class(module, self.classes)
        assert name is not None
        return sys.modules[name.partition(":")[0]].__dict__

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """Replace the function by its name, whatever its type, and record around it."""
        require_transformers(self.name)
        with contextlib.ExitStack() as stack:
            for space in {id(n): n for n in map(self.namespace, modules)}.values():
                original = space.get(self.function)
                if original is None:
                    raise DsfUnsupportedError(
                        f"dsf.trace: {self.name}: expected {space['__name__']} to have a function "
                        f"{self.function!r}, got none. Install a transformers release that this "
                        f"adapter knows ({OLDEST[0]}.{OLDEST[1]} or newer)."
                    )

                tapped = _recording(self.function, original, record)
                stack.enter_context(replaced(space, self.function, tapped))
            yield

    def arguments(self, visit: Visit) -> dict[str, Any]:
        """The arguments of the one recorded call, by name."""
        if len(visit.taps) > 1:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: expected one call of {self.function}, got "
                f"{len(visit.taps)}. The layer scans several parts; write an adapter for it."
            )
        (call,) = visit.taps
        return self.named(call.args, call.kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """By name, whatever implementation was called (a kernel's signature may say nothing)."""
        return {**self.parameters, **dict(zip(self.parameters, args, strict=False)), **kwargs}

    def readout(self, visit: Visit, result: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """The layer run again with its scan returning `result(y, arguments)`: its own gates."""
        space, module = self.namespace(visit.module), visit.module

        def readout(y: Tensor) -> Tensor:
            def giving(*args: Any, **kwargs: Any) -> Tensor:
                return result(y, self.named(args, kwargs))

            with replaced(space, self.function, giving):
                return first_tensor(module.forward(*visit.args, **visit.kwargs))

        return readout


class Mamba(_ScanFunction):
    """S6: every channel a head; the gate z is applied inside the tapped function."""

    name = "transformers_mamba"
    function = "mamba_selective_scan"
    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "dt": None, "A": None, "B": None, "C": None, "D": None, "z": None,
        "delta_bias": None, "delta_softplus": False,
    }  # fmt: skip
    covers = ("transformers: Mamba, FalconMamba and Jamba mixers",)
    classes = _classes(
        {"mamba": "MambaMixer", "falcon_mamba": "FalconMambaMixer", "jamba": "JambaMambaMixer"}
    )

    def build(self, visit: Visit) -> list[Built]:
        """From u, dt, A, B, C, D, z as they enter the scan; values (batch, time, channel, 1)."""
        a = self.arguments(visit)
        u = a["hidden_states"]
        dtype = u.dtype
        require_memory(
            "dsf.trace", f"{visit.path}: decays and B",
            ("field", "batch", "time", "head", "state"),
            (2, u.shape[0], u.shape[2], *a["A"].shape), dtype, device=u.device,
            advice="Trace fewer layers at a time (layers=[...]) or a shorter sequence.",
        )  # fmt: skip
        recurrence = mamba_recurrence(
            a["dt"].transpose(1, 2).to(dtype), a["A"].to(dtype), a["B"].transpose(1, 2).to(dtype),
            a["C"].transpose(1, 2).to(dtype), _cast(a["D"], dtype),
            step_bias=_cast(a["delta_bias"], dtype), softplus=bool(a["delta_softplus"]),
        )  # fmt: skip

        def result(y: Tensor, given: dict[str, Any]) -> Tensor:
            scanned = y.squeeze(-1).transpose(1, 2)
            return scanned if given["z"] is None else scanned * functional.silu(given["z"])

        return [Built(
            "mamba", recurrence, u.transpose(1, 2)[..., None], self.readout(visit, result),
            first_tensor(visit.output), tapped=first_tensor(visit.taps[0].result),
            to_tapped=lambda y: result(y, a),
        )]  # fmt: skip


class Mamba2(_ScanFunction):
    """SSD: one decay per head; gate, norm and projection come after the tapped function."""

    name = "transformers_mamba2"
    function = "mamba2_chunk_scan"
    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "dt": None, "A": None, "B": None, "C": None, "chunk_size": None,
        "D": None, "dt_bias": None, "initial_states": None, "dt_softplus": False,
        "dt_limit": (0.0, math.inf), "z": None,
    }  # fmt: skip
    covers = (
        "transformers: Mamba2, Bamba, FalconH1, GraniteMoeHybrid, Zamba2 and NemotronH mixers",
    )
    classes = _classes({
        "mamba2": "Mamba2Mixer", "bamba": "BambaMixer", "falcon_h1": "FalconH1Mixer",
        "granitemoehybrid": "GraniteMoeHybridMambaLayer", "zamba2": "Zamba2MambaMixer",
        "nemotron_h": "NemotronHMamba2Mixer",
    })  # fmt: skip

    def build(self, visit: Visit) -> list[Built]:
        """From u, dt, A, B, C, D and the limits as given to the scan, not to the config."""
        a = self.arguments(visit)
        u = a["hidden_states"]
        dtype = u.dtype
        if a["z"] is not None:
            raise DsfUnsupportedError(
                f"dsf.trace: {visit.path}: z: expected None inside {self.function}, got a gate."
            )
        start = a["initial_states"]
        recurrence = mamba2_recurrence(
            a["dt"].to(dtype), a["A"].to(dtype), a["B"].to(dtype), a["C"].to(dtype),
            _cast(a["D"], dtype), step_bias=_cast(a["dt_bias"], dtype),
            softplus=bool(a["dt_softplus"]), limits=tuple(map(float, a["dt_limit"])),  # type: ignore[arg-type]
            initial_state=None if start is None else start.to(dtype).transpose(2, 3),
        )  # fmt: skip

        def result(y: Tensor, given: object = None) -> Tensor:
            return y.contiguous()  # FalconH1 calls .view on it

        return [Built(
            "mamba2", recurrence, u, self.readout(visit, result), first_tensor(visit.output),
            tapped=first_tensor(visit.taps[0].result), to_tapped=result,
        )]  # fmt: skip


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _recording(function: str, original: Callable, record: Callable) -> Callable:
    def tapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        record(None, TappedCall(function, args, kwargs, result, implementation_of(original)))
        return result

    tapped.inner = original  # type: ignore[attr-defined]
    return tapped


def implementation_of(function: Any) -> str:
    """Where the function that really runs comes from: torch code, a package or a hub kernel."""
    function = getattr(function, "inner", function)  # a tap around a tap
    if isinstance(function, nn.Module):
        return f"kernel {type(function).__name__}"
    if not inspect.isfunction(function):
        return type(function).__name__
    inner = inspect.getclosurevars(function).nonlocals.get("implementation", function)
    module = getattr(inner, "__module__", "unknown") or "unknown"
    return "torch" if module.startswith("transformers.") else module


def require_transformers(adapter: str) -> None:
    """Refuse releases whose recurrent layers do not have the function yet."""
    version = sys.modules["transformers"].__version__
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        raise DsfUnsupportedError(
            f"dsf.trace: {adapter}: expected transformers >= {OLDEST[0]}.{OLDEST[1]}, got "
            f"{version}. Before that release a recurrent layer's scan was inline in its forward, "
            f"where nothing can be read. Upgrade transformers."
        )


ADAPTERS = [Mamba, Mamba2]
