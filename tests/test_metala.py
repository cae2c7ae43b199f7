"""MetaLA against the released layer, its parallel forms, and the paper's constructions."""

import math

import pytest
import torch
from model_laws import (
    assert_near,
    check_all,
    fresh_input,
    load_golden,
    load_parameters,
    normal,
    shaken,
    stepped,
)

import dsf
from dsf.errors import DsfUnsupportedError, DsfValueError
from dsf.models.metala import MetaLA, metala_recurrence
from dsf.transitions import Diagonal

GOLDEN_ATOL = 1e-9
EXACT = 1e-13
PAIR = 1e-12


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def core(length=32, n_state=5, low=-0.3):
    """One head: queries, log decays in (low, 0), values, and the recurrence."""
    q, v = normal(1, length, 1, n_state), normal(1, length, 1, 4, seed=1)
    log_decay = low * torch.sigmoid(normal(1, length, 1, n_state, seed=2))
    return q, log_decay, v, metala_recurrence(q, log_decay)


# -- the released layer ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    case = load_golden("metala_layer")
    layer = MetaLA(
        16, int(case["opt.num_heads"]), norm_eps=float(case["opt.layernorm_eps"]),
        temperature=float(case["opt.decay_exponent_normalizer"]),
    ).double()  # fmt: skip
    load_parameters(layer, case)
    return layer, case


@torch.no_grad()
def test_golden_layer(released):
    layer, case = released
    x = case["in.x"]
    r, values = layer.recurrence(x)
    near(values.transpose(1, 2), case["mid.v"], GOLDEN_ATOL)
    near(r.A.log_decay.transpose(1, 2), case["mid.log_alpha"], GOLDEN_ATOL)
    near(r.B[..., 0].transpose(1, 2), case["mid.k_is_1_minus_alpha"], GOLDEN_ATOL)
    y, state = dsf.scan(r, values, return_state=True)
    near(y.transpose(1, 2), case["mid.o_recurrence"], GOLDEN_ATOL)
    near(state, case["out.final_state"], GOLDEN_ATOL)
    near(dsf.materialise(r), case["weights"], GOLDEN_ATOL)
    near(layer(x), case["out.y"], GOLDEN_ATOL)
    near(stepped(layer, x), case["out.y"], GOLDEN_ATOL)


def test_released_layer_keeps_the_contract(released):
    check_all(released[0], released[1]["in.x"])


