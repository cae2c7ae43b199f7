"""The six principles of coefficient dynamics on systems whose answers are known."""

from __future__ import annotations

import pytest
import torch

import dsf
from dsf.errors import DsfTypeError, DsfValueError
from dsf.measures.coefficient_principles import principles
from dsf.models.delta_net import delta_net_recurrence
from dsf.models.gla import gla_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.sigmoid_attention import sigmoid_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.transitions import Scalar

LENGTH, WIDTH = 48, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name):
    q, k = normal(2, LENGTH, 3, WIDTH), normal(2, LENGTH, 3, WIDTH, seed=1)
    if name == "softmax":
        return softmax_attention_recurrence(q, k)
    if name == "sigmoid":
        return sigmoid_attention_recurrence(q, k)
    if name == "linear":
        return linear_attention_recurrence(q, k)
    if name == "gla":
        return gla_recurrence(q, k, -0.1 * torch.rand(2, LENGTH, 3, WIDTH).double() - 0.01)
    unit = k / k.norm(dim=-1, keepdim=True)
    return delta_net_recurrence(q, unit, torch.full((2, LENGTH, 3), 0.8).double())


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "linear", "gla", "delta"])
def test_what_each_structure_allows(name):
    found = principles(made(name))
    assert found.position.dims == ("batch", "head")
    assert found.position.shape == (2, 3)
    linear = name not in ("softmax", "sigmoid")
    assert (found.linear_readout == (1 if linear else -1)).all()
    assert int(found.n_state[0, 0]) == (WIDTH if linear else WIDTH * LENGTH)
    assert int(found.zero_keys[0, 0]) == (WIDTH - 1 if linear else 0)
    still = name in ("softmax", "sigmoid", "linear")
    assert bool((found.position < 1e-12).all()) == still
    assert bool((found.position > 1e-3).all()) == (not still)
    assert bool((found.turn == 0).all()) == still
    assert (found.stable == {"gla": 1}.get(name, 0)).all()
    assert float(found.largest_norm.max()) <= 1 + 1e-12


def test_weights_grow_like_t_where_nothing_is_forgotten():
    assert abs(float(principles(made("sigmoid")).weight_growth.mean()) - 1) < 0.2
    assert abs(float(principles(made("gla")).weight_growth.mean())) < 0.5


def test_a_growing_transition_is_called_unstable():
    r = dsf.Recurrence(Scalar.from_decay(torch.full((1, 8, 1), 1.01).double(), n_state=2),
                       normal(1, 8, 1, 2, 1), normal(1, 8, 1, 1, 2, seed=1))  # fmt: skip
    assert int(principles(r).stable.squeeze()) == -1


def test_zeros_are_counted():
    q, k = normal(1, 8, 1, 4), normal(1, 8, 1, 4, seed=1)
    k[:, 3] = 0
    r = gla_recurrence(q, k, torch.zeros(1, 8, 1, 4).double())
    assert float(principles(r).zero_share.squeeze()) == 5 / 36  # row t sees token 3 from t = 3 on


def test_the_scale_keeps_the_variance_at_one():
    q, k = normal(1, 300, 1, 16), normal(1, 300, 1, 16, seed=1)
    scaled = principles(softmax_attention_recurrence(q, k))
    plain = principles(gla_recurrence(q, k, torch.zeros_like(q), scale=1.0))
    assert abs(float(scaled.response_variance.squeeze()) - 1) < 0.1
    assert abs(float(plain.response_variance.squeeze()) / 16 - 1) < 0.1


def test_messages():
    with pytest.raises(DsfTypeError, match="system: expected a causal"):
        principles(dsf.anticausal(made("gla")))
    with pytest.raises(DsfValueError, match="expected 4 tokens or more, got 3"):
        principles(made("gla").time_slice(0, 3))
