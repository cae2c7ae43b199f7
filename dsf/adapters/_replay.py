"""Where a trace came from, and one more run of its layer on arguments of the caller's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsf.adapters._contract import Adapter, Built, Visit
from dsf.adapters._session import Session, quiet


@dataclasses.dataclass(frozen=True)
class Source:
    """The pass that a trace was made of: enough to run its layer, or the whole model, again.

    `part` is the place of the trace among what its layer was built into, `visit_number` counts
    the layer's runs in the pass from 1.
    """

    model: nn.Module
    call: Callable[[], Any]
    adapter: Adapter
    visit: Visit
    part: int
    visit_number: int
    float64: bool

    def rebuilt(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Built]:
        """The layer run on other arguments and built again, on the autograd graph of these."""
        session = Session(gradients=True)
        module = self.visit.module
        # copies, since a layer may change its input in place
        args, kwargs = pytree.tree_map(_copied, (args, dict(kwargs)))
        visit = Visit(self.visit.path, module, args, dict(kwargs))
        with (
            quiet(module, float64=self.float64, inner=session),
            self.adapter.tap([module], session.record),
            torch.enable_grad(),
        ):
            session._stack.append(visit)
            visit.output = module.forward(*args, **kwargs)
        with quiet(module, float64=self.float64), torch.enable_grad():
            return self.adapter.build(visit)


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
