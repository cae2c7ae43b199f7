"""Feature maps, normalisers and rotary tables: the building blocks of the attention systems."""

import math

import pytest
import torch
from model_laws import load_golden, normal

from dsf.errors import DsfMemoryError, DsfValueError
from dsf.feature_maps import (
    FEATURE_MAPS,
    Taylor,
    elu_plus_one,
    feature_map,
    n_taylor_features,
    taylor_error_bound,
)
from dsf.normalisers import NORMALISERS, log_and_sign, log_normaliser, log_softplus
from dsf.rotary import rotary_tables, rotate

EXACT = 1e-14
IDENTITY_ATOL = 1e-12


# -- feature maps ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FEATURE_MAPS, "taylor_0", "taylor_5"])
def test_named_maps_keep_leading_axes_and_differentiate(name):
    x = normal(2, 3, 4).requires_grad_()
    phi = feature_map(name)
    assert phi(x).shape[:-1] == x.shape[:-1]
    assert torch.autograd.gradcheck(phi, (x,))


@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "exp"])
def test_positive_maps_are_not_negative(name):
    assert bool((feature_map(name)(8 * normal(200, 5)) >= 0).all())


def test_elu_plus_one_is_elu_plus_one_and_never_zero():
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    assert torch.allclose(elu_plus_one(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=EXACT)
    far = torch.tensor([-600.0], dtype=torch.float64)
    assert float(elu_plus_one(far)) == math.exp(-600)  # elu + 1 gives 0 here


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 6])
def test_taylor_counts_and_similarity(width, order):
    q, k = normal(9, width), normal(9, width, seed=1)
    phi = Taylor(order)
    assert phi(q).shape[-1] == n_taylor_features(width, order) == math.comb(width + order, order)
    logit = q @ k.T
    series = sum(logit**p / math.factorial(p) for p in range(order + 1))
    got = phi(q) @ phi(k).T
    assert torch.allclose(got, series, rtol=IDENTITY_ATOL, atol=IDENTITY_ATOL * series.abs().max())
    bound = taylor_error_bound(logit, order)
    assert bool(((got - logit.exp()).abs() <= bound + IDENTITY_ATOL * logit.exp()).all())


def test_taylor_monomials_come_once():
    """At generic numbers two features are equal only if their monomials are."""
    x = torch.tensor([1.13, 1.71, 2.37], dtype=torch.float64)
    assert len({round(float(f), 9) for f in Taylor(4)(x)}) == math.comb(7, 4)


def test_an_odd_order_can_be_negative_an_even_one_not():
    q, k = 3 * normal(50, 2), 3 * normal(50, 2, seed=1)
    assert float((Taylor(3)(q) @ Taylor(3)(k).T).min()) < 0
    assert float((Taylor(4)(q) @ Taylor(4)(k).T).min()) > 0


def test_refusals():
    with pytest.raises(DsfValueError, match="feature_map: which: expected one of"):
        feature_map("cosine")
    with pytest.raises(DsfValueError, match="order: expected at least 0"):
        Taylor(-1)
    with pytest.raises(DsfMemoryError, match="GiB"):
        Taylor(8)(torch.zeros(1, dtype=torch.float64).expand(10**6, 512))
    assert feature_map(torch.sin) is torch.sin


# -- normalisers -------------------------------------------------------------------------------


def test_log_normalisers_are_the_logs():
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    expected = {
        "exp": z.exp(), "softplus": torch.log1p(z.exp()), "sigmoid": torch.sigmoid(z),
        "one": torch.ones_like(z), "exp_of_sigmoid": torch.sigmoid(z).exp(),
        "exp_of_elu": torch.nn.functional.elu(z).exp(),
        "exp_of_softplus": 1 + z.exp(),  # 1/eta is the reversed sigmoid
    }  # fmt: skip
    assert set(expected) | {"exp_of_exp"} == set(NORMALISERS)
    for name, eta in expected.items():
        got = log_normaliser(name, z)
        assert torch.allclose(got, eta.log(), rtol=IDENTITY_ATOL, atol=IDENTITY_ATOL), name
    assert torch.equal(log_normaliser("exp_of_exp", z), z.exp())
    with pytest.raises(DsfValueError, match="expected one of"):
        log_normaliser("tanh", z)


def test_log_softplus_far_from_zero():
    z = torch.tensor([-1e4, -800.0, -37.1, -36.9, 50.0, 1e4], dtype=torch.float64)
    assert torch.allclose(log_softplus(z)[:4], z[:4], rtol=1e-15, atol=0)
    assert torch.allclose(log_softplus(z)[4:], z[4:].log(), rtol=1e-15, atol=0)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(log_softplus(z).sum(), z)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.02, 1e-4], dtype=torch.float64)
    assert torch.allclose(slope, expected, rtol=IDENTITY_ATOL)


def test_log_and_sign_takes_zero_as_one():
    log, sign = log_and_sign(torch.tensor([-2.0, 0.0, 4.0], dtype=torch.float64))
    assert torch.equal(sign, torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(log, torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64).log())


# -- rotary ------------------------------------------------------------------------------------


def products_at_lag(pairing, tables, lag=5):
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    cos, sin = rotary_tables(200, 8, tables=tables, pairing=pairing)
    q, k = q.expand(1, 200, 1, 8), k.expand(1, 200, 1, 8)
    q, k = rotate(q, cos, sin, pairing), rotate(k, cos, sin, pairing)
    return (q[:, lag:] * k[:, :-lag]).sum(-1).flatten(), q.norm(dim=-1).flatten()


@pytest.mark.parametrize("pairing", ["half", "neighbour"])
def test_rotation_keeps_norms_and_sees_the_lag_only(pairing):
    product, norm = products_at_lag(pairing, "rotation")
    assert float(product.max() - product.min()) <= IDENTITY_ATOL
    assert float(norm.max() - norm.min()) <= IDENTITY_ATOL


def test_the_released_tables_are_no_rotation():
    product, norm = products_at_lag("half", "release")
    assert float(product.max() - product.min()) > 1e-1
    assert float(norm.max() - norm.min()) > 1e-1


@pytest.mark.parametrize("name", ["zeros_layer", "zeros_layer_norm_zero_order"])
def test_released_tables_are_the_codes(name):
    case = load_golden(name)
    length, width = case["param.cos"].shape[1], case["param.cos"].shape[3]
    cos, sin = rotary_tables(length, width, tables="release")
    assert torch.equal(cos, case["param.cos"][0, :, 0])
    assert torch.equal(sin, case["param.sin"][0, :, 0])


def test_rotation_tables_are_llamas():
    case = load_golden("hf_llama_attention")
    cos, sin = rotary_tables(12, 6, base=float(case["opt.rope_theta"]))
    assert torch.allclose(cos.expand_as(case["in.cos"]), case["in.cos"], atol=IDENTITY_ATOL)
    assert torch.allclose(sin.expand_as(case["in.sin"]), case["in.sin"], atol=IDENTITY_ATOL)


def test_partial_rotation_start_and_refusals():
    x = normal(2, 7, 3, 6)
    whole, late = rotary_tables(7, 4), rotary_tables(3, 4, start=4)
    out = rotate(x, *whole)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(rotate(x[:, 4:], *late), out[:, 4:])
    with pytest.raises(DsfValueError, match="even number, got 3"):
        rotary_tables(4, 3)
    with pytest.raises(DsfValueError, match="tables: expected one of"):
        rotary_tables(4, 4, tables="other")
    with pytest.raises(DsfValueError, match="pairing: expected one of"):
        rotate(x, *whole, pairing="thirds")
