"""mamba_ssm: its Mamba and Mamba-2 modules, with their fused paths off for the pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from dsf.adapters._contract import Built, Visit
from dsf.adapters._session import replaced
from dsf.adapters._state_space_scans import ChunkScan, SelectiveScan
from dsf.adapters._tapped import ScanFunction, refuse_inference_params


class _Unfused(ScanFunction):
    """One kernel for the whole layer would hide the scan: `fused` is the switch put off."""

    fused: ClassVar[str] = ""

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """The functions tapped, the fused path off."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(replaced(module.__dict__, self.fused, False))
            stack.enter_context(super().tap(modules, record))
            yield

    def readout(self, visit: Visit, result: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        """The layer run again, without its fused path."""
        rest = super().readout(visit, result)

        def readout(y: Tensor) -> Tensor:
            with replaced(visit.module.__dict__, self.fused, False):
                return rest(y)

        return readout

    def build(self, visit: Visit) -> list[Built]:
        """As for transformers' layers; a state that the layer changes in place is refused."""
        refuse_inference_params(visit)
        return super().build(visit)


class Mamba(_Unfused, SelectiveScan):
    """S6, tapped at selective_scan_fn."""

    name = "mamba_ssm"
    functions = ("selective_scan_fn",)
    fused = "use_fast_path"
    covers = ("mamba_ssm: Mamba",)
    systems = ("mamba",)
    classes = frozenset({"mamba_ssm.modules.mamba_simple:Mamba"})


class Mamba2(_Unfused, ChunkScan):
    """SSD, tapped at mamba_chunk_scan_combined."""

    name = "mamba_ssm.mamba2"
    functions = ("mamba_chunk_scan_combined",)
    fused = "use_mem_eff_path"
    parameters: ClassVar[dict[str, Any]] = {
        "hidden_states": None, "dt": None, "A": None, "B": None, "C": None, "chunk_size": None,
        "D": None, "z": None, "dt_bias": None, "initial_states": None, "seq_idx": None,
        "cu_seqlens": None, "dt_softplus": False, "dt_limit": (0.0, math.inf),
    }  # fmt: skip
    covers = ("mamba_ssm: Mamba2 and Mamba2Simple",)
    systems = ("mamba2",)
    classes = frozenset({
        "mamba_ssm.modules.mamba2:Mamba2", "mamba_ssm.modules.mamba2_simple:Mamba2Simple",
    })  # fmt: skip


ADAPTERS = [Mamba, Mamba2]
