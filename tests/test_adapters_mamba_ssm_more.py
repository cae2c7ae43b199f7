"""Mamba-3 and attention of mamba_ssm, Mamba-3 of fla, on stand-ins that call loops.

The kernels need a GPU; the loops here say in one token after another what their documentation
says. That of one rank was also run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from fla_stand_ins import rows
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, relative_error

DOUBLE = 1e-13
HEADS, RANK, STATE, CHANNEL, WIDTH, ANGLES = 4, 2, 6, 3, 5, 2
SIXTEEN_BITS, UNROUNDED = 3e-2, 1e-3


def _turned(x: Tensor, angle: Tensor, half: bool) -> Tensor:
    """(head, state), pair i being (2i, 2i + 1) or (i, i + state / 2)."""
    x = x.clone()
    for i in range(angle.shape[-1]):
        one, two = (i, i + STATE // 2) if half else (2 * i, 2 * i + 1)
        c, s = angle[:, i].cos(), angle[:, i].sin()
        x[:, one], x[:, two] = c * x[:, one] - s * x[:, two], s * x[:, one] + c * x[:, two]
    return x


def _kernel(*, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, cu_seqlens=None,
            MIMO_V=None, MIMO_Z=None, MIMO_Out=None):  # fmt: skip
    """One rank if there is no MIMO_V; the output rank by rank if there is none of MIMO_Out."""
    several = MIMO_V is not None
    if not several:
        Q, K, Q_bias, K_bias = Q[:, :, None], K[:, :, None], Q_bias[:, None], K_bias[:, None]
        MIMO_V = torch.ones(HEADS, 1, CHANNEL, dtype=V.dtype)
    batch, length, rank, groups = Q.shape[:4]
    out = V.new_zeros(batch, length, rank, HEADS, CHANNEL)
    for row, span in rows(cu_seqlens, batch, length):
        state, angle, before = V.new_zeros(HEADS, STATE, CHANNEL), torch.zeros(HEADS, ANGLES), 0.0
        for t in range(span.start, span.stop):
            angle = angle + math.pi * torch.tanh(Angles[row, t]) * DT[row, :, t, None]
            q, k = (
                torch.stack([_turned(x[row, t, r].repeat_interleave(HEADS // groups, 0)
                                     + bias[:, r], angle, several) for r in range(rank)])
                for x, bias in ((Q, Q_bias), (K, K_bias))
            )  # fmt: skip
            v = V[row, t] * MIMO_V.transpose(0, 1)
            written = torch.einsum("rhn,rhp->hnp", k, v)
            share, step = Trap[row, :, t].sigmoid(), DT[row, :, t]
            state = state + ((1 - share) * step)[:, None, None] * before
            state = ADT[row, :, t].exp()[:, None, None] * state
            state = state + (share * step)[:, None, None] * written
            before = written
            y = torch.einsum("rhn,hnp->rhp", q, state)
            out[row, t] = y if D is None else y + D[:, None] * v
    if not several:
        return out[:, :, 0] if Z is None else out[:, :, 0] * functional.silu(Z)
    if Z is not None:
        out = out * functional.silu(Z[:, :, None] * MIMO_Z.transpose(0, 1))
    return out if MIMO_Out is None else (out * MIMO_Out.transpose(0, 1)).sum(2)


class _Mamba3(nn.Module):
    """Projections in place of norms and splits, and the call of the released layers."""

    def __init__(self, space: dict, rank: int, groups: int, gated: bool):
        super().__init__()
        self.space, self.rank, self.gated = space, rank, gated
        self.sizes = {
            "Q": (rank, groups, STATE), "K": (rank, groups, STATE), "V": (HEADS, CHANNEL),
            "Z": (HEADS, CHANNEL), "A": (HEADS,), "DT": (HEADS,), "Trap": (HEADS,),
            "Angles": (HEADS, ANGLES),
        }  # fmt: skip
        self.parts = nn.ModuleDict({n: nn.Linear(WIDTH, math.prod(s))
                                    for n, s in self.sizes.items()})  # fmt: skip
        self.B_bias, self.C_bias = (nn.Parameter(torch.randn(HEADS, rank, STATE))
                                    for _ in range(2))  # fmt: skip
        self.ranks = nn.ParameterList(torch.randn(HEADS, rank, CHANNEL) for _ in range(3))
        self.D = nn.Parameter(torch.randn(HEADS))
        self.out_proj = nn.Linear(HEADS * CHANNEL, WIDTH)

    def mix(self, u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        a = {n: self.parts[n](u).unflatten(-1, s) for n, s in self.sizes.items()}
        step = functional.softplus(a.pop("DT"))
        log_decay, z = -functional.softplus(a.pop("A")) * step, a.pop("Z")
        timed = {"ADT": log_decay, "DT": step, "Trap": a.pop("Trap")}
        a |= {n: x.transpose(1, 2) for n, x in timed.items()}
        a |= {"D": self.D, "Z": z if self.gated else None, "cu_seqlens": cu_seqlens}
        if self.rank == 1:
            a |= {"Q": a["Q"].squeeze(2), "K": a["K"].squeeze(2)}
            y = self.space["mamba3_siso_combined"](
                **a, Q_bias=self.C_bias.squeeze(1), K_bias=self.B_bias.squeeze(1))  # fmt: skip
            y = y if self.gated else y * functional.silu(z)
        else:
            x, into, out = self.ranks
            y = self.space["mamba3_mimo_combined"](
                **a, Q_bias=self.C_bias, K_bias=self.B_bias, MIMO_V=x, MIMO_Z=into,
                MIMO_Out=out if self.gated else None)  # fmt: skip
            if not self.gated:
                gate = functional.silu(z[:, :, None] * into.transpose(0, 1))
                y = (functional.normalize(y, dim=-1) * gate * out.transpose(0, 1)).sum(2)
        return self.out_proj(y.to(u.dtype).flatten(-2))

    def forward(self, hidden_states, attention_mask=None, cu_seqlens=None, inference_params=None):
        if attention_mask is None:
            return self.mix(hidden_states, cu_seqlens)
        kept = attention_mask.bool()
        ends = functional.pad(kept.sum(1).cumsum(0), (1, 0))
        y = torch.zeros_like(hidden_states)
        y[kept] = self.mix(hidden_states[kept][None], ends)[0]
        return y


@pytest.fixture
def mamba3(monkeypatch):
    """A layer of either package's name."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def make(package: str, rank: int = 1, groups: int = 1, gated: bool = True) -> _Mamba3:
        file = types.ModuleType(package)
        file.__dict__.update(mamba3_siso_combined=_kernel,
                             mamba3_mimo_combined=_kernel if rank > 1 else None)  # fmt: skip
        sys.modules[package] = file
        made = type("Mamba3", (_Mamba3,), {"__module__": package, "__qualname__": "Mamba3"})
        torch.manual_seed(0)
        return made(file.__dict__, rank, groups, gated).to(torch.float64)

    return make


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_mamba3_of_either_package(mamba3, rank, groups, gated):
    layer = mamba3("mamba_ssm.modules.mamba3", rank, groups, gated)
    for length in (1, 2, 9):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        found = from_layer(layer, x)
        assert found.system == "mamba3"
        assert found.error <= DOUBLE
        assert found.attrs["scan_error"] <= DOUBLE
    ranks = () if rank == 1 else (rank,)
    assert found.values.shape == (2, 9, HEADS, *ranks, CHANNEL)
    layer = mamba3("fla.layers.mamba3", rank, groups, gated)
    for padding in (slice(3), slice(-3, None)):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, padding] = 0
        found = from_layer(layer, x, attention_mask=mask)
        assert found.error <= DOUBLE
        y, real = dsf.scan(found.recurrence, found.values), mask[1].bool()
        assert not y[1, ~real].any()
        alone = from_layer(layer, x[1:, real])
        assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= DOUBLE


