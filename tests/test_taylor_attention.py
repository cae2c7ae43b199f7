"""Taylor attention: the direct polynomial, its distance from softmax, its features."""

import math

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfValueError
from dsf.feature_maps import Taylor, n_taylor_features
from dsf.models.taylor_attention import (
    TaylorAttention,
    full_taylor_features,
    taylor_attention_recurrence,
    taylor_polynomial,
    taylor_remainder_bound,
    taylor_row_bound,
)

EXACT = 1e-12
MINIMUM_ATOL = 1e-3


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=9, head=2, width=3, channel=4):
    return (normal(2, length, head, width), normal(2, length, head, width, seed=1),
            normal(2, length, head, channel, seed=2))  # fmt: skip


@pytest.mark.parametrize("order", [0, 2, 4, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_is_the_polynomial_of_the_logits(order, causal):
    q, k, v = qkv()
    weights = taylor_polynomial(torch.einsum("bthf,bshf->bhts", q, k) * 3**-0.5, order)
    weights = weights.tril() if causal else weights
    weights = weights / weights.sum(-1, keepdim=True)
    for gauge in ("identity", "dsf"):
        system = taylor_attention_recurrence(q, k, order=order, causal=causal, gauge=gauge)
        near(dsf.materialise(system), weights)
        near(dsf.scan(system, v), torch.einsum("bhts,bshc->bthc", weights, v))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_features_and_remainder(order):
    x, y = normal(7, 4), normal(7, 4, seed=1)
    s = (x * y).sum(-1)
    near((Taylor(order)(x) * Taylor(order)(y)).sum(-1), taylor_polynomial(s, order))
    full = full_taylor_features(x, order)
    near((full * full_taylor_features(y, order)).sum(-1), taylor_polynomial(s, order))
    assert full.shape[-1] == sum(4**i for i in range(order + 1))
    grid = torch.linspace(-6, 4, 2001, dtype=torch.float64)
    missing = (torch.exp(grid) - taylor_polynomial(grid, order)).abs()
    assert bool((missing <= taylor_remainder_bound(grid, order) * (1 + EXACT) + 1e-15).all())
    assert (float(taylor_polynomial(grid, order).min()) > 0) == (order % 2 == 0)


def test_minima_and_dimensions():
    grid = torch.linspace(-6, 4, 100_001, dtype=torch.float64)
    for order, least in [(2, 0.5), (4, 0.2704)]:
        assert abs(float(taylor_polynomial(grid, order).min()) - least) <= MINIMUM_ATOL
    table = {(2, 16): 153, (2, 64): 2145, (2, 128): 8385, (4, 16): 4845, (4, 64): 814385}
    for (order, width), count in table.items():
        assert n_taylor_features(width, order) == count == math.comb(width + order, order)
    assert TaylorAttention(64, 4, order=4).n_state == 4845


def test_rows_are_within_their_bound_of_softmax():
    q, k = (0.6 * x for x in qkv(length=12)[:2])
    logits = torch.einsum("bthf,bshf->bhts", q, k) * 3**-0.5
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    logits = logits.masked_fill(~seen, -torch.inf)
    softmax, last = torch.softmax(logits, -1), None
    for order in (2, 4, 8, 12):
        rows = dsf.materialise(taylor_attention_recurrence(q, k, order=order))
        distance = (rows - softmax).abs().sum(-1)
        bound = taylor_row_bound(logits, order)
        assert bool((distance <= bound + EXACT).all())
        assert last is None or float(bound.max()) <= last
        last = float(bound.max())
    assert last < 1e-2


@pytest.mark.parametrize("eps", [0.01, 0.3, 0.9])
def test_a_pointwise_kernel_error_bounds_the_rows(eps):
    """|K^ - K| <= eps K gives rows within 2 eps/(1 - eps)."""
    K = torch.exp(normal(50, 20))
    changed = K * (1 + eps * (2 * torch.rand(50, 20).double() - 1))
    distance = (
        (changed / changed.sum(-1, keepdim=True) - K / K.sum(-1, keepdim=True)).abs().sum(-1)
    )
    assert float(distance.max()) <= 2 * eps / (1 - eps)


@pytest.mark.parametrize("options", [
    {"order": 4}, {"causal": False}, {"gauge": "dsf", "n_group": 2}, {"scale": 0.3},
], ids=str)  # fmt: skip
def test_contract_with_options(options):
    torch.manual_seed(0)
    check_all(shaken(TaylorAttention(8, 4, **options)), fresh_input(8))


def test_odd_orders_are_refused():
    q, k, _ = qkv()
    with pytest.raises(DsfValueError, match="expected an even number, got 3"):
        taylor_attention_recurrence(q, k, order=3)
