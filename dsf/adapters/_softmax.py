"""From projected queries, keys, values and whatever mask a library made to a dsf system."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsf.cross_rows import CrossRows
from dsf.factors import OneHot, SoftmaxRows
from dsf.models.softmax_attention import SYSTEM
from dsf.recurrence import Recurrence
from dsf.transitions import Identity
from dsf.wrappers import Bidirectional, System

__all__ = ["SYSTEM", "attention_system", "cross_attrs"]


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
    past: int | None = None,
    cross: bool = False,
) -> tuple[System, Tensor]:
    """Softmax attention as a system, and its values (batch, time, head, channel).

    query (batch, query, head, width), key (batch, key, group, width), value (batch, key, group,
    channel). mask broadcasts to (batch, head, query, key): True for seen keys, or numbers to add,
    where -inf and the dtype's least number hide a key. A row without any key gives zero under a
    boolean or -inf mask and equal weights under the least number, as softmax does. bias is added
    on top. causal hides the keys behind number t from query t. `extra` (keys, values), each (1,
    slot, head, width): slots that are no tokens (torch's bias_k, bias_v) and hold their values
    from the start; they come behind the others, so that columns of the map remain tokens.

    A map with nothing above the diagonal gives a causal Recurrence, any other a Bidirectional.

    past: with a cache, how many tokens it has seen before these queries. Keys and values are those
    of all its slots; what was there before is the initial state.
    cross: keys and queries are two sequences. Time runs through the keys, which are written, then
    through the queries, which read: values are zero at the latter, outputs at the former.
    """
    heads, n_query, n_key = query.shape[2], query.shape[1], key.shape[1]
    if value.shape[2] not in (1, heads):
        value = value.repeat_interleave(heads // value.shape[2], 2)
    offset = 0 if cross else first_new_slot(past, n_query, n_key)
    rows = SoftmaxRows(query, key, bias, sink=sink, scale=scale, softcap=softcap,
                       causal=False, query_start=offset)  # fmt: skip
    rows, ahead = _masked(rows, mask, causal=causal, cross=cross, slots=extra is not None)
    held = None
    if not cross:
        value, held = split_cache(value, offset, n_query)
    if extra is not None:
        rows, held = _with_slots(rows, held, *extra)
    if cross:
        value = pad(value, (0, 0, 0, 0, 0, n_query))
        held = None if held is None else pad(held, (0, 0, n_query, 0))
    C = CrossRows.of(rows, n_key) if cross else rows
    r = Recurrence(
        Identity(C.n_key), OneHot(value.shape[1], C.n_key, offset), C, initial_state=held,
        system=SYSTEM, gauge="one state per token",
    )  # fmt: skip
    return (Bidirectional.from_rows(r) if ahead else r), value


def first_new_slot(past: int | None, n_query: int, n_key: int) -> int:
    """Where a cache that has seen `past` tokens puts the next; a window forgets its first."""
    return 0 if past is None else min(past, n_key - n_query)


def split_cache(value: Tensor, offset: int, n_query: int) -> tuple[Tensor, Tensor | None]:
    """Of the values in all slots (batch, key, head, channel): the new ones, and the state before.

    The state (batch, head, key, channel) is None where every slot is new.
    """
    n_key = value.shape[1]
    if n_key <= n_query:
        return value, None
    slot = torch.arange(n_key, device=value.device) - offset
    new = (slot >= 0) & (slot < n_query)
    held = value.masked_fill(new[:, None, None], 0).transpose(1, 2)
    return value[:, offset : offset + n_query], held


def cross_attrs(n_key: int, n_query: int) -> dict[str, Any]:
    """What a trace says of cross-attention: the block [n_key:, :n_key] of its map is the map."""
    return {"time": "keys, then queries", "n_key": n_key, "n_query": n_query}


def _masked(
    rows: SoftmaxRows, mask: Tensor | None, *, causal: bool, cross: bool, slots: bool
) -> tuple[SoftmaxRows, bool]:
    """The rows behind a mask, and whether a token is read before its value is written.

    Without further slots a mask is said by `causal`, `window` and `key_mask` where they can.
    """
    n_query, n_key, offset = rows.query.shape[1], rows.n_key, rows.query_start
    if mask is not None:
        mask = mask[..., :n_key].expand(*mask.shape[:2], n_query, n_key)
    visible, added = _split(mask, causal)
    if visible is None and causal:
        visible = torch.ones(1, 1, n_query, n_key, dtype=torch.bool, device=rows.key.device).tril()
    if visible is None:
        ahead = not cross and n_key - 1 > offset
        return dataclasses.replace(rows, causal=not ahead and not cross), ahead
    ahead = not cross and bool(visible.triu(1 + offset).any())
    options: dict = {"causal": not ahead and not cross}
    plain = added is None and rows.bias is None and not slots
    pattern = _pattern(visible, offset, ahead=ahead, cross=cross) if plain else None
    if pattern is not None:
        if "key_mask" in pattern:
            pattern["key_mask"] = pattern["key_mask"].expand(rows.query.shape[0], n_key)
        return dataclasses.replace(rows, **options, **pattern), ahead
    parts = [x for x in (added, rows.bias) if x is not None]
    total = sum(parts) if parts else rows.query.new_zeros(())
    bias = torch.where(visible, total, -math.inf).to(rows.query.dtype)
    return dataclasses.replace(rows, **options, bias=bias), ahead


def _with_slots(
    rows: SoftmaxRows, held: Tensor | None, keys: Tensor, values: Tensor
) -> tuple[SoftmaxRows, Tensor]:
    """Slots behind the tokens' that every query sees, and the state that holds their values."""
    n_token, slots, batch = rows.n_key, keys.shape[1], rows.key.shape[0]
    bias = rows.bias
    if bias is not None:
        bias = pad(bias.expand(*bias.shape[:-1], n_token), (0, slots))
    keys = torch.cat([rows.key, keys.expand(batch, -1, -1, -1)], 1)
    rows = dataclasses.replace(rows, key=keys, bias=bias, causal=False)
    start = pad(values.expand(batch, -1, -1, -1).transpose(1, 2), (0, 0, n_token, 0))
    return rows, start if held is None else start + pad(held, (0, 0, 0, slots))


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


def _pattern(visible: Tensor, offset: int, *, ahead: bool, cross: bool) -> dict | None:
    """`window` and `key_mask` that say the same as a boolean mask, if any do."""
    if visible.shape[1] != 1:
        return None
    seen = visible[:, 0]
    n_query, n_key = seen.shape[-2:]
    position = torch.arange(n_query, device=seen.device)[:, None] + offset
    lag = position - torch.arange(n_key, device=seen.device)
    allowed = torch.ones_like(lag, dtype=torch.bool) if ahead or cross else lag >= 0
    furthest = int(lag.abs()[seen.any(0)].max()) if bool(seen.any()) else 0
    window = None if cross or furthest >= int(lag.abs()[allowed].max()) else furthest + 1
    if window is not None:
        allowed = allowed & (lag.abs() < window)
    keys = seen.any(-2) | ~allowed.any(-2)
    if not torch.equal(seen, allowed & keys[:, None]):
        return None
    return {"window": window} if bool(keys.all()) else {"window": window, "key_mask": keys}