OPTIONS = {
    "paper": {"convention": "paper"},
    "no_convolution": {"conv_size": 0},
    "convolution_of_one": {"conv_size": 1},
    "convolution_of_two": {"conv_size": 2, "convention": "paper"},
    "no_augmentation": {"self_augmentation": False},
    "wide_keys": {"key_width": 12},
    "both_ways": {"causal": False},
    "both_ways_as_printed": {"causal": False, "convention": "paper", "conv_size": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(MetaLA(8, 2, **OPTIONS[name]), size=0.3), fresh_input(8))


@torch.no_grad()
def test_conventions_are_two_functions():
    """Code: N^(-1/2) on the state term alone, norm a head; paper: neither. Each its own pair."""
    torch.manual_seed(0)
    code = shaken(MetaLA(16, 2, convention="code"), size=0.3)
    paper = MetaLA(16, 2, convention="paper").double()
    paper.load_state_dict(code.state_dict())
    x = fresh_input(16)
    assert float((code(x) - paper(x)).abs().max()) > 1e-3
    for layer in (code, paper):
        r, values = layer.recurrence(x)
        weights = dsf.materialise(r)
        y = layer.readout(torch.einsum("bhts,bshc->bthc", weights, values), x)
        near(y, layer(x), PAIR)
        near(stepped(layer, x), layer(x), PAIR)
    one, other = (layer.recurrence(x)[0].C for layer in (code, paper))
    assert code.scale == 4**-0.5
    assert paper.scale == 1.0
    assert one.shape == other.shape


@torch.no_grad()
def test_augmentation_is_the_diagonal_of_the_parallel_form():
    """sum(q w (1 - alpha)) v = diag(rowsum(Q B W)) V; 1/2 at w = 0, and LN(o + 1/2) = LN(o)."""
    torch.manual_seed(0)
    layer = shaken(MetaLA(8, 2), size=0.3)
    x = fresh_input(8)
    r, v = layer.recurrence(x)
    q = r.C[..., 0, :] / layer.scale
    balance = layer.aug_balance.unflatten(0, (2, -1))
    own = (q * balance * r.B[..., 0]).sum(-1)
    parallel = torch.diag_embed(own.transpose(1, 2)) @ v.transpose(1, 2)
    near(own[..., None] * v, parallel.transpose(1, 2), 1e-14)
    y = dsf.scan(r, v)
    with_term = torch.nn.functional.layer_norm(y + torch.sigmoid(own[..., None] * v), (4,))
    gate = torch.nn.functional.silu(layer.g_proj(layer._convolved(x)))
    near(layer.out_proj(gate * with_term.flatten(2)), layer(x), PAIR)
    layer.aug_balance.zero_()
    without = MetaLA(8, 2, self_augmentation=False).double()
    without.load_state_dict(layer.state_dict(), strict=False)
    near(layer(x), without(x), PAIR)


@torch.no_grad()
def test_both_ways_is_the_causal_map_and_its_mirror():
    q, log_decay, v, r = core()
    both = metala_recurrence(q, log_decay, causal=False)
    mirror = dsf.materialise(metala_recurrence(q.flip(1), log_decay.flip(1))).flip(-2, -1)
    expected = dsf.materialise(r) + mirror.triu(1)
    near(dsf.materialise(both), expected)
    for backend in ("reference", "auto"):
        near(dsf.scan(both, v, backend), torch.einsum("bhts,bshc->bthc", expected, v))
    a, write = log_decay[0, :, 0].exp(), -torch.expm1(log_decay[0, :, 0])
    near(expected[0, 0, 3, 7], (q[0, 3, 0] * a[3:7].prod(0) * write[7]).sum())
    torch.manual_seed(0)
    layer = shaken(MetaLA(8, 2, conv_size=0, causal=False), size=0.3)
    x = fresh_input(8)
    near(layer(x.flip(1)), layer(x).flip(1))
    with pytest.raises(DsfUnsupportedError, match="expected a causal layer"):
        layer.step(x[:, 0])
    with pytest.raises(DsfValueError, match="initial_state: expected None"):
        metala_recurrence(
            q, log_decay, causal=False, initial_state=torch.zeros(1, 1, 5, 4).double()
        )


@torch.no_grad()
def test_masked_tokens_still_decay_the_state():
    torch.manual_seed(0)
    layer = shaken(MetaLA(8, 2, conv_size=0), size=0.3)
    x, real = fresh_input(8, length=6), torch.ones(2, 6, dtype=torch.bool)
    real[:, -1] = False
    r, v = layer.recurrence(x, key_mask=real)
    assert not bool(v[:, -1].any())
    _, before = dsf.scan(r.time_slice(0, 5), v[:, :5], return_state=True)
    _, after = dsf.scan(r, v, return_state=True)
    near(after, r.A.decay()[:, -1, :, :, None] * before)
    assert float((r.A.decay()[:, -1] - 1).abs().max()) > 1e-3
    near(layer(x, key_mask=real)[:, :5], layer(x)[:, :5], PAIR)


def test_counts():
    layer = MetaLA(1024, 8)
    assert sum(p.numel() for p in layer.parameters()) == 4_199_936
    _, state = layer.step(torch.zeros(1, 1024))
    assert state.memory.numel() == 65_536


# -- forms of the core -------------------------------------------------------------------------


def test_recurrence_map_and_parallel_forms():
    q, log_decay, v, r = core()
    a, q0, v0 = log_decay[0, :, 0].exp(), q[0, :, 0], v[0, :, 0]
    total = log_decay[0, :, 0].cumsum(0)
    elementwise = torch.zeros(32, 32, dtype=torch.float64)
    for t in range(32):
        for j in range(t + 1):
            elementwise[t, j] = (q0[t] * a[j + 1 : t + 1].prod(0) * (1 - a[j])).sum()
    logs = torch.where(torch.ones(32, 32).tril()[..., None] > 0,
                       total[:, None] - total[None], -torch.inf)  # fmt: skip
    in_logs = (q0[:, None] * logs.exp() * (1 - a)[None]).sum(-1)
    near(dsf.scan(r, v)[0, :, 0], elementwise @ v0)
    near(dsf.materialise(r)[0, 0], elementwise)
    near(in_logs, elementwise)
    product = total.exp()
    assert float(product.min()) > 1e-8  # the printed parallel form divides by it
    divided = ((q0 * product) @ ((1 - a) / product).T).tril()
    near(divided, elementwise, 1e-12)


def test_strong_decay_is_safe_where_the_printed_form_is_not():
    q, log_decay, v, r = core(length=60, low=-60.0)
    total = log_decay[0, :, 0].cumsum(0)
    divided = (q[0, :, 0] * total.exp()) @ (-torch.expm1(log_decay[0, :, 0]) / total.exp()).T
    assert not bool(torch.isfinite(divided.tril()).all())
    near(dsf.scan(r, v), dsf.scan(r, v, "reference"))


def test_row_sums_and_hull():
    q, log_decay, v, r = core()
    left = 1 - log_decay.cumsum(1).exp()
    near(dsf.materialise(r)[0, 0].sum(-1), (q * left).sum(-1)[0, :, 0])
    biggest = float(v.norm(dim=-1).max())
    for t in range(1, 33):
        _, state = dsf.scan(r.time_slice(0, t), v[:, :t], return_state=True)
        assert bool((state[0, 0].norm(dim=-1) <= left[0, t - 1, 0] * biggest + 1e-12).all())


def test_any_causal_softmax_map_with_one_channel_a_row():
    """A2.2: alpha_j = S_(j-1)/S_j reproduces a row; L channels and one-hot queries all rows."""
    length = 40
    logits = normal(length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
    target = torch.softmax(logits, -1)
    sums = target.cumsum(-1)  # row t is channel t
    before = torch.cat([torch.zeros(length, 1, dtype=torch.float64), sums[:, :-1]], 1)
    alpha = torch.where(sums > 0, before / sums, 0.0)
    alpha = alpha.tril() + torch.ones_like(alpha).triu(1)
    assert bool(((alpha >= 0) & (alpha <= 1)).all())
    assert not bool(alpha[:, 0].any())
    q = torch.eye(length, dtype=torch.float64)[None, :, None]
    r = metala_recurrence(q, Diagonal.from_decay(alpha.T[None, :, None]).log_decay)
    near(dsf.materialise(r)[0, 0], target, 1e-14)


def test_logits_of_the_key_alone_take_one_channel():
    s = normal(40)
    log_total = torch.logcumsumexp(s, 0)
    before = torch.cat([s.new_full((1,), -torch.inf), log_total[:-1]])
    log_decay = (before - log_total)[None, :, None, None]
    r = metala_recurrence(torch.ones_like(log_decay), log_decay)
    future = torch.ones(40, 40).triu(1) > 0
    target = torch.softmax(s.expand(40, 40).masked_fill(future, -torch.inf), -1)
    near(dsf.materialise(r)[0, 0], target, 1e-14)


def test_overwriting_one_row():
    """A2.1: alpha = 1 - e_1 with k = 1 - alpha replaces row 1 and leaves the rest bit for bit."""
    old, new = normal(1, 1, 5, 4), normal(1, 1, 1, 4, seed=1)
    alpha = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    alpha[..., 0] = 0.0
    log_decay = Diagonal.from_decay(alpha).log_decay
    tied = metala_recurrence(torch.ones_like(alpha), log_decay, initial_state=old)
    _, state = dsf.scan(tied, new, return_state=True)
    assert torch.equal(state[0, 0, 0], new[0, 0, 0])
    assert torch.equal(state[0, 0, 1:], old[0, 0, 1:])
    free = tied.replace(B=torch.ones_like(tied.B))  # the key k = 1 of the printed proof
    _, state = dsf.scan(free, new, return_state=True)
    near(state[0, 0, 1:], old[0, 0, 1:] + new[0, 0, 0])


def test_order_and_monotone_single_channel():
    r = core()[3]
    weights = dsf.materialise(r)[0, 0]
    ranks = [int(torch.linalg.matrix_rank(weights[t:, :t], rtol=1e-10)) for t in range(1, 32)]
    assert max(ranks) == 5
    log_decay = -torch.rand(1, 30, 1, 1, dtype=torch.float64)
    alone = metala_recurrence(torch.ones(1, 30, 1, 1, dtype=torch.float64), log_decay)
    column = dsf.materialise(alone)[0, 0].abs()
    for j in range(30):
        assert bool((column[j + 1 :, j] <= column[j:-1, j] + 1e-15).all())


@torch.no_grad()
def gate_at(x):
    """alpha, its log and the write of a layer whose pre-activations are x."""
    layer = MetaLA(2 * len(x), 1, conv_size=0).double()
    layer.k_gate.weight.zero_()
    layer.k_gate.weight[:, 0] = torch.tensor(x, dtype=torch.float64)
    token = torch.zeros(1, 1, 2 * len(x), dtype=torch.float64)
    token[..., 0] = 1.0
    r, _ = layer.recurrence(token)
    return r.A.decay()[0, 0, 0], r.A.log_decay[0, 0, 0], r.B[0, 0, 0, :, 0]


def test_decay_table():
    """sigmoid(x)^(1/16) to the printed digits (the last half-life is 1651.49, printed 1652)."""
    alpha, log_decay, write = gate_at([-80.0, -20.0, -5.0, 0.0, 2.0, 5.0])
    printed = [
        (0.0067, 0.993, 4, 3), (0.287, 0.713, 3, 3), (0.731, 0.269, 3, 3),
        (0.9576, 0.0424, 4, 4), (0.9921, 0.0079, 4, 4), (0.99958, 0.00042, 5, 5),
    ]  # fmt: skip
    for got, kept, (a, w, digits, write_digits) in zip(alpha, write, printed, strict=True):
        assert round(float(got), digits) == a
        assert round(float(kept), write_digits) == w
    half_life = math.log(0.5) / log_decay
    for got, steps in zip(half_life, [0.1, 0.6, 2.2, 16, 87, 1651.5], strict=True):
        assert abs(float(got) - steps) <= max(0.05, 5e-3 * steps)


def test_the_write_keeps_its_digits_next_to_one():
    x = [10.0, 20.0, 30.0, 35.0]
    _, _, write = gate_at(x)
    for got, at in zip(write, x, strict=True):
        small = math.log1p(math.exp(-at)) / 16
        assert abs(float(got) / (small - small**2 / 2 + small**3 / 6) - 1) <= 1e-14


def test_refusals():
    with pytest.raises(DsfValueError, match="convention: expected one of"):
        MetaLA(8, convention="other")
    with pytest.raises(DsfValueError, match="expected a divisor of key_width=6, got 4"):
        MetaLA(12, 4)
