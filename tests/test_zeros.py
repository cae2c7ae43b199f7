"""ZeroS's layer and its forms against the released code and the quadratic definition."""

import math

import pytest
import torch
from model_laws import (
    check_all,
    fresh_input,
    load_golden,
    load_parameters,
    normal,
    shaken,
    stepped,
)
from zeros_cases import LENGTH, WIDTH, far, inputs, radial_by_definition

import dsf
from dsf.errors import DsfValueError
from dsf.models._zeros_core import Gates, PrefixSums, coefficients
from dsf.models.zeros import (
    ZeroS,
    deviation_logits,
    zeros_radial_recurrence,
    zeros_recurrence,
)
from dsf.transitions import BlockDiagonal, Diagonal, Identity

GOLDEN_ATOL = 1e-10
"""The code adds 1e-12 to its softmax denominator."""
EXACT = 1e-14
STATE_ATOL = 1e-12
REALISATIONS = ["raw", "running_max", "normalised"]


# -- the released code -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zeros_core_causal", "zeros_core_causal_zero_order"])
@pytest.mark.parametrize("realisation", REALISATIONS)
def test_golden_core(name, realisation):
    case = load_golden(name)
    first, higher, zero = case["in.gate_logits"].unbind(-1)
    zero = torch.tanh(zero) if bool(case["opt.zero_order"]) else None
    gates = (torch.sigmoid(first), torch.sigmoid(higher), zero)
    s, options = case["in.s_logits"][..., 0], {"realisation": realisation}
    system = zeros_recurrence(case["in.q_unit"], case["in.k_unit"], s, *gates, **options)
    assert far(dsf.scan(system, case["in.v"]), case["out.o"]) <= GOLDEN_ATOL
    assert far(dsf.materialise(system), case["weights"]) <= GOLDEN_ATOL
    radial = dsf.materialise(zeros_radial_recurrence(s, *gates, **options))
    assert far(radial, case["weights_radial"]) <= GOLDEN_ATOL


@pytest.mark.parametrize("name", ["zeros_layer", "zeros_layer_norm_zero_order"])
@pytest.mark.parametrize("realisation", REALISATIONS)
@torch.no_grad()
def test_golden_layer(name, realisation):
    case = load_golden(name)
    x = case["in.x"]
    layer = ZeroS(
        x.shape[-1], int(case["opt.n_head"]), causal=bool(case["opt.causal"]),
        zero_order=bool(case["opt.zero_order"]), use_norm=bool(case["opt.use_norm"]),
        norm_eps=float(case["opt.norm_eps"]), realisation=realisation,
    ).double()  # fmt: skip
    load_parameters(layer, case)
    query, key = layer.unit_query_key(x)
    assert far(query, case["mid.q_unit_after_rope"]) <= EXACT
    assert far(key, case["mid.k_unit_after_rope"]) <= EXACT
    assert far(layer.logits(x), case["mid.s_logits"][..., 0]) <= 1e-13
    system, values = layer.recurrence(x)
    assert far(dsf.scan(system, values), case["mid.o_before_norm"]) <= GOLDEN_ATOL
    assert far(dsf.materialise(system), case["weights"]) <= GOLDEN_ATOL
    assert far(layer(x), case["out.y"]) <= 1e-9
    if layer.is_causal:
        assert far(stepped(layer, x), case["out.y"]) <= 1e-9


