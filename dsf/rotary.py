"""Rotary position embedding: consistent tables, the released ZeroS tables, and the map itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dsf.errors import DsfValueError
from dsf.shapes import Float

TABLES = ("rotation", "release")
PAIRINGS = ("half", "neighbour")


def rotary_tables(
    length: int,
    width: int,
    *,
    base: float = 10000.0,
    start: int = 0,
    tables: str = "rotation",
    pairing: str = "half",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "length width"], Float[Tensor, "length width"]]:
    """cos and sin of the angles position x base^(-2i/width), each (length, width).

    Positions run start..start+length-1. `rotation` repeats angle i where the pairing puts its
    two coordinates: i and i + width/2 (half; Llama) or 2i and 2i+1 (neighbour; GPT-J).
    `release` is what the ZeroS code does: angles on neighbours, built in float32, for use with
    pairing by halves. That is not a rotation: norms change and q.k depends on more than the lag.
    Raises DsfValueError for an odd width or an unknown name. Source: Su et al. (2021), eq. 34.
    """
    if width % 2:
        raise DsfValueError(f"dsf.rotary_tables: width: expected an even number, got {width}.")
    if tables not in TABLES:
        raise DsfValueError(
            f"dsf.rotary_tables: tables: expected one of {TABLES}, got {tables!r}."
        )
    _check_pairing("dsf.rotary_tables", pairing)
    kind = torch.float32 if tables == "release" else torch.float64
    position = torch.arange(start, start + length, dtype=kind, device=device)
    frequency = 1.0 / base ** (torch.arange(0, width, 2, dtype=kind, device=device) / width)
    angle = position[:, None] * frequency
    if tables == "release" or pairing == "neighbour":
        angle = angle.repeat_interleave(2, dim=-1)
    else:
        angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch time head width"],
    cos: Float[Tensor, "*lead time rotated"],
    sin: Float[Tensor, "*lead time rotated"],
    pairing: str = "half",
) -> Float[Tensor, "batch time head width"]:
    """x cos + x' sin with x' = (-x2, x1) for each pair (x1, x2).

    Tables are (time, rotated) or (batch, time, rotated); rotated < width leaves the last
    coordinates alone. Raises DsfValueError on an unknown pairing.
    """
    _check_pairing("dsf.rotate", pairing)
    rotated = cos.shape[-1]
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    first, rest = x[..., :rotated], x[..., rotated:]
    if pairing == "half":
        x1, x2 = first.chunk(2, dim=-1)
        partner = torch.cat([-x2, x1], dim=-1)
    else:
        partner = torch.stack([-first[..., 1::2], first[..., ::2]], dim=-1).flatten(-2)
    out = first * cos + partner * sin
    return out if rest.shape[-1] == 0 else torch.cat([out, rest], dim=-1)


def _check_pairing(function: str, pairing: str) -> None:
    if pairing not in PAIRINGS:
        raise DsfValueError(f"{function}: pairing: expected one of {PAIRINGS}, got {pairing!r}.")
