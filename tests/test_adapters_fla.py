"""flash-linear-attention's layers: real ones where it is installed, its conventions on stand-ins.

fla imports Triton and runs on a GPU; on a CPU its kernels run in Triton's interpreter, in a
process of its own (fla_layers.py). Without it, layers of the same names call float64 loops alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fla_stand_ins import HEADS, KEY, VALUE, WIDTH, StandIn, layer, rows
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.adapters import adapters
from dsf.adapters._fla_ops import OPS
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, relative_error

SINGLE = 1e-5
DOUBLE = 1e-12
FLA = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("fla.layers")
HERE = Path(__file__).parent
NAMES = (
    "GatedLinearAttention", "HGRN2Attention", "SimpleGatedLinearAttention", "LightNetAttention",
    "MultiScaleRetention", "LinearAttention", "LinearAttention normalised",
    "BasedLinearAttention", "ReBasedLinearAttention", "HGRNAttention", "GatedSlotAttention",
    "DeltaNet", "GatedDeltaNet", "GatedDeltaProduct", "Comba", "KimiDeltaAttention",
    "KimiDeltaAttention bounded", "RWKV6Attention", "RWKV7Attention", "RodimusAttention",
    "YOCOGatedRetention", "ABCAttention", "Raven", "GatedDeltaNet2", "MomentumDeltaNet",
    "PrecondGatedDeltaNet", "PrecondKDA", "MesaNet", "MomAttention", "MomAttention shared",
    "CyclicFlowAttention", "Mamba", "Mamba2", "Mamba2 plain", "Attention", "Attention window",
    "BitAttention", "MultiheadLatentAttention", "SlidingWindowSharedKeyAttention",
    "YOCOCrossAttention", "ForgettingAttention", "PaTHAttention", "PaTHAttention gated",
    "WallAttention", "WallAttention gated", "Parallax", "DeltaFormerAttention", "MoBA",
    "MoBA whole", "NativeSparseAttention",
)  # fmt: skip
WITHOUT_MASK = ("MomentumDeltaNet",)
NEEDS_FLASH_ATTENTION = {
    "Attention", "BitAttention", "MultiheadLatentAttention", "SlidingWindowSharedKeyAttention",
    "MoBA", "DeltaFormerAttention", "Parallax", "NativeSparseAttention",
}  # fmt: skip
"""Or 16 bit, or both, on a GPU: there they are not run."""
NEEDS_A_GPU = {"Mamba3", "LogLinearMamba2", "StickBreakingAttention"}
"""Their forward refuses another device: stand-ins in test_adapters_fla_more.py and
test_adapters_mamba_ssm_more.py."""


def _report(device: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / "fla_layers.py"), device], cwd=HERE.parent, text=True,
        capture_output=True, check=False, timeout=3000,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu():
    return _report("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not FLA, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_real_layers_in_tritons_interpreter(on_cpu, name):
    """Lengths 1, 13 and 70, padding left and right: the fused kernels, the layers as they are."""
    assert len(on_cpu[name]) == (3 if name.split()[0] in WITHOUT_MASK else 5)
    for case, found in on_cpu[name].items():
        assert "raised" not in found, (case, found)
        assert found["error"] <= SINGLE, (case, found)
        assert found["scan"] <= SINGLE, (case, found)


@pytest.mark.slow
@pytest.mark.skipif(not FLA, reason="flash-linear-attention is not installed")
def test_beyond_a_block_the_kernel_of_path_attention_rounds_and_the_recurrence_does_not(on_cpu):
    """Where gates fade what is a block away, that matters less."""
    plain, gated = (on_cpu[f"limits of {n}"] for n in ("PaTHAttention", "PaTHAttention gated"))
    assert max(plain["recurrence"], gated["recurrence"]) <= SINGLE < plain["kernel"]


@pytest.mark.slow
@pytest.mark.skipif(not FLA, reason="flash-linear-attention is not installed")
def test_zeros_before_the_tokens_are_padding_to_a_layer_without_a_mask(on_cpu):
    assert max(on_cpu["limits of MomentumDeltaNet"].values()) <= SINGLE


@pytest.mark.gpu
@pytest.mark.skipif(not FLA, reason="flash-linear-attention is not installed")
def test_real_layers_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    faults = {
        (name, case): found
        for name, cases in _report("cuda").items() for case, found in cases.items()
        if not name.startswith("limits") and name.split()[0] not in NEEDS_FLASH_ATTENTION
        and "does not support float32" not in str(found) and found.get("error", 1.0) > 1e-3
    }  # fmt: skip
    assert faults == {}


# -- stand-ins -----------------------------------------------------------------------------------


def _gated_delta_rule(*, q, k, v, g, beta, A_log=None, dt_bias=None, cu_seqlens=None,
                      use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
                      allow_neg_eigval=False, use_qk_l2norm_in_kernel=False):  # fmt: skip
    """S <- e^g S, S <- S + beta k (v - S^T k)^T, o = S^T q / sqrt(d), one token at a time."""
    if use_gate_in_kernel:
        g = -A_log.exp() * functional.softplus(g + dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    groups = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    out = torch.zeros_like(v)
    for row, span in rows(cu_seqlens, q.shape[0], q.shape[1]):
        state = v.new_zeros(v.shape[2], k.shape[3], v.shape[3])
        for t in range(span.start, span.stop):
            state = state * g[row, t].exp()[:, None, None]
            delta = v[row, t] - torch.einsum("hkv,hk->hv", state, k[row, t])
            state = state + torch.einsum("hk,hv->hkv", k[row, t] * beta[row, t, :, None], delta)
            out[row, t] = torch.einsum("hkv,hk->hv", state, q[row, t]) * k.shape[3] ** -0.5
    return out, None


def _lightnet(*, q, k, v, cu_seqlens=None):
    """o_t = q_t . sum_j softmax over j <= t of k_j, v_j^T, / sqrt(d)."""
    out = torch.zeros_like(v)
    for row, span in rows(cu_seqlens, q.shape[0], q.shape[1]):
        for t in range(span.start, span.stop):
            past = slice(span.start, t + 1)
            weights = k[row, past].softmax(0)
            state = torch.einsum("jhk,jhv->hkv", weights, v[row, past])
            out[row, t] = torch.einsum("hkv,hk->hv", state, q[row, t]) * k.shape[3] ** -0.5
    return out, (None, None)


class _StandInProduct(StandIn):
    """Two writes a token on one axis of time, as GatedDeltaProduct gives them to its fused op."""

    def call(self, given: dict, cu_seqlens) -> Tensor:
        n, (batch, length) = self.num_householder, given["q"].shape[:2]
        given = {name: x.flatten(1, 2) if name in ("k", "v", "beta") else x
                 for name, x in given.items()}  # fmt: skip
        q = given["q"].new_zeros(batch, length, n, HEADS, KEY)
        g = given["g"].new_zeros(batch, length, n, HEADS)
        q[:, :, -1], g[:, :, 0] = given["q"], functional.logsigmoid(given["g"])
        given |= {"q": q.flatten(1, 2), "g": g.flatten(1, 2), "beta": given["beta"].sigmoid()}
        ends = None if cu_seqlens is None else cu_seqlens * n
        o, _ = self.space[self.op](**given, **self.options, cu_seqlens=ends)
        return o.unflatten(1, (length, n))[:, :, -1]


DELTA = {"q": (2, KEY), "k": (2, KEY), "v": (HEADS, VALUE), "g": (HEADS,), "beta": (HEADS,)}
CASES = {
    "gated delta rule, gates inside": (
        "gated_deltanet", "GatedDeltaNet", "chunk_gated_delta_rule", _gated_delta_rule, DELTA,
        {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
         "allow_neg_eigval": True, "use_qk_l2norm_in_kernel": True}, StandIn,
    ),
    "gated delta product": (
        "gated_deltaproduct", "GatedDeltaProduct", "fused_recurrent_gated_delta_rule",
        _gated_delta_rule,
        {"q": (HEADS, KEY), "k": (2, HEADS, KEY), "v": (2, HEADS, VALUE), "g": (HEADS,),
         "beta": (2, HEADS)},
        {"use_qk_l2norm_in_kernel": True}, _StandInProduct,
    ),
    "lightnet": (
        "lightnet", "LightNetAttention", "fused_recurrent_lightnet", _lightnet,
        {"q": (HEADS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE)}, {}, StandIn,
    ),
}  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch):
    """A layer of fla's class and module names."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def make(case: str) -> nn.Module:
        return layer(CASES[case])

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_conventions_with_and_without_padding(stand_in, case, padding):
    layer = stand_in(case)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.long)
    if padding != "none":
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
    arguments = {} if padding == "none" else {"attention_mask": mask}
    found = from_layer(layer, x, **arguments)
    assert found.error <= DOUBLE
    assert found.attrs["scan_error"] <= DOUBLE
    y = dsf.scan(found.recurrence, found.values)
    assert y.shape == (2, 9, HEADS, VALUE)  # on the layer's own time, whatever the op saw
    real = mask[1].bool()
    alone = from_layer(layer, x[1:, real])
    assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= DOUBLE


def test_rows_that_the_caller_packed_are_refused(stand_in):
    layer = stand_in("lightnet")
    with pytest.raises(DsfUnsupportedError, match="cu_seqlens: expected one sequence in each row"):
        from_layer(layer, torch.randn(1, 6, WIDTH, dtype=torch.float64),
                   cu_seqlens=torch.tensor([0, 2, 6]))  # fmt: skip


def test_a_file_without_a_known_op_is_refused(stand_in):
    layer = stand_in("lightnet")
    del sys.modules["fla.layers.lightnet"].fused_recurrent_lightnet
    with pytest.raises(DsfUnsupportedError, match=r"fla\.layers\.lightnet to import an op out of"):
        from_layer(layer, torch.randn(1, 6, WIDTH, dtype=torch.float64))


def test_every_layer_named_here_is_tested_on_the_package_itself():
    named = {name.partition(":")[2] for a in adapters() for name in a.classes
             if name.startswith("fla.")}  # fmt: skip
    assert named == {name.split()[0] for name in NAMES} | NEEDS_A_GPU
    assert len(OPS) >= 30
