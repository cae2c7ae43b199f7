"""Mamba-3, in mamba_ssm and as flash-linear-attention's layer around the same kernels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsf.adapters._contract import Built, Visit, first_tensor
from dsf.adapters._tapped import Place, ScanFunction, refuse_inference_params
from dsf.adapters.flash_linear_attention import kept_tokens, laid_out
from dsf.models._heads import share_groups
from dsf.models.mamba3 import mamba3_recurrence, turned
from dsf.recurrence import Recurrence

_BY_HEAD = ("ADT", "DT", "Trap")
"""Arguments (batch, head, time)."""
_CAST = ("Q", "K", "V", "Trap", "Angles", "Z")
_MIMO = "mamba3_mimo_combined"


class Mamba3(ScanFunction):
    """One kernel turns keys and queries, scans, and gates where no norm comes before the gate.

    Several ranks (MIMO) turn pairs of halves, one rank neighbours. The kernel of one rank rounds
    what it is given to bfloat16, whatever the layer's dtype, and so does the recurrence; both
    then multiply in 16 bit, so that a layer in float32 needs a larger `tolerance`. A padding mask,
    which fla's layer takes, may have no holes: a token looks back at the one before it.
    """

    name = "mamba_ssm.mamba3"
    parameters: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z"))  # fmt: skip
    functions = ("mamba3_siso_combined", _MIMO)
    covers = ("mamba_ssm: Mamba3 (several ranks too), and flash-linear-attention's",)
    systems = ("mamba3",)
    releases = "mamba_ssm 2.3.2.post1, its kernel of one rank in Triton's interpreter"
    classes = frozenset({"mamba_ssm.modules.mamba3:Mamba3", "fla.layers.mamba3:Mamba3"})

    def places(self, module: nn.Module) -> list[Place]:
        """Those of the two kernels that are installed."""
        space = self.namespace(module)
        found = [Place(space, name, space[name]) for name in self.functions if space.get(name)]
        return found or super().places(module)

    def build(self, visit: Visit) -> list[Built]:
        """Values (batch, time, head, channel), of several ranks (batch, time, head, rank, ...)."""
        refuse_inference_params(visit)
        call = visit.taps[0]
        several, dtype = call.function == _MIMO, first_tensor(call.result).dtype
        given = _rounded(self.arguments(visit), None if several else dtype)
        kept = kept_tokens(visit, given)
        timed = {n: given[n].transpose(1, 2) for n in _BY_HEAD}
        timed |= {n: given[n] for n in ("Q", "K", "V", "Angles")}
        weights = {n: laid_out(given.get(n), None)
                   for n in ("Q_bias", "K_bias", "D", "MIMO_V")}  # fmt: skip
        on_time = {n: laid_out(x, kept) for n, x in timed.items()}
        recurrence, values = _system({**on_time, **weights}, kept, several)

        def to_tapped(y: Tensor, *_: Any) -> Tensor:
            y = y if kept is None else y[kept][None]
            return (_joined if several else _gated)(y, given).to(dtype)

        return [Built(
            "mamba3", recurrence, values, self.readout(visit, to_tapped),
            first_tensor(visit.output), tapped=first_tensor(call.result), to_tapped=to_tapped,
        )]  # fmt: skip


def _rounded(given: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """What the kernel of one rank casts to the type of its result, in that type's numbers."""
    if dtype not in (torch.bfloat16, torch.float16):
        return given
    cast = {n: given[n].to(dtype) for n in _CAST if given.get(n) is not None}
    return {**given, **cast}


def _system(a: dict[str, Any], kept: Tensor | None, several: bool) -> tuple[Recurrence, Tensor]:
    """The core of Mamba-3 from a kernel's arguments, padding reading nothing."""
    step, values = a["DT"], a["V"]
    # in float64: a sum of many angles must keep its place on the circle
    total = (math.pi * torch.tanh(a["Angles"]) * step[..., None]).to(torch.float64).cumsum(1)
    key, query = (
        turned(
            _by_head(a[name], step.shape[2], several) + _by_rank(a[f"{name}_bias"], several),
            total.to(step.dtype), "half" if several else "neighbour",
        ) for name in ("K", "Q")
    )  # fmt: skip
    if kept is not None:
        query = query * kept[..., None, None, None]
    if several:
        values = values[:, :, :, None] * a["MIMO_V"]
    r = mamba3_recurrence(a["ADT"], step, torch.sigmoid(a["Trap"]), key, query, a["D"])
    return r, values


def _by_head(x: Tensor, n_head: int, several: bool) -> Tensor:
    """(batch, time[, rank], group, state) -> (batch, time, head, rank, state)."""
    x = x.transpose(2, 3) if several else x[:, :, :, None]
    return share_groups(x.flatten(3), n_head).unflatten(-1, x.shape[3:])


def _by_rank(bias: Tensor, several: bool) -> Tensor:
    return bias if several else bias[:, None]


def _gated(y: Tensor, given: dict[str, Any]) -> Tensor:
    """What the kernel of one rank returns."""
    return y if given.get("Z") is None else y * functional.silu(given["Z"].to(y.dtype))


def _joined(y: Tensor, given: dict[str, Any]) -> Tensor:
    """What the kernel of several ranks returns: gated and summed, or rank by rank for a norm."""
    if given.get("Z") is not None:
        y = y * functional.silu(given["Z"][:, :, :, None].to(y.dtype) * given["MIMO_Z"])
    if given.get("MIMO_Out") is None:
        return y.transpose(2, 3)
    return (y * given["MIMO_Out"]).sum(3)


ADAPTERS = [Mamba3]
