"""How many numbers does a head keep between two tokens?"""

from __future__ import annotations

import torch
import xarray as xr

from dsf.axes import to_xarray
from dsf.errors import DsfTypeError
from dsf.factors import SoftmaxRows
from dsf.maps import system_attrs
from dsf.measures._maps import precision_of
from dsf.recurrence import Recurrence
from dsf.wrappers import Anticausal, Bidirectional, Gated, System, core

__all__ = ["n_state"]


def n_state(
    system: System, values: torch.Tensor | None = None, *, channels: int | None = None
) -> xr.DataArray:
    """The state of one head as stored numbers: states times value channels.

    A complex state counts as two numbers, a bidirectional system as two states. For softmax
    attention the state is the value cache, length x channels; the keys it also has to keep
    (shared by a group of heads) make the map, not the state, and stand in attrs `n_scheduler`.

    Parameters
    ----------
    system: a dsf system.
    values: the values it is driven by, for the number of channels (last axis).
    channels: that number itself; by default that of `values`, of a gate or of the initial state,
        else 1, as attrs `channels` says.

    Returns (head,), a count. Raises DsfTypeError unless a system is given: a map has no state.
    """
    if not isinstance(system, Recurrence | Anticausal | Bidirectional | Gated):
        raise DsfTypeError(
            f"dsf.n_state: system: expected a dsf system, got {type(system)}; a bare map has no "
            f"state, see dsf.measures.epsilon_rank for the states it needs."
        )
    r = core(system)
    width = channels or _channels(system, values)
    inner = system.system if isinstance(system, Gated) else system
    parts = [r] if not isinstance(inner, Bidirectional) else [r, inner.anticausal.recurrence]
    shared = isinstance(inner, Bidirectional) and parts[0].C is parts[1].C and isinstance(
        r.C, SoftmaxRows)  # fmt: skip
    parts = parts[:1] if shared else parts  # one cache serves both directions
    count = sum(p.n_state * (2 if p.dtype.is_complex else 1) for p in parts)
    scheduler = r.C.key.shape[1] * r.C.key.shape[3] if isinstance(r.C, SoftmaxRows) else 0
    return to_xarray(
        torch.full((r.n_head,), count * width, dtype=torch.int64), ("head",), name="n_state",
        attrs={**system_attrs(system), "channels": width, "n_scheduler": scheduler,
               "precision": precision_of(r), "units": "1",
               "long_name": "stored numbers of one head", "method": "states x channels"},
    )  # fmt: skip


def _channels(system: System, values: torch.Tensor | None) -> int:
    if values is not None:
        return int(values.shape[-1])
    gate = system.gate.shape[-1] if isinstance(system, Gated) else 1
    h0 = core(system).initial_state
    return max(gate, h0.shape[-1] if h0 is not None else 1)


MEASURES = (n_state,)
