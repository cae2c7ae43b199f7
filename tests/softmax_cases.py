"""Softmax attention in every form, beside the dense softmax it must equal."""

from __future__ import annotations

import math

import torch
from structures import Draw

import dsf
from dsf.transitions import Identity

LENGTH, HEAD, GROUP, WIDTH = 9, 4, 2, 5


def dense_softmax(q, k, bias=None, key_mask=None, sink=None, *, scale=None, causal=True,
                  window=None, softcap=None, query_start=0):  # fmt: skip
    """The definition, entry by entry of the formula: (batch, head, query, key)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    z = torch.einsum("bthd,bjhd->bhtj", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        z = z + bias
    lag = torch.arange(q.shape[1])[:, None] + query_start - torch.arange(k.shape[1])
    seen = (lag >= 0) if causal else torch.ones_like(lag, dtype=torch.bool)
    if window is not None:
        seen = seen & (lag.abs() < window)
    seen = seen[None, None] & (torch.tensor(True) if key_mask is None else key_mask[:, None, None])
    e = torch.where(seen, z.exp(), 0.0)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + sink.exp()[None, :, None, None]
    return torch.where(total > 0, e / total.clamp(min=1e-300), 0.0)


def options(seed: int) -> dict[str, dict]:
    d = Draw(seed)
    bias = d.normal(2, HEAD, LENGTH, LENGTH)
    closed = bias.clone()
    closed[:, :, 3] = -math.inf  # a row that sees nothing
    closed[:, :, :, 5] = -math.inf
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, 0] = False  # a causal first row that sees nothing
    return {
        "plain": {},
        "scale": dict(scale=0.3),
        "window": dict(window=3),
        "key_mask": dict(key_mask=mask),
        "bias": dict(bias=bias),
        "shared_bias": dict(bias=bias[:1, :1]),
        "bias_by_key": dict(bias=bias[:, :, :1]),
        "closed_bias": dict(bias=closed),
        "softcap": dict(softcap=0.7),
        "sink": dict(sink=d.normal(HEAD)),
        "no_sink": dict(sink=torch.full((HEAD,), -math.inf, dtype=torch.float64)),
        "all": dict(scale=0.5, window=4, key_mask=mask, bias=closed, softcap=2.0,
                    sink=d.normal(HEAD)),
    }  # fmt: skip


CASES = list(options(0))


def rows_and_map(case: str, causal: bool, seed: int = 1):
    d = Draw(seed)
    q, k = d.normal(2, LENGTH, HEAD, WIDTH), d.normal(2, LENGTH, GROUP, WIDTH)
    given_options = options(seed)[case]
    rows = dsf.SoftmaxRows(q, k, causal=causal, **given_options)
    return rows, dense_softmax(q, k, causal=causal, **given_options)


def system_of(rows: dsf.MixingRows) -> dsf.Recurrence | dsf.Bidirectional:
    length = rows.n_key
    r = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows)
    return r if rows.causal else dsf.Bidirectional.from_rows(r)
