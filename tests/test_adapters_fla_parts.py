"""fla's Mamba, Mamba-2 and MoM on stand-ins: layers whose scan is inline or sorted by memory."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from fla_loops import unit
from fla_stand_ins import rows
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, relative_error

DOUBLE = 1e-13
WIDTH, INNER, STATE, HEADS, CHANNEL, CONV = 6, 8, 3, 4, 2, 3


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None]


class _Mamba(nn.Module):
    """S6 with its scan inline, one state at a time; padding zero before and after the taps."""

    def __init__(self):
        super().__init__()
        self.dt_rank, self.ssm_state_size, self.act = 2, STATE, functional.silu
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)
        self.conv1d = nn.Conv1d(INNER, INNER, CONV, padding=CONV - 1, groups=INNER)
        self.x_proj, self.dt_proj = nn.Linear(INNER, 2 + 2 * STATE), nn.Linear(2, INNER)
        self.A_log, self.D = (nn.Parameter(torch.randn(*s)) for s in ((INNER, STATE), (INNER,)))

    def forward(self, hidden_states: Tensor, attention_mask=None) -> Tensor:
        length = hidden_states.shape[1]
        u, gate = self.in_proj(hidden_states).chunk(2, -1)
        u = self.act(self.conv1d(_masked(u, attention_mask).mT)[..., :length].mT)
        u = _masked(u, attention_mask)
        dt, b, c = self.x_proj(u).split([2, STATE, STATE], -1)
        dt = functional.softplus(self.dt_proj(dt))
        state, out = u.new_zeros(len(u), INNER, STATE), []
        for t in range(length):
            state = (-self.A_log.exp() * dt[:, t, :, None]).exp() * state
            state = state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            out.append((state * c[:, t, None]).sum(-1) + self.D * u[:, t])
        return self.out_proj(torch.stack(out, 1) * self.act(gate))


class _Mamba2(nn.Module):
    """SSD with its scan inline: there head h reads group h mod groups."""

    def __init__(self, groups: int, normed: bool, skips: int):
        super().__init__()
        self.intermediate_size, self.ssm_state_size, self.n_groups = INNER, STATE, groups
        self.num_heads, self.conv_dim = HEADS, INNER + 2 * groups * STATE
        self.dt_limit, self.act = (0.05, 2.0), functional.silu
        self.in_proj = nn.Linear(WIDTH, INNER + self.conv_dim + HEADS)
        mixed = self.conv_dim
        self.conv1d = nn.Conv1d(mixed, mixed, CONV, padding=CONV - 1, groups=mixed)
        self.A_log, self.dt_bias = (nn.Parameter(torch.randn(HEADS)) for _ in range(2))
        self.D, self.norm = nn.Parameter(torch.randn(skips)), _Norm() if normed else None
        self.out_proj = nn.Linear(INNER, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask=None) -> Tensor:
        x = _masked(hidden_states, attention_mask)
        length = x.shape[1]
        gate, mixed, dt = self.in_proj(x).split([INNER, self.conv_dim, HEADS], -1)
        mixed = self.act(self.conv1d(_masked(mixed, attention_mask).mT)[..., :length].mT)
        shared = self.n_groups * STATE
        u, b, c = _masked(mixed, attention_mask).split([INNER, shared, shared], -1)
        u = u.unflatten(-1, (HEADS, CHANNEL))
        b, c = (y.unflatten(-1, (self.n_groups, STATE)).repeat(1, 1, HEADS // self.n_groups, 1)
                for y in (b, c))  # fmt: skip
        dt = functional.softplus(dt + self.dt_bias).clamp(*self.dt_limit)
        skip = self.D.view(HEADS, -1)
        state, out = u.new_zeros(len(u), HEADS, STATE, CHANNEL), []
        for t in range(length):
            state = (-self.A_log.exp() * dt[:, t]).exp()[..., None, None] * state
            state = state + b[:, t, ..., None] * (dt[:, t, :, None] * u[:, t])[..., None, :]
            out.append((c[:, t, ..., None] * state).sum(-2) + skip * u[:, t])
        y = torch.stack(out, 1).flatten(-2)
        return self.out_proj(y * self.act(gate) if self.norm is None else self.norm(y, gate))


class _Norm(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.normalize(x * functional.silu(gate), dim=-1)


class _Mom(nn.Module):
    """Tokens sorted by row and memory, one call of the op, outputs put back and weighted."""

    def __init__(self, space: dict, shared: bool):
        super().__init__()
        self.space, self.shared_mem, self.num_memories, self.topk = space, shared, 3, 2
        self.gate = nn.Linear(WIDTH, 3)
        sizes = {"q": CHANNEL, "k": CHANNEL, "v": CHANNEL + 1, "g": 1, "beta": 1}
        self.parts = nn.ModuleDict(
            {f"{n}{m}": nn.Linear(WIDTH, HEADS * size) for n, size in sizes.items()
             for m in range(4)})  # fmt: skip
        self.o_norm, self.o_proj = _Norm(), nn.Linear(HEADS * (CHANNEL + 1), WIDTH)
        self.g_proj = nn.Linear(WIDTH, HEADS * (CHANNEL + 1))

    def op(self, x: Tensor, memory: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """x (1, token, width) or (batch, time, width), each token by the weights of its memory."""
        a = {n: sum((memory == m)[..., None] * self.parts[f"{n}{m}"](x) for m in range(4))
             for n in ("q", "k", "v", "g", "beta")}  # fmt: skip
        a = {n: y.unflatten(-1, (HEADS, -1)) for n, y in a.items()}
        return self.space["chunk_gated_delta_rule"](
            q=a["q"], k=a["k"], v=a["v"], g=-functional.softplus(a["g"]).squeeze(-1),
            beta=a["beta"].sigmoid().squeeze(-1), use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens)[0]  # fmt: skip

    def forward(self, hidden_states: Tensor, attention_mask=None):
        x = hidden_states
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if attention_mask is None \
            else attention_mask == 1  # fmt: skip
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        _, cut, order, _, real, real2 = self.space["transform"](x, chosen, mask)
        moved = x.flatten(0, 1).repeat_interleave(2, 0)[order][cut]
        moved = moved.view(len(x), 3, -1, WIDTH).transpose(0, 1)[real2]
        memory = real2.nonzero()[:, 0][None]
        ends = functional.pad(real2.flatten(0, 1).sum(1).cumsum(0), (1, 0)).unique()
        o = self.op(moved[None], memory, ends)[0].flatten(1)
        back = o.new_zeros(*real2.shape, o.shape[-1])
        back[real2] = o
        y = self.space["reconstruct"](
            back, indices=cut, sorted_indices=order, batch_size=len(x), seq_len=x.shape[1], topk=2,
            routing_weights=weights, mask=real)  # fmt: skip
        y = y.unflatten(-1, (HEADS, -1))
        if self.shared_mem:
            kept = attention_mask is not None
            ends = functional.pad(mask.sum(1).cumsum(0), (1, 0)) if kept else None
            o = self.op(x[mask][None] if kept else x, torch.tensor(3), ends)
            if kept:
                o, packed = torch.zeros_like(y), o
                o[mask] = packed[0]
            y = y + o
        return self.o_proj(self.o_norm(y, self.g_proj(x).view_as(y)).flatten(-2)), None


def _transform(x: Tensor, chosen: Tensor, mask: Tensor):
    """Indices as the released function gives them, by a stable sort."""
    batch = len(chosen)
    counts = (functional.one_hot(chosen, 3).sum(2) * mask[..., None]).sum(1)
    row = torch.arange(batch)[:, None, None].expand_as(chosen).masked_fill(~mask[..., None], batch)
    order = (3 * row + chosen).flatten().argsort(stable=True)
    ends = counts.flatten().cumsum(0)
    index = torch.arange(int(counts.max()))[None] + functional.pad(ends, (1, 0))[:-1, None]
    real = index < ends[:, None]
    cut = index.masked_fill(~real, 0)
    return None, cut, order, counts.max(), real, real.view(batch, 3, -1).transpose(0, 1)


def _reconstruct(
    y: Tensor, indices: Tensor, sorted_indices: Tensor, batch_size: int, seq_len: int, topk: int,
    routing_weights: Tensor, mask: Tensor,
) -> Tensor:  # fmt: skip
    flat = y.transpose(0, 1).flatten(0, 1)[mask]
    back = y.new_zeros(batch_size * seq_len * topk, y.shape[-1])
    back[sorted_indices[indices[mask]]] = flat
    return (back.view(batch_size, seq_len, topk, -1) * routing_weights[..., None]).sum(2)


def _gated_delta_rule(*, q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens):
    q, k = unit(q) * CHANNEL**-0.5, unit(k)
    out = torch.zeros_like(v)
    for row, span in rows(cu_seqlens, *q.shape[:2]):
        state = v.new_zeros(HEADS, k.shape[-1], v.shape[-1])
        for t in range(span.start, span.stop):
            state = g[row, t].exp()[:, None, None] * state
            error = v[row, t] - torch.einsum("hkv,hk->hv", state, k[row, t])
            state = state + torch.einsum("hk,hv->hkv", beta[row, t][:, None] * k[row, t], error)
            out[row, t] = torch.einsum("hkv,hk->hv", state, q[row, t])
    return out, None


@pytest.fixture
def stand_in(monkeypatch):
    """A layer of fla's class and module names."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def make(case: str) -> nn.Module:
        file, name, base, options = CASES[case]
        module = types.ModuleType(f"fla.layers.{file}")
        if base is _Mom:
            module.__dict__.update(
                transform=_transform, reconstruct=_reconstruct,
                chunk_gated_delta_rule=_gated_delta_rule,
                fused_recurrent_gated_delta_rule=_gated_delta_rule)  # fmt: skip
            options = {"space": module.__dict__, **options}
        sys.modules[module.__name__] = module
        made = type(name, (base,), {"__module__": module.__name__, "__qualname__": name})
        torch.manual_seed(0)
        return made(**options).to(torch.float64)

    return make


