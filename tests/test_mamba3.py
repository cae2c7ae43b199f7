"""Mamba-3 against the plain loop of its equations, its complex form, and Mamba-2."""

import math

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.mamba2 import ssd_recurrence
from dsf.models.mamba3 import Mamba3, mamba3_recurrence, turned

EXACT = 1e-12


def inputs(length=13, rank=2, n_state=6, channel=3, batch=2, head=2):
    """Log decays, steps, shares, B, C, D and values of one seed."""
    s = torch.nn.functional.softplus(normal(batch, length, head))
    log_decay = -torch.nn.functional.softplus(normal(batch, length, head, seed=1)) * s
    share = torch.sigmoid(normal(batch, length, head, seed=2))
    B, C = (normal(batch, length, head, rank, n_state, seed=i) for i in (3, 4))
    u = normal(batch, length, head, rank, channel, seed=5)
    return log_decay, s, share, B, C, normal(head, seed=6), u


def plain(log_decay, s, share, B, C, D, u):
    """The two-term update, token by token."""
    state = torch.zeros(*u.shape[:1], u.shape[2], B.shape[-1], u.shape[-1], dtype=u.dtype)
    outputs = []
    for t in range(u.shape[1]):
        a = log_decay[:, t].exp()[..., None, None]
        state = a * state
        if t:
            weight = (1 - share[:, t]) * s[:, t]
            pushed = torch.einsum("bhrn,bhrp->bhnp", B[:, t - 1], u[:, t - 1])
            state = state + weight[..., None, None] * a * pushed
        own = torch.einsum("bhrn,bhrp->bhnp", B[:, t], u[:, t])
        state = state + (share[:, t] * s[:, t])[..., None, None] * own
        read = torch.einsum("bhrn,bhnp->bhrp", C[:, t], state)
        outputs.append(read + D[:, None, None] * u[:, t])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_scan_is_the_two_term_update(rank, length):
    *coefficients, u = inputs(length, rank)
    r = mamba3_recurrence(*coefficients)
    assert r.n_state == 6 + rank
    for backend in ("reference", "auto"):
        y = dsf.scan(r, u, backend)
        y = y if rank > 1 else y.unsqueeze(3)
        assert_near(backend, y, plain(*coefficients, u), EXACT)


def test_no_token():
    *coefficients, u = inputs(0)
    assert dsf.scan(mamba3_recurrence(*coefficients), u).shape == (2, 0, 2, 2, 3)


def test_a_cut_sequence_goes_on():
    *coefficients, u = inputs()
    *parts, D = coefficients
    first = mamba3_recurrence(*(x[:, :5] for x in parts), D)
    y, state = dsf.scan(first, u[:, :5], return_state=True)
    later = mamba3_recurrence(
        *(x[:, 5:] for x in parts), D, previous=parts[3][:, 4], initial_state=state
    )
    y = torch.cat([y, dsf.scan(later, u[:, 5:])], 1)
    assert_near("cut", y, plain(*coefficients, u), EXACT)


def test_the_euler_rule_is_mamba2():
    log_decay, s, share, B, C, D, _ = inputs(rank=1)
    r = mamba3_recurrence(log_decay, s, torch.ones_like(share), B, C, D)
    old = ssd_recurrence(log_decay, B[:, :, :, 0], C[:, :, :, 0], D, write_strength=s)
    assert_near("map", dsf.materialise(r), dsf.materialise(old), EXACT)


def test_turning_both_is_a_complex_state():
    """With pairs as complex numbers the state turns by minus each angle: Re(conj(c) h)."""
    log_decay, s, share, B, C, D, u = inputs(rank=1, n_state=4)
    angle = normal(2, 13, 2, 2, seed=7)
    total = angle.cumsum(1)
    r = mamba3_recurrence(log_decay, s, share, turned(B, total), turned(C, total), D)
    b, c = (torch.view_as_complex(x[:, :, :, 0].unflatten(-1, (2, 2)).contiguous())
            for x in (B, C))  # fmt: skip
    state, outputs = torch.zeros(2, 2, 2, 3, dtype=torch.complex128), []
    for t in range(13):
        a = torch.complex(log_decay[:, t, :, None].expand(2, 2, 2), -angle[:, t]).exp()
        state = a[..., None] * state
        if t:
            weight = ((1 - share[:, t]) * s[:, t])[..., None] * a * b[:, t - 1]
            state = state + weight[..., None] * u[:, t - 1]
        own = (share[:, t] * s[:, t])[..., None] * b[:, t]
        state = state + own[..., None] * u[:, t]
        y = torch.einsum("bhn,bhnp->bhp", c[:, t].conj(), state).real
        outputs.append(y + D[:, None] * u[:, t, :, 0])
    assert_near("complex", dsf.scan(r, u), torch.stack(outputs, 1), EXACT)


