"""The rest of flash-linear-attention's layers on stand-ins: ops as float64 loops, padding, caches.

tests/test_adapters_fla.py runs the package's own layers where it is installed.
"""

from __future__ import annotations

import itertools
import sys

import fla_loops as loops
import pytest
import torch
from fla_stand_ins import HEADS, KEY, VALUE, WIDTH, StandIn, by_row, layer
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.errors import DsfFidelityError, DsfUnsupportedError
from dsf.tracing import from_layer, relative_error

DOUBLE = 1e-12
SOLVED = 1e-10
"""Of thirty steps of a solver whose divisors carry 1e-5."""
SLOTS, LEVELS = 6, 6


class Bounded(StandIn):
    """Log decays below zero, write strengths in (0, 1)."""

    def call(self, given: dict, cu_seqlens) -> Tensor:
        given = {n: -functional.softplus(x) if n.startswith(("g", "log_")) else
                 x.sigmoid() if n.startswith(("beta", "delta", "eta")) else x
                 for n, x in given.items()}  # fmt: skip
        return super().call(given, cu_seqlens)


class Unmasked(Bounded):
    """Whose op is given the padding too."""

    def forward(self, hidden_states: Tensor, attention_mask=None, cu_seqlens=None):
        x = hidden_states
        given = {n: self.parts[n](x).unflatten(-1, s) for n, s in self.sizes.items()}
        if attention_mask is not None:
            given["v"] = given["v"] * attention_mask[..., None, None]
        return self.out(self.call(given, None).flatten(2)), None, None


class EndToEnd(StandIn):
    """Lays rows end to end also where no mask asks for it."""

    def call(self, given: dict, cu_seqlens) -> Tensor:
        if cu_seqlens is not None:
            return super().call(given, cu_seqlens)
        batch, length = given["q"].shape[:2]
        packed = {n: x.flatten(0, 1)[None] for n, x in given.items()}
        ends = length * torch.arange(batch + 1)
        return super().call(packed, ends)[0].unflatten(0, (batch, length))


class Flash(StandIn):
    """flash-attn's two functions: packed rows have no axis of batch."""

    def call(self, given: dict, cu_seqlens) -> Tensor:
        q, k, v = (given[n] for n in "qkv")
        if cu_seqlens is None:
            return self.space["flash_attn_func"](q, k, v, causal=True, **self.options)
        return self.space["flash_attn_varlen_func"](
            q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=9,
            max_seqlen_k=9, causal=True, **self.options)[None]  # fmt: skip


def _flash(q, k, v, causal, window_size=(-1, -1)):
    back = None if window_size[0] < 0 else window_size[0] + 1
    return by_row(loops.softmax)(q=q, k=k, v=v, window_size=back)


def _varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
            window_size=(-1, -1)):  # fmt: skip
    spans = list(itertools.pairwise(cu_seqlens_q.tolist()))
    return torch.cat([_flash(q[None, a:b], k[None, a:b], v[None, a:b], causal, window_size)[0]
                      for a, b in spans])  # fmt: skip


def _path(**given):
    return by_row(loops.path)(**given), None


def _deltaformer(*, attention_mask=None, cu_seqlens=None, **given):
    kept = {} if attention_mask is None else {"kept": attention_mask.bool()}
    return by_row(loops.deltaformer)(**given, **kept)


class Deltaformer(Unmasked):
    """The op is given the mask and hides padding from its outer softmax."""

    def forward(self, hidden_states: Tensor, attention_mask=None, cu_seqlens=None):
        given = {n: self.parts[n](hidden_states).unflatten(-1, s) for n, s in self.sizes.items()}
        y = self.space[self.op](**given, attention_mask=attention_mask)
        return self.out(y.flatten(2)), None, None