CASES: dict[str, tuple] = {
    "mamba": ("mamba", "Mamba", _Mamba, {}),
    "mamba2": ("mamba2", "Mamba2", _Mamba2, {"groups": 1, "normed": True, "skips": HEADS}),
    "mamba2, groups": ("mamba2", "Mamba2", _Mamba2,
                       {"groups": 2, "normed": False, "skips": HEADS}),
    "mamba2, skips of channels": ("mamba2", "Mamba2", _Mamba2,
                                  {"groups": 2, "normed": True, "skips": INNER}),
    "mom": ("mom", "MomAttention", _Mom, {"shared": False}),
    "mom, shared memory": ("mom", "MomAttention", _Mom, {"shared": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_inline_scans_and_sorted_memories(stand_in, case, padding):
    layer = stand_in(case)
    x, mask = torch.randn(2, 9, WIDTH, dtype=torch.float64), torch.ones(2, 9, dtype=torch.long)
    if padding != "none":
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
    arguments = {} if padding == "none" else {"attention_mask": mask}
    before = layer(x, **arguments)
    found = from_layer(layer, x, **arguments)
    assert found.error <= DOUBLE
    assert found.attrs["scan_error"] <= DOUBLE
    after = layer(x, **arguments)
    assert torch.equal(*(y if isinstance(y, Tensor) else y[0] for y in (before, after)))
    assert not any("forward" in vars(m) for m in layer.modules())
    y, real = dsf.scan(found.recurrence, found.values), mask[1].bool()
    alone = from_layer(layer, x[1:, real])
    assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= DOUBLE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences(stand_in, case, length):
    x = torch.randn(1, length, WIDTH, dtype=torch.float64)
    assert from_layer(stand_in(case), x).error <= DOUBLE


def test_groups_are_those_of_the_code_that_runs(stand_in):
    """Where the file says that mamba_ssm's kernels run, on the device that they run on."""
    layer = stand_in("mamba2, groups")
    sys.modules["fla.layers.mamba2"].__dict__["is_fast_path_available"] = True
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    assert from_layer(layer, x).error <= DOUBLE  # on a CPU the layer's own code all the same


def test_memories_out_of_order_are_refused(stand_in):
    layer = stand_in("mom")

    def shuffled(*args):
        none, cut, order, longest, real, real2 = _transform(*args)
        cut = cut.clone()
        cut[real] = cut[real].roll(1)
        return none, cut, order, longest, real, real2

    layer.space["transform"] = shuffled
    with pytest.raises(DsfUnsupportedError, match="argsort without stable=True"):
        from_layer(layer, torch.randn(1, 6, WIDTH, dtype=torch.float64))