def test_mamba3_rounds_what_its_kernel_rounds(mamba3):
    """A float32 layer whose kernel is given, and gives back, numbers of 16 bit."""
    layer = mamba3("mamba_ssm.modules.mamba3").float()
    names = ("Q", "K", "V", "Trap", "Angles", "Z")

    def rounding(**a):
        return _kernel(**{**a, **{n: a[n].bfloat16().float() for n in names}}).bfloat16()

    layer.space["mamba3_siso_combined"] = rounding
    found = from_layer(layer, torch.randn(2, 9, WIDTH), tolerance=SIXTEEN_BITS)
    assert found.error <= UNROUNDED / 5
    layer.space["mamba3_siso_combined"] = lambda **a: _kernel(**a).bfloat16()
    assert from_layer(layer, torch.randn(2, 9, WIDTH), tolerance=SIXTEEN_BITS).error > UNROUNDED


def test_mamba3_refuses_caches_and_packed_rows(mamba3):
    layer, x = mamba3("mamba_ssm.modules.mamba3"), torch.randn(1, 6, WIDTH, dtype=torch.float64)
    with pytest.raises(DsfUnsupportedError, match="inference_params: expected none"):
        from_layer(layer, x, inference_params=object())
    with pytest.raises(DsfUnsupportedError, match="cu_seqlens: expected one sequence"):
        from_layer(layer, x, cu_seqlens=torch.tensor([0, 2, 6]))
    layer.space["mamba3_siso_combined"] = None
    layer.space["__name__"] = "mamba_ssm.modules.mamba3"
    with pytest.raises(DsfUnsupportedError, match="to have a function 'mamba3_siso_combined'"):
        from_layer(layer, x)


