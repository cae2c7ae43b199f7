"""From projected queries, keys, values and whatever mask a library made to a dsf system."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsf.errors import DsfUnsupportedError
from dsf.factors import OneHot, SoftmaxRows
from dsf.models.softmax_attention import SYSTEM, softmax_attention_recurrence
from dsf.transitions import Identity
from dsf.wrappers import Anticausal, Bidirectional, System, core

__all__ = ["SYSTEM", "attention_system"]


def attention_system(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[System, Tensor]:
    """Softmax attention as a system, and its values (batch, time, head, channel).

    query (batch, time, head, width), key (batch, time, group, width), value (batch, time, group,
    channel). mask broadcasts to (batch, head, query, key): True for seen keys, or numbers to add,
    where -inf and the dtype's least number hide a key. A row without any key gives zero under a
    boolean or -inf mask and equal weights under the least number, as softmax does. bias is added
    on top. `extra` (keys, values), each (1, slot, head, width): slots that are no tokens (torch's
    bias_k, bias_v), see `_with_slots`.

    A map with nothing above the diagonal gives a causal Recurrence, any other a Bidirectional.
    Raises DsfUnsupportedError when keys and queries differ in number.
    """
    length = query.shape[1]
    if key.shape[1] != length:
        raise DsfUnsupportedError(
            f"dsf.from_layer: cross-attention: expected as many keys as queries, got "
            f"{key.shape[1]} keys and {length} queries. A recurrence has one axis of time, on "
            f"which values enter and outputs leave. Give inputs of equal length, or leave this "
            f"layer out by naming the others in layers=[...]."
        )
    mask = _expanded(mask, length)
    visible, added = _split(mask, causal)
    ahead = not causal if visible is None else bool(visible.triu(1).any())
    added = bias if added is None else added if bias is None else added + bias
    options: dict = {"causal": not ahead}
    if visible is not None:
        pattern = _pattern(visible, ahead) if added is None and extra is None else None
        if pattern is None:
            added = _hidden(visible, added, query)
        else:
            options = {**options, **pattern}
    if extra is not None and ahead is False and visible is None:
        lower = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        added = _hidden(lower[None, None], added, query)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"].expand(query.shape[0], length)
    system = softmax_attention_recurrence(
        query, key, bias=added, scale=scale, softcap=softcap, sink=sink, **options)  # fmt: skip
    heads = query.shape[2]
    if value.shape[2] not in (1, heads):
        value = value.repeat_interleave(heads // value.shape[2], 2)
    return system if extra is None else _with_slots(system, *extra), value


def _with_slots(system: System, keys: Tensor, values: Tensor) -> System:
    """Slots behind the cache that hold a value from the start and that every query sees.

    The cache's own slots keep their numbers, so columns of the map remain tokens; what the extra
    slots add comes in through the initial state.
    """
    r = core(system)
    rows = r.C
    assert isinstance(rows, SoftmaxRows)
    length, slots, batch = rows.n_key, keys.shape[1], rows.key.shape[0]
    bias = rows.bias
    if bias is not None:
        bias = bias.expand(*bias.shape[:-1], length)
        bias = torch.nn.functional.pad(bias, (0, slots))
    rows = dataclasses.replace(
        rows, key=torch.cat([rows.key, keys.expand(batch, -1, -1, -1)], 1), bias=bias,
        causal=False,
    )  # fmt: skip
    held = values.expand(batch, -1, -1, -1).transpose(1, 2)
    r = r.replace(
        A=Identity(length + slots), B=OneHot(length, length + slots), C=rows,
        initial_state=torch.nn.functional.pad(held, (0, 0, length, 0)),
    )  # fmt: skip
    if not isinstance(system, Bidirectional):
        return r
    return Bidirectional(r, Anticausal(r.replace(initial_state=None), strict=True))


def _expanded(mask: Tensor | None, length: int) -> Tensor | None:
    return None if mask is None else mask.expand(*mask.shape[:2], length, length)


def _split(mask: Tensor | None, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """(which keys are seen, numbers to add) out of a boolean or additive mask."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        return (mask.tril() if causal else mask), None
    least = torch.finfo(mask.dtype).min
    visible = mask > least
    visible = visible.tril() if causal else visible
    # a row of the least number throughout is an even softmax over all keys: nothing is hidden
    even = ~visible.any(-1, keepdim=True) & (mask >= least).any(-1, keepdim=True)
    plain = not bool(((mask != 0) & visible).any()) and not bool(even.any())
    return visible | even, None if plain else mask


def _pattern(visible: Tensor, ahead: bool) -> dict | None:
    """`window` and `key_mask` that say the same as a boolean mask, if any do."""
    if visible.shape[1] != 1:
        return None
    seen = visible[:, 0]
    length = seen.shape[-1]
    position = torch.arange(length, device=seen.device)
    lag = position[:, None] - position
    allowed = torch.ones_like(lag, dtype=torch.bool) if ahead else lag >= 0
    furthest = int(lag.abs()[seen.any(0)].max()) if bool(seen.any()) else 0
    window = furthest + 1 if furthest + 1 < length else None
    if window is not None:
        allowed = allowed & (lag.abs() < window)
    keys = seen.any(-2)
    if not torch.equal(seen, allowed & keys[:, None]):
        return None
    return {"window": window} if bool(keys.all()) else {"window": window, "key_mask": keys}


def _hidden(visible: Tensor, added: Tensor | None, query: Tensor) -> Tensor:
    """One additive bias: -inf where nothing is seen, the given numbers elsewhere."""
    if added is None:
        added = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(visible, added, -math.inf).to(query.dtype)
