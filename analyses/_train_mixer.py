"""A mixer whose scan runs in a kernel of dsf_kernels or in torch: what all families share."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.wrappers import System

EPS = 1e-6


@dataclasses.dataclass
class Path:
    """How all scans of one model run: in a kernel or in torch, on numbers of which type.

    noise: every output of a scan, and so its gradient, times 1 + noise x, x uniform in (-1, 1).
    auto: what `dsf.scan` would take, filled in by the first torch scan.
    """

    kernel: bool
    dtype: torch.dtype
    noise: float = 0.0
    auto: str = ""


class Mixer(nn.Module, abc.ABC):
    """W_out norm(scan of W_in x): subclasses say which columns W_in has and which scan it is."""

    kernel_name: ClassVar[str]
    causal: ClassVar[bool] = True
    wide: ClassVar[tuple[str, ...]] = ()
    """Arguments that stay in float32 where the others are rounded to the type of the kernels."""

    def __init__(self, width: int, n_head: int, path: Path) -> None:
        super().__init__()
        self.width, self.n_head, self.path = width, n_head, path
        self.sizes = self.columns()
        self.project = nn.Linear(width, sum(self.sizes.values()))
        self.out = nn.Linear(width, width)

    def columns(self) -> dict[str, int]:
        """Columns of W_in by name."""
        return dict.fromkeys(("query", "key", "value"), self.width)

    def arguments(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the scan takes, from the columns, in float32; shared by both paths."""
        return {name: self.heads(x) for name, x in parts.items()}

    def run_kernel(self, **arguments: Any) -> Tensor:
        """The scan by the kernel: outputs, (batch, time, ...)."""
        import dsf_kernels

        found = getattr(dsf_kernels, self.kernel_name)(**arguments, **self.options())
        return found[0] if isinstance(found, tuple) else found

    def options(self) -> dict[str, Any]:
        """Arguments of the kernel that are not tensors."""
        return {}

    @abc.abstractmethod
    def run_torch(self, **arguments: Any) -> Tensor:
        """The same by the torch path of dsf."""

    def scan(self, system: System, values: Tensor) -> Tensor:
        """The system on its values in torch."""
        if not self.path.auto:
            self.path.auto = dsf.which_backend(system, values)
        return dsf.scan(system, values, "chunked", allow_nonfinite=True)

    def heads(self, x: Tensor) -> Tensor:
        """(batch, time, head, channel)."""
        return x.unflatten(-1, (self.n_head, -1))

    def forward(self, x: Tensor) -> Tensor:
        columns = self.project(x).split(list(self.sizes.values()), -1)
        arguments = self.arguments(dict(zip(self.sizes, columns, strict=True)))
        dtype = self.path.dtype
        given = {k: v if k in self.wide else v.to(dtype) for k, v in arguments.items()}
        if self.path.kernel:
            y = self.run_kernel(**given).float()
        else:
            y = self.run_torch(**{k: v.float() for k, v in given.items()}).to(dtype).float()
        if self.path.noise:
            y = y * (1 + self.path.noise * (2 * torch.rand_like(y) - 1))
        y = y if y.ndim == 3 else y.flatten(2)
        return self.out(functional.layer_norm(y, (self.width,), eps=EPS))