def test_pairings_are_the_same_up_to_order():
    x, angle = normal(1, 3, 2, 1, 8), normal(1, 3, 2, 3, seed=1)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half = turned(x, angle, "half")[..., order]
    assert_near("order", half, turned(x[..., order], angle), 0.0)
    assert torch.equal(turned(x, angle)[..., 6:], x[..., 6:])
    with pytest.raises(DsfValueError, match="pairing: expected one of"):
        turned(x, angle, "other")


@torch.no_grad()
def layer_by_hand(layer, x):
    """The released block in its own words: split, norms, biases, angles, loop, gate, ranks."""
    z, u, b, c, dt, decay, mix, angle = layer.in_proj(x).split(layer.parts, -1)
    heads, rank, n = layer.n_head, layer.rank, layer.n_state
    s = torch.nn.functional.softplus(dt + layer.dt_bias)
    log_decay = s * (-torch.nn.functional.softplus(decay)).clamp(max=-layer.decay_floor)
    turn = torch.zeros(x.shape[0], heads, layer.n_pair, dtype=x.dtype)
    keys, reads = [], []
    for t in range(x.shape[1]):
        turn = turn + math.pi * torch.tanh(angle[:, t, None]) * s[:, t, :, None]
        for part, norm, bias, out in (
            (b, layer.B_norm, layer.B_bias, keys), (c, layer.C_norm, layer.C_bias, reads),
        ):  # fmt: skip
            rows = norm(part[:, t].reshape(-1, rank, layer.n_group, n))
            rows = rows.repeat_interleave(heads // layer.n_group, 2).transpose(1, 2) + bias
            out.append(turned(rows[:, None], turn[:, None], layer.pairing)[:, 0])
    values = u.unflatten(-1, (heads, 1, -1))
    values = values * layer.mimo_x if rank > 1 else values
    keys, reads = torch.stack(keys, 1), torch.stack(reads, 1)
    y = plain(log_decay, s, torch.sigmoid(mix), keys, reads, layer.D, values)
    z = z.unflatten(-1, (heads, 1, -1))
    z = z * layer.mimo_z if rank > 1 else z
    if layer.norm is not None:
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + layer.norm.eps)
        y = y * scale * layer.norm.weight.unflatten(0, (heads, 1, -1))
    y = y * torch.nn.functional.silu(z)
    y = (y * layer.mimo_o if rank > 1 else y).sum(3)
    return layer.out_proj(y.flatten(-2))


OPTIONS = [
    {},
    {"rank": 2, "pairing": "half"},
    {"rank": 3, "head_norm": True, "rotated": 1.0, "n_group": 2},
    {"head_norm": True, "n_group": 4, "n_state": 6},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_in_its_own_words(options):
    torch.manual_seed(0)
    layer = shaken(Mamba3(8, **{"head_width": 4, "n_state": 4, **options}), 0.5)
    x = fresh_input(8)
    assert_near("layer", layer(x).detach(), layer_by_hand(layer, x), EXACT)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(Mamba3(8, **{"head_width": 4, "n_state": 4, **options})), fresh_input(8))


def test_sizes_are_checked():
    *parts, B, C, D, _ = inputs()
    with pytest.raises(DsfShapeError, match=r"C: expected shape \(2, 13, 2, 2, 6\), got .* by B"):
        mamba3_recurrence(*parts, B, C[:, :, :, :, :4], D)
    with pytest.raises(DsfShapeError, match=r"angle: expected at most half .* got 4 for 6"):
        turned(B, normal(2, 13, 2, 4))
    with pytest.raises(DsfValueError, match="rank: expected at least 1, got 0"):
        Mamba3(8, head_width=4, n_state=4, rank=0)
    with pytest.raises(DsfValueError, match="Mamba3: pairing: expected one of"):
        Mamba3(8, head_width=4, n_state=4, pairing="other")
    for bad in ({"n_state": 5}, {"rotated": 2.0}, {"rotated": 0.1}):
        with pytest.raises(DsfValueError, match="n_state, rotated: expected an even number"):
            Mamba3(8, **{"head_width": 4, "n_state": 4, **bad})