QK = {"q": (HEADS, KEY), "k": (HEADS, KEY)}
QKV = {**QK, "v": (HEADS, VALUE)}
SHARED = {"q": (HEADS, KEY), "k": (2, KEY), "v": (2, VALUE)}
UNIT = {"use_qk_l2norm_in_kernel": True}
EACH = dict.fromkeys(("g", "beta"), (HEADS,))
POWER = {"x": 1.5, "eps": 1e-6, **UNIT}
CASES: dict[str, tuple] = {
    "gdn2": ("gdn2", "GatedDeltaNet2", "chunk_gdn2", by_row(loops.gdn2),
             {**QKV, "g": (HEADS, KEY), "b": (HEADS, KEY), "w": (HEADS, VALUE)}, UNIT, Bounded),
    "preconditioned gated delta rule": (
        "precond_gated_deltanet", "PrecondGatedDeltaNet",
        "fused_recurrent_precond_gated_delta_rule", by_row(loops.preconditioned),
        {"q": (2, KEY), "k": (2, KEY), "v": (HEADS, VALUE), **EACH, "g_atk": (2,),
         "beta_atk": (2,)},
        {**POWER, "log_atk_scale": torch.tensor([-0.2, 0.3], dtype=torch.float64)}, Bounded),
    "preconditioned kda": (
        "precond_kda", "PrecondKDA", "chunk_precond_kda", by_row(loops.preconditioned),
        {**QKV, "g": (HEADS, KEY), "beta": (HEADS,), "g_atk": (HEADS,), "beta_atk": (HEADS,)},
        {**POWER, "log_atk_scale": torch.linspace(-1, 1, HEADS, dtype=torch.float64)}, Bounded),
    "momentum": (
        "momentum_deltanet", "MomentumDeltaNet", "fused_recurrent_momentum_delta_rule",
        by_row(loops.momentum),
        {**QKV, "p": (HEADS, KEY), "log_alpha": (HEADS,), "log_mu": (HEADS,), "beta": (HEADS,),
         "eta": (HEADS,)},
        {**UNIT, "use_p_times_alpha": True}, Unmasked),
    "mesa": ("mesa_net", "MesaNet", "chunk_mesa_net", by_row(loops.mesa),
             {**QKV, **EACH},
             {**UNIT, "max_CG_iteration": 30,
              "lamb": torch.linspace(0.3, 1.5, HEADS * KEY, dtype=torch.float64).view(HEADS, KEY)},
             Bounded),
    "abc": ("abc", "ABCAttention", "chunk_abc", by_row(loops.abc),
            {**QKV, "s": (HEADS, SLOTS)}, {}, Unmasked),
    "cyclic flow": (
        "cyfa", "CyclicFlowAttention", "chunk_cyfa", by_row(loops.cyclic_flow),
        {**QKV, **EACH, "delta": (HEADS,)},
        {"readout": torch.arange(HEADS * (SLOTS - 1) ** 2, dtype=torch.float64).sin().view(
            HEADS, SLOTS - 1, SLOTS - 1),
         "q_norm_weight": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
         "k_norm_weight": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64),
         "q_norm_eps": 1e-5, "k_norm_eps": 1e-6, "scale": 0.7}, Bounded),
    "flash attention": ("attn", "Attention", "", {"flash_attn_func": _flash,
                        "flash_attn_varlen_func": _varlen}, SHARED, {}, Flash),
    "flash attention, window": (
        "attn", "Attention", "",
        {"flash_attn_func": _flash, "flash_attn_varlen_func": _varlen}, SHARED,
        {"window_size": (2, 0)}, Flash),
    "shared keys and values": ("yoco", "YOCOCrossAttention", "parallel_attn",
                               by_row(loops.softmax), SHARED, {"window_size": 3}, StandIn),
    "forgetting": ("forgetting_attn", "ForgettingAttention", "parallel_forgetting_attn",
                   by_row(loops.forgetting), {**SHARED, "g": (HEADS,)}, {}, Bounded),
    "wall": ("wall_attn", "WallAttention", "parallel_wall_attn", by_row(loops.wall),
             {**SHARED, "g": (HEADS, KEY), "g_scalar": (HEADS,)},
             {"window_size": 4,
              "sink_bias": torch.linspace(-1, 1, HEADS, dtype=torch.float64)}, Bounded),
    "parallax": ("parallax", "Parallax", "parallel_parallax", by_row(loops.parallax),
                 {**SHARED, "r": (HEADS, KEY)}, {}, StandIn),
    "deltaformer": ("deltaformer", "DeltaFormerAttention", "deltaformer_attn", _deltaformer,
                    {**QKV, "beta": (HEADS,)}, {}, Deltaformer),
    "blocks": ("moba", "MoBA", "parallel_moba", by_row(loops.blocks), QKV,
               {"chunk_size": 2, "topk": 3}, EndToEnd),
    "blocks, all": ("moba", "MoBA", "parallel_moba", by_row(loops.blocks), QKV,
                    {"chunk_size": 3, "topk": 1}, EndToEnd),
    "stick-breaking": ("stickbreaking_attn", "StickBreakingAttention",
                       "parallel_stickbreaking_attn",
                       lambda **given: (by_row(loops.stick_breaking)(**given), None), SHARED, {},
                       StandIn),
    "stick-breaking, itself": (
        "stickbreaking_attn", "StickBreakingAttention", "parallel_stickbreaking_attn",
        lambda **given: (by_row(loops.stick_breaking)(**given), None), SHARED,
        {"attend_current": True}, StandIn),
    "log-linear": ("log_linear_mamba2", "LogLinearMamba2", "chunk_log_linear_attn",
                   lambda **given: (by_row(loops.log_linear)(**given), None),
                   {"q": (2, KEY), "k": (2, KEY), "v": (HEADS, VALUE), "g": (HEADS,),
                    "level_scales": (HEADS, LEVELS)}, {}, Unmasked),
}  # fmt: skip
PATH = {
    "path": ("path_attn", "PaTHAttention", "parallel_path_attn", _path,
             {**SHARED, "w": (2, KEY), "beta": (2,)}, {}, StandIn),
    "path, forgetting": (
        "path_attn", "PaTHAttention", "parallel_path_attn", _path,
        {**SHARED, "w": (2, KEY), "beta": (2,), "g": (HEADS,)}, {}, Bounded),
}  # fmt: skip
"""The layer takes no mask without a cache."""
WHOLE = (Unmasked, Deltaformer)


