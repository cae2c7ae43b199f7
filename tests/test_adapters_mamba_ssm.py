"""mamba_ssm's modules: the calling conventions on a stand-in, the package itself on a GPU.

mamba_ssm imports compiled code, so on a CPU a module of the same names stands in for it: layers
that call their scan as the released ones do, with a fused path that would hide it.
"""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import dsf
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, trace

SINGLE = 1e-6
DOUBLE = 1e-14
HIDING = "a fused kernel would hide the scan"


def _layer(file: str, name: str, scan: str, function, body) -> type[nn.Module]:
    """A class in a module of mamba_ssm's name, whose forward finds its scan in that module."""
    module = types.ModuleType(f"mamba_ssm.modules.{file}")
    module.__dict__[scan] = function
    sys.modules[module.__name__] = module

    def forward(self, u: Tensor, inference_params=None, seq_idx=None) -> Tensor:
        return body(self, u, module.__dict__[scan], seq_idx)

    made = type(name, (nn.Module,), {"forward": forward, "__module__": module.__name__})
    made.__qualname__ = name
    return made


def _fused(self) -> None:
    raise AssertionError(HIDING)


def _mamba_body(self, u: Tensor, scan, seq_idx) -> Tensor:
    if self.use_fast_path:
        _fused(self)
    x, z, dt = self.in_proj(u).transpose(1, 2).chunk(3, 1)
    b, c = self.x_proj(x.transpose(1, 2)).transpose(1, 2).chunk(2, 1)
    y = scan(x, dt, -self.A_log.exp(), b, c, self.D, z=z, delta_bias=self.bias,
             delta_softplus=True)  # fmt: skip
    return self.out_proj(y.transpose(1, 2))


def _mamba2_body(self, u: Tensor, scan, seq_idx) -> Tensor:
    if self.use_mem_eff_path:
        _fused(self)
    x, z, rest = self.in_proj(u).split([12, 12, 3 + 2 * 2 * 5], -1)
    dt, b, c = rest.split([3, 10, 10], -1)
    y = scan(
        x.unflatten(-1, (3, 4)), dt, -self.A_log.exp(), b.unflatten(-1, (2, 5))[:, :, :1],
        c.unflatten(-1, (2, 5))[:, :, :1], chunk_size=8, D=self.D,
        z=z.unflatten(-1, (3, 4)) if self.gate_inside else None, dt_bias=self.bias,
        dt_softplus=True, seq_idx=seq_idx, dt_limit=(0.01, math.inf),
    )  # fmt: skip
    y = y.flatten(-2)
    return self.out_proj(y if self.gate_inside else y * functional.silu(z))


def _selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    return modeling_mamba.mamba_selective_scan(
        u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus
    )


def _chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, seq_idx=None,
                dt_softplus=False, dt_limit=(0.0, math.inf)):  # fmt: skip
    y = modeling_mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )  # fmt: skip
    y = y[0] if isinstance(y, tuple) else y
    return y if z is None else y * functional.silu(z)


@pytest.fixture
def stand_in(monkeypatch):
    """Makers of both layers; sys.modules is put back afterwards."""
    if any(name.split(".")[0] == "mamba_ssm" for name in sys.modules):
        pytest.skip("mamba_ssm itself is imported")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def mamba() -> nn.Module:
        layer = _layer("mamba_simple", "Mamba", "selective_scan_fn", _selective_scan,
                       _mamba_body)()  # fmt: skip
        layer.use_fast_path = True
        layer.in_proj, layer.x_proj = nn.Linear(6, 24), nn.Linear(8, 10)
        layer.out_proj, layer.bias = nn.Linear(8, 6), nn.Parameter(torch.randn(8))
        layer.A_log, layer.D = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8))
        return layer

    def mamba2(gate_inside: bool) -> nn.Module:
        layer = _layer("mamba2", "Mamba2", "mamba_chunk_scan_combined", _chunk_scan,
                       _mamba2_body)()  # fmt: skip
        layer.use_mem_eff_path, layer.gate_inside = True, gate_inside
        layer.in_proj, layer.out_proj = nn.Linear(6, 47), nn.Linear(12, 6)
        layer.A_log, layer.D, layer.bias = (nn.Parameter(torch.randn(3)) for _ in range(3))
        return layer

    return {"mamba": mamba, "mamba2": lambda: mamba2(False), "mamba2 gated": lambda: mamba2(True)}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_released_calling_conventions(stand_in, kind, dtype):
    layer = stand_in[kind]().to(dtype)
    switch = "use_fast_path" if kind == "mamba" else "use_mem_eff_path"
    for length in (1, 7, 8, 9):
        found = from_layer(layer, torch.randn(2, length, 6, dtype=dtype))
        assert found.system == kind.split()[0]
        tolerance = SINGLE if dtype == torch.float32 else DOUBLE
        assert found.error <= tolerance
        assert found.attrs["scan_error"] <= tolerance
    y = dsf.scan(found.recurrence, found.values)
    assert torch.equal(found.readout(y), found.readout(y))
    assert getattr(layer, switch) is True
    with pytest.raises(AssertionError, match=HIDING):
        layer(torch.randn(2, 4, 6, dtype=dtype))


def test_caches_and_packed_rows_are_refused(stand_in):
    layer, x = stand_in["mamba2"](), torch.randn(1, 4, 6)
    with pytest.raises(DsfUnsupportedError, match="inference_params: expected none"):
        from_layer(layer, x, inference_params=object())
    with pytest.raises(DsfUnsupportedError, match="expected one sequence in each row"):
        from_layer(layer, x, seq_idx=torch.zeros(1, 4, dtype=torch.int32))


@pytest.mark.gpu
def test_the_package_itself():
    """Both modules on a GPU, fused paths on as they are released."""
    mamba_ssm = pytest.importorskip("mamba_ssm")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = nn.Sequential(
        mamba_ssm.Mamba(64), mamba_ssm.Mamba2(64, headdim=16, d_state=16),
        mamba_ssm.Mamba2(64, headdim=16, d_state=16, rmsnorm=False),
    ).to("cuda")  # fmt: skip
    found = trace(model, torch.randn(2, 300, 64, device="cuda"), tolerance=1e-3)
    assert [layer.system for layer in found.values()] == ["mamba", "mamba2", "mamba2"]