class _Attention(nn.Module):
    """mamba_ssm's MHA: one projection, a short convolution, an MLP beside, heads shared."""

    def __init__(self, *, causal: bool, groups: int = HEADS, conv: int = 0, mlp: int = 0):
        super().__init__()
        self.causal, self.groups, self.conv, self.mlp = causal, groups, conv, mlp
        mixed = CHANNEL * (HEADS + 2 * groups)
        self.in_proj = nn.Linear(WIDTH, mixed + mlp)
        self.conv1d = nn.Conv1d(mixed, mixed, max(conv, 1), padding=max(conv - 1, 0), groups=mixed)
        self.out_proj = nn.Linear(HEADS * CHANNEL + mlp // 2, WIDTH)

    def forward(self, x: Tensor, inference_params=None) -> Tensor:
        length = x.shape[1]
        qkv, beside = self.in_proj(x).split([self.conv1d.in_channels, self.mlp], -1)
        if self.conv:
            qkv = self.conv1d(qkv.mT)[..., :length].mT
        q, k, v = (y.unflatten(-1, (-1, CHANNEL)).transpose(1, 2) for y in qkv.split(
            [HEADS * CHANNEL, *[self.groups * CHANNEL] * 2], -1))  # fmt: skip
        k, v = (y.repeat_interleave(HEADS // self.groups, 1) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=0.4)
        y = y.transpose(1, 2).flatten(-2)
        up, gate = beside.chunk(2, -1)
        return self.out_proj(torch.cat([y, up * functional.silu(gate)], -1))


ATTENTION = [
    {"causal": True}, {"causal": False}, {"causal": True, "groups": 2, "conv": 3, "mlp": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", ATTENTION)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_attention(options, length):
    made = type("MHA", (_Attention,), {"__module__": "mamba_ssm.modules.mha"})
    made.__qualname__ = "MHA"
    layer = made(**options).to(torch.float64)
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    before = layer(x)
    found = from_layer(layer, x)
    assert found.system == "softmax_attention"
    assert found.error <= DOUBLE
    assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)
    with pytest.raises(DsfUnsupportedError, match="inference_params: expected none"):
        from_layer(layer, x, inference_params=object())