OPTIONS = {
    "raw": {"realisation": "raw"},
    "normalised": {"realisation": "normalised"},
    "zero_order": {"zero_order": True},
    "true_rotation": {"rotary": "rotation"},
    "no_norm_no_positions": {"use_norm": False, "rotary": None, "bias": False},
    "encoder": {"causal": False, "zero_order": True},
    "encoder_raw": {"causal": False, "realisation": "raw"},
    "encoder_normalised": {"causal": False, "realisation": "normalised"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(ZeroS(8, 2, **OPTIONS[name])), fresh_input(8))


# -- the forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("realisation", REALISATIONS)
def test_every_form_is_the_quadratic_definition(zero, causal, realisation):
    q, k, s, gates, v = inputs(zero=zero)
    options = {"realisation": realisation, "causal": causal}
    expected = radial_by_definition(s, gates, causal)
    cosine = torch.einsum("bthd,bshd->bhts", q, k)
    radial = dsf.materialise(zeros_radial_recurrence(s, *gates, **options))
    assert far(radial, expected) <= EXACT
    sums = torch.zeros_like(s) if gates[2] is None else gates[2]
    assert far(radial.sum(-1), sums.transpose(1, 2)) <= EXACT
    full = zeros_recurrence(q, k, s, *gates, **options)
    assert far(dsf.materialise(full), expected * cosine) <= EXACT
    y = torch.einsum("bhts,bshc->bthc", expected * cosine, v)
    assert far(dsf.scan(full, v), y) <= EXACT
    assert far(dsf.scan(full, v, "reference"), y) <= EXACT


def test_structures_and_order_of_states():
    q, k, s, gates, _ = inputs(length=7)
    kinds = {"raw": Identity, "running_max": Diagonal, "normalised": BlockDiagonal}
    for name, kind in kinds.items():
        r = zeros_recurrence(q, k, s, *gates, realisation=name)
        assert isinstance(r.A, kind)
        assert r.n_state == 3 * WIDTH
        plain = r.B[..., 2::3, 0]  # moment 2 of every key channel: the plain sum or mean
        share = 1.0 if name != "normalised" else 1 / torch.arange(1.0, 8.0).double()[:, None, None]
        assert far(plain, k * share) <= EXACT
        assert "key channel" in r.gauge


def test_orders_and_closed_forms():
    """Zero sums of delta, epsilon; (2.1); r = alpha e^s + beta s + gamma; both forms of gamma."""
    _, _, s, gates, _ = inputs(zero=True)
    one, nothing = torch.ones_like(s), torch.zeros_like(s)
    delta = dsf.materialise(zeros_radial_recurrence(s, one, nothing))
    epsilon = dsf.materialise(zeros_radial_recurrence(s, nothing, one))
    assert float(delta.sum(-1).abs().max()) <= EXACT
    assert float(epsilon.sum(-1).abs().max()) <= EXACT
    first, higher, zero = (g.transpose(1, 2)[..., None] for g in gates)
    t = torch.arange(1.0, LENGTH + 1, dtype=torch.float64)[:, None]
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()
    rows = s.transpose(1, 2)[..., None, :]
    p = torch.softmax(rows.masked_fill(seen == 0, -torch.inf), -1)
    w = dsf.materialise(zeros_radial_recurrence(s, gates[0], gates[1]))
    assert far(w, (higher * (p - 1 / t) + (first - higher) * delta) * seen) <= 1e-15
    E, P = (rows.exp() * seen).sum(-1, keepdim=True), (rows * seen).sum(-1, keepdim=True)
    alpha, beta = higher / E, (first - higher) / t
    gamma = (P / t**2 - 1 / t) * higher - P / t**2 * first + zero / t
    assert far(gamma, -(beta * P + higher) / t + zero / t) <= EXACT
    with_zero = dsf.materialise(zeros_radial_recurrence(s, *gates))
    assert far(with_zero, (alpha * rows.exp() + beta * rows + gamma) * seen) <= EXACT


def test_second_order_remainder_is_cubic():
    s = 0.02 * normal(1, 30, 1)
    one, nothing = torch.ones_like(s), torch.zeros_like(s)

    def remainder(s):
        epsilon = dsf.materialise(zeros_radial_recurrence(s, nothing, one))[0, 0, -1]
        delta = s[0, :, 0] - s.mean()
        return float((epsilon - (delta**2 - (delta**2).mean()) / 60).abs().max())

    assert 900 <= remainder(s) / remainder(0.1 * s) <= 1100


def test_raw_and_normalised_are_a_change_of_basis():
    """h_norm = (T_t x I) h_raw and a_norm_t = T_t T_(t-1)^-1."""
    q, k, s, gates, v = inputs(length=20)
    raw = zeros_recurrence(q, k, s, *gates, realisation="raw")
    norm = zeros_recurrence(q, k, s, *gates, realisation="normalised")
    E, P = s.exp().cumsum(1), s.cumsum(1)
    t = torch.arange(1.0, 21, dtype=torch.float64)[None, :, None].expand_as(s)
    T = torch.zeros(*s.shape, 3, 3, dtype=torch.float64)
    T[..., 0, 0], T[..., 1, 1], T[..., 2, 2] = 1 / E, 1 / t, 1 / t
    T[..., 1, 2] = -P / t**2
    a = norm.A.blocks[:, :, :, 0]
    assert far(a[:, 1:], T[:, 1:] @ torch.linalg.inv(T[:, :-1])) <= STATE_ATOL
    for stop in (1, 2, 7, 20):
        states = [dsf.scan(r.time_slice(0, stop), v[:, :stop], return_state=True)[1]
                  for r in (raw, norm)]  # fmt: skip
        split = [h.unflatten(2, (WIDTH, 3)) for h in states]
        assert far(split[1], T[:, stop - 1, :, None] @ split[0]) <= STATE_ATOL


def test_running_mean_of_u():
    u, mu, log_tau = normal(2, 30, 3, 4), normal(1, 1, 3, 4, seed=1), normal(1, 1, 3, 1, seed=2)
    mean, tau, logits = mu[:, 0], log_tau[:, 0].exp(), []
    for j in range(1, 31):
        kappa = 1 / (tau + j)
        mean = (1 - kappa) * mean + kappa * u[:, j - 1]
        logits.append(-(u[:, j - 1] * mean).sum(-1) / 2)
    assert far(deviation_logits(u, mu, log_tau), torch.stack(logits, 1)) <= EXACT
    first = deviation_logits(u, torch.zeros_like(mu), torch.zeros_like(log_tau))[:, 0]
    assert far(first, -(u[:, 0] ** 2).sum(-1) / 4) <= EXACT
    encoder = deviation_logits(u, mu, log_tau, causal=False)
    position = torch.arange(1.0, 31, dtype=torch.float64)[:, None, None]
    total = (log_tau.exp() * mu + u.sum(1, keepdim=True)) / (log_tau.exp() + position)
    assert far(encoder, -(u * total).sum(-1) / 2) <= EXACT


@pytest.mark.parametrize("realisation", REALISATIONS)
def test_first_two_tokens(realisation):
    q, k, s, gates, v = inputs(length=5)
    first, higher, zero = gates
    plain = dsf.scan(zeros_recurrence(q, k, s, first, higher, realisation=realisation), v)
    assert not bool(plain[:, 0].any())  # exactly zero
    with_zero = dsf.scan(zeros_recurrence(q, k, s, *gates, realisation=realisation), v)
    cosine = torch.einsum("bthd,bshd->btsh", q, k)
    expected = (zero[:, 0] * cosine[:, 0, 0])[..., None] * v[:, 0]
    assert far(with_zero[:, 0], expected) <= 1e-15
    weight = higher[:, 1] * (torch.sigmoid(s[:, 0] - s[:, 1]) - 0.5)
    weight = weight + (first - higher)[:, 1] * (s[:, 0] - s[:, 1]) / 4
    difference = cosine[:, 1, 0, :, None] * v[:, 0] - cosine[:, 1, 1, :, None] * v[:, 1]
    assert far(plain[:, 1], weight[..., None] * difference) <= EXACT


def test_step_state_is_bounded_and_sized():
    """3 d P + d + 2 numbers a head."""
    layer = ZeroS(16, 2)
    state = None
    for t in range(5):
        _, state = layer.step(fresh_input(16, length=5).float()[:1, t], state)
    sizes = [*state.moments, state.u_sum, state.log_total, state.mean]
    assert sum(x[0, 0].numel() for x in sizes) == 3 * 8 * 8 + 8 + 2
    assert state.count == 5


def test_coefficients_follow_the_table():
    """The rows of section 6's table, for the causal form."""
    _, _, s, gates, _ = inputs(length=9)
    past = PrefixSums.of(s, s[:, :1])
    t = torch.arange(1.0, 10, dtype=torch.float64)[None, :, None]
    top = s.cummax(1).values
    a, b, c = coefficients(past, past, Gates(*gates), "running_max")
    assert far(a[:, 1:, :, 0], top[:, :-1] - top[:, 1:]) <= EXACT
    assert bool((a[:, 0, :, 0] == -math.inf).all())
    assert far(b, torch.stack([(s - top).exp(), s, torch.ones_like(s)], -1)) <= EXACT
    E = (s - s[:, :1]).exp().cumsum(1) * (s[:, :1] - top).exp()
    assert bool((E >= 1 - EXACT).all())
    assert far(c[:, 1:, :, 0], (gates[1] / E)[:, 1:]) <= EXACT
    _, b, c = coefficients(past, past, Gates(*gates), "normalised")
    assert far(b[..., 2], (1 / t).expand_as(s)) <= EXACT
    assert far(c[:, 1:], torch.stack(
        [gates[1], gates[0] - gates[1], gates[2] - gates[1]], -1)[:, 1:]) <= EXACT  # fmt: skip
    assert bool((b[:, 0, :, 0] == 1).all())


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_of_a_layer_without_the_cosine_sum_to_zero(causal):
    torch.manual_seed(0)
    layer, x = shaken(ZeroS(8, 2, causal=causal)), fresh_input(8)
    radial = dsf.materialise(layer.radial_recurrence(x))
    whole = dsf.materialise(layer.recurrence(x)[0])
    assert float(radial.sum(-1).abs().max()) <= STATE_ATOL
    q, k = layer.unit_query_key(x, 0)
    cosine = torch.einsum("bthd,bshd->bhts", q, k)
    assert torch.allclose(whole, radial * cosine, atol=STATE_ATOL, rtol=0)


def test_refusals():
    q, k, s, gates, _ = inputs(length=4)
    with pytest.raises(DsfValueError, match="realisation: expected one of"):
        zeros_recurrence(q, k, s, *gates, realisation="other")
    with pytest.raises(DsfValueError, match="n_head: expected a divisor"):
        ZeroS(10, 4)
