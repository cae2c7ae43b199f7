"""What fla's layers take no mask for, or round: on stand-ins, ops as float64 loops."""

from __future__ import annotations

import contextlib
import sys

import fla_loops as loops
import pytest
import torch
from fla_stand_ins import HEADS, KEY, VALUE, WIDTH, StandIn, by_row, layer
from torch import Tensor
from torch.nn import functional

import dsf
from dsf.errors import DsfTypeError
from dsf.tracing import from_layer, relative_error

DOUBLE = 1e-12
BEYOND = 130
"""Tokens of two blocks of fla's PaTH kernel, which holds products of reflections in 16 bit between
blocks, and a part of a third."""
SHARED = {"q": (HEADS, KEY), "k": (2, KEY), "v": (2, VALUE), "w": (2, KEY), "beta": (2,)}
GATED = {**SHARED, "g": (HEADS,)}


class Path(StandIn):
    """With a mask it looks into the cache that it is given, as fla's does before it decodes."""

    def forward(self, hidden_states: Tensor, attention_mask=None, past_key_values=None):
        if attention_mask is not None:
            with contextlib.suppress(KeyError):
                assert past_key_values[None] is None
        return super().forward(hidden_states, attention_mask)

    def call(self, given: dict, cu_seqlens) -> Tensor:
        bounded = {"g": functional.logsigmoid, "beta": lambda x: 2 * x.sigmoid(),
                   "w": loops.unit}  # fmt: skip
        return super().call({n: bounded.get(n, lambda x: x)(x) for n, x in given.items()},
                            cu_seqlens)  # fmt: skip


class NoMask(StandIn):
    """fla's MomentumDeltaNet: a mask is not taken; queries, keys, values have no biases."""

    def forward(self, hidden_states: Tensor, attention_mask=None):
        if attention_mask is not None:
            raise NotImplementedError("attention_mask is not yet supported by MomentumDeltaNet.")
        return super().forward(hidden_states)

    def call(self, given: dict, cu_seqlens) -> Tensor:
        given = {n: -functional.softplus(x) if n.startswith("log_") else x.sigmoid()
                 if n in ("beta", "eta") else x for n, x in given.items()}  # fmt: skip
        return super().call(given, cu_seqlens)


@pytest.fixture
def path(monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def op(**given):
        return by_row(loops.path)(**given), None

    torch.manual_seed(1)
    return lambda sizes: layer(
        ("path_attn", "PaTHAttention", "parallel_path_attn", op, sizes, {}, Path))  # fmt: skip


@pytest.fixture
def momentum(monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sizes = {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE), "p": (HEADS, KEY),
             **dict.fromkeys(("log_alpha", "log_mu", "beta", "eta"), (HEADS,))}  # fmt: skip
    torch.manual_seed(1)
    options = {"use_qk_l2norm_in_kernel": True, "use_p_times_alpha": True}
    made = layer(("momentum_deltanet", "MomentumDeltaNet", "fused_recurrent_momentum_delta_rule",
                  by_row(loops.momentum), sizes, options, NoMask))  # fmt: skip
    with torch.no_grad():
        for name in "qkvp":
            made.parts[name].bias.zero_()
    return made


def _x(length: int, batch: int = 2) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [SHARED, GATED], ids=["plain", "forgetting"])
def test_reflections_over_many_blocks_are_exact(path, sizes):
    found = from_layer(path(sizes), _x(BEYOND, batch=1))
    assert found.error <= DOUBLE
    assert found.attrs["scan_error"] <= DOUBLE


@pytest.mark.parametrize("sizes", [SHARED, GATED], ids=["plain", "forgetting"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_path_attention_takes_a_mask_beside_an_empty_cache(path, sizes, padding):
    layer, x = path(sizes), _x(9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, {"left": slice(3), "right": slice(-3, None), "holes": slice(3, 5)}[padding]] = 0
    found = from_layer(layer, x, attention_mask=mask, past_key_values={})
    assert found.error <= DOUBLE
    assert found.attrs["scan_error"] <= DOUBLE
    y, real = dsf.scan(found.recurrence, found.values), mask[1].bool()
    assert not y[1, ~real].any()
    alone = from_layer(layer, x[1:, real])
    assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= DOUBLE
    weights = dsf.materialise(found.recurrence)
    assert not weights[1, :, :, ~real].any()
    tile = dsf.materialise(found.recurrence, slice(2, 7), slice(1, 9))
    assert relative_error(tile, weights[:, :, 2:7, 1:9]) <= DOUBLE


def test_path_attention_without_one_says_what_to_give(path):
    layer, mask = path(SHARED), torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(DsfTypeError, match="past_key_values"):
        from_layer(layer, _x(9), attention_mask=mask)


def test_momentum_delta_net_takes_no_mask_and_zeros_before_its_tokens_are_none(momentum):
    """Its keys and values have no bias: zeros write nothing, and what comes later is not read."""
    x, padded = _x(9), 3
    with pytest.raises(NotImplementedError, match="attention_mask is not yet supported"):
        from_layer(momentum, x, attention_mask=torch.ones(2, 9, dtype=torch.long))
    left = x.clone()
    left[1, :padded] = 0
    for found, real in ((from_layer(momentum, left), slice(padded, 9)),
                        (from_layer(momentum, x), slice(0, 9 - padded))):  # fmt: skip
        assert found.error <= DOUBLE
        alone = from_layer(momentum, x[1:, real])
        assert relative_error(found.output[1:, real], alone.output) <= DOUBLE
        y, own = (dsf.scan(t.recurrence, t.values) for t in (found, alone))
        assert relative_error(y[1:, real], own) <= DOUBLE
