"""Normalised attention against its direct masked sum, in both gauges."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfValueError
from dsf.models.normalized_attention import NormalizedAttention, normalized_attention_recurrence

EXACT = 1e-12
ETA = {"exp": torch.exp, "softplus": torch.nn.functional.softplus, "sigmoid": torch.sigmoid}


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def inputs(length=9, head=2):
    return (normal(2, length, head, 3), normal(2, length, head, 3, seed=1),
            normal(2, length, head, 4, seed=2), normal(2, length, head, seed=3))  # fmt: skip


@pytest.mark.parametrize("name", ETA)
@pytest.mark.parametrize("gauge", ["identity", "dsf"])
@pytest.mark.parametrize("causal", [True, False])
def test_is_the_direct_sum(name, gauge, causal):
    q, k, v, z = inputs()
    system = normalized_attention_recurrence(
        q, k, z, normaliser=name, gauge=gauge, causal=causal)  # fmt: skip
    weights = torch.einsum("bthf,bshf->bhts", q, k)
    weights = weights.tril() if causal else weights
    weights = weights / ETA[name](z).transpose(1, 2)[..., None]
    expected = torch.einsum("bhts,bshc->bthc", weights, v)
    near(dsf.scan(system, v), expected)
    near(dsf.scan(system, v, "reference"), expected)
    near(dsf.materialise(system), weights)
    assert float(weights.min()) < 0  # signed, and rows are free
    assert float((weights.sum(-1) - 1).abs().max()) > 1e-2


def test_dsf_gauge_is_the_papers_transition():
    """A_t = exp(z_(t-1) - z_t), B_t = exp(-z_t) k_t, C_t = q_t; it may lie above 1."""
    q, k, _, z = inputs(length=50)
    r = normalized_attention_recurrence(q, k, z, gauge="dsf")
    near(r.A.decay()[:, 1:], torch.exp(z[:, :-1] - z[:, 1:]))
    near(r.B[..., 0], torch.exp(-z)[..., None] * k)
    assert torch.equal(r.C[..., 0, :], q)
    assert float(r.A.decay().max()) > 1 > float(r.A.decay().min())


@pytest.mark.parametrize("gauge", ["identity", "dsf"])
def test_initial_state_is_read_with_the_same_divisor(gauge):
    q, k, v, z = inputs()
    start = normal(2, 2, 3, 4, seed=4)
    r = normalized_attention_recurrence(q, k, z, gauge=gauge, initial_state=start)
    plain = normalized_attention_recurrence(q, k, z)
    extra = torch.einsum("bthf,bhfc->bthc", q, start) * torch.exp(-z)[..., None]
    near(dsf.scan(r, v), dsf.scan(plain, v) + extra)


def test_later_variant_is_the_reversed_sigmoid():
    """1/eta = exp(-softplus(z)) = sigmoid(-z)."""
    q, k, v, z = inputs()
    r = normalized_attention_recurrence(q, k, z, normaliser="exp_of_softplus")
    plain = normalized_attention_recurrence(q, k, z, normaliser="one")
    near(dsf.scan(r, v), dsf.scan(plain, v) * torch.sigmoid(-z)[..., None])


def test_shared_divisor_and_grouped_keys():
    q, k, v, z = inputs(head=4)
    one, two = z[:, :, :1], k[:, :, :2]
    r = normalized_attention_recurrence(q, two, one)
    same = normalized_attention_recurrence(
        q, two.repeat_interleave(2, 2), one.expand(-1, -1, 4))  # fmt: skip
    near(dsf.scan(r, v), dsf.scan(same, v))


OPTIONS = {
    "dsf_gauge": {"gauge": "dsf"},
    "softplus": {"normaliser": "softplus"},
    "sigmoid_dsf": {"normaliser": "sigmoid", "gauge": "dsf"},
    "bidirectional": {"causal": False},
    "bidirectional_dsf": {"causal": False, "gauge": "dsf"},
    "variant": {
        "normaliser": "exp_of_softplus", "feature_map": "elu_plus_one", "scale": 0.5,
        "normaliser_offset": torch.linspace(4, 9, 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(NormalizedAttention(8, 4, **OPTIONS[name])), fresh_input(8))


def test_offset_fills_the_bias_and_unknown_names_are_refused():
    layer = NormalizedAttention(8, 4, normaliser_offset=torch.linspace(4, 9, 4))
    assert torch.equal(layer.eta.bias, torch.linspace(4, 9, 4))
    with pytest.raises(DsfValueError, match="expected one of"):
        NormalizedAttention(8, normaliser="tanh")(torch.zeros(1, 2, 8))