@pytest.fixture
def stand_in(monkeypatch):
    """A layer of fla's class and module names."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return lambda case: layer({**CASES, **PATH}[case])


def _inputs(padding: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x, mask = torch.randn(2, 9, WIDTH, dtype=torch.float64), torch.ones(2, 9, dtype=torch.long)
    if padding != "none":
        mask[1, {"left": slice(3), "right": slice(-3, None), "holes": slice(3, 5)}[padding]] = 0
    return x, mask


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_conventions_with_and_without_padding(stand_in, case, padding):
    layer = stand_in(case)
    x, mask = _inputs(padding)
    found = from_layer(layer, x, **({} if padding == "none" else {"attention_mask": mask}))
    assert found.error <= (SOLVED if case == "mesa" else DOUBLE)
    assert found.attrs["scan_error"] <= (SOLVED if case == "mesa" else DOUBLE)
    y = dsf.scan(found.recurrence, found.values)
    assert y.shape == (2, 9, HEADS, VALUE)  # on the layer's own time, whatever the op saw
    if not isinstance(layer, WHOLE):
        real = mask[1].bool()
        if (case, padding) != ("forgetting", "holes"):  # there a row that the layer drops reads
            assert not y[1, ~real].any()
        alone = from_layer(layer, x[1:, real])
        assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= SOLVED


@pytest.mark.parametrize("case", PATH)
def test_reflected_keys(stand_in, case):
    assert from_layer(stand_in(case), _inputs("none")[0]).error <= DOUBLE


@pytest.mark.parametrize("case", [*CASES, *PATH])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_lengths(stand_in, case, length):
    layer = stand_in(case)
    torch.manual_seed(4)
    x = torch.randn(1, length, WIDTH, dtype=torch.float64)
    before = layer(x)[0]
    assert from_layer(layer, x).error <= (SOLVED if case == "mesa" else DOUBLE)
    assert torch.equal(layer(x)[0], before)


@pytest.mark.parametrize("case", [c for c in CASES if c != "log-linear"])
def test_maps_are_those_of_the_layers(stand_in, case):
    """Row by row against the derivative of the op by its values, gates and keys held."""
    layer = stand_in(case)
    found = from_layer(layer, _inputs("none")[0])
    recurrence, values = found.recurrence, found.values
    shift = torch.zeros_like(values)
    shift[:, 2] = 1.0
    moved = dsf.scan(recurrence, values + shift) - dsf.scan(recurrence, values)
    weights = dsf.materialise(recurrence)[:, :, :, 2]
    assert relative_error(moved[..., 0].transpose(1, 2), weights) <= SOLVED


def test_rows_that_are_not_causal_are_refused(stand_in):
    layer = stand_in("flash attention")
    layer.call = lambda given, ends: layer.space["flash_attn_func"](
        *(given[n] for n in "qkv"), causal=False)  # fmt: skip
    with pytest.raises(DsfUnsupportedError, match="causal: expected True"):
        from_layer(layer, _inputs("none")[0])


def test_a_wrong_gate_is_noticed(stand_in):
    layer: nn.Module = stand_in("gdn2")
    original = layer.space["chunk_gdn2"]
    layer.space["chunk_gdn2"] = lambda **given: original(**{**given, "b": 1.1 * given["b"]})
    with pytest.raises(DsfFidelityError):
        from_layer(layer, _inputs("none")[0])
