"""The lemmas and identities of the framework paper: state expansion, SSD against attention."""

from __future__ import annotations

import pytest
import torch

import dsf
from dsf.errors import DsfTypeError, DsfValueError
from dsf.measures.nearest_attentions import attention_steps, history_scaled, nearest_attention
from dsf.measures.state_expansions import expand_state, expansion_error
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.mamba import mamba_recurrence
from dsf.transitions import Scalar

EXACT = 1e-12
LENGTH, WIDTH = 14, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ssd(q, k, steps, decay):
    """M_tj = q_t.k_j delta_j e^(-a (S_t - S_j))."""
    delta = steps.expand(1, len(steps), 1) if steps.ndim == 1 else steps
    return dsf.Recurrence(Scalar(-decay * delta, n_state=q.shape[-1]),
                          (delta[..., None] * k)[..., None], q[..., None, :])  # fmt: skip


def pair():
    return normal(1, LENGTH, 1, WIDTH), normal(1, LENGTH, 1, WIDTH, seed=1)


def steps_of(values):
    return values[None, :, None]


# -- lemma 2: state expansion ------------------------------------------------------------------


def test_a_wider_free_system_has_the_same_map():
    q, k = pair()
    for r in (ssd(q, k, steps_of(torch.rand(LENGTH).double()), 0.7),
              mamba_recurrence(normal(1, LENGTH, 2), -torch.rand(2, WIDTH).double(),
                               normal(1, LENGTH, WIDTH), normal(1, LENGTH, WIDTH, seed=1),
                               softplus=True)):  # fmt: skip
        wide = expand_state(r, 9)
        assert wide.n_state == 9
        assert float((dsf.materialise(wide) - dsf.materialise(r)).abs().max()) <= EXACT
    assert expand_state(r, r.n_state) is r


def test_tied_classes_expand_where_the_features_of_zero_are_zero():
    q, k = pair()
    delta = steps_of(torch.rand(LENGTH, generator=torch.Generator().manual_seed(2)).double())
    exact = {
        "ssd": lambda q, k: ssd(q, k, delta, 0.5),
        "identity": lambda q, k: linear_attention_recurrence(
            q, k, feature_map="identity", normalise=False),
    }  # fmt: skip
    for name, make in exact.items():
        assert float(expansion_error(make, q, k, 3).max()) <= EXACT, name
    elu = expansion_error(linear_attention_recurrence, q, k)
    assert float(elu.max()) > 1e-3


# -- SSD against linear attention --------------------------------------------------------------


@pytest.mark.parametrize(("decay", "gain"), [(0.0, 0.7), (0.3, 0.5), (2.0, 1.5)])
def test_on_the_schedule_ssd_is_attention(decay, gain):
    steps = attention_steps(LENGTH, decay, gain)
    total = steps.cumsum(0)
    for t in range(LENGTH):
        left = torch.exp(-decay * (total[t] - total[: t + 1])) * steps[: t + 1]
        assert float((left - gain * torch.exp(-decay * total[t])).abs().max()) <= EXACT
    q, k = pair()
    found = nearest_attention(ssd(q, k, steps_of(steps), decay), q, k)
    assert float(found.residual.max()) <= 1e-10
    wanted = (gain * torch.exp(-decay * total)).numpy()
    assert abs(found.gain.values[0, 0] - wanted).max() <= 1e-10


def test_selective_steps_are_no_attention_and_the_residual_says_so():
    q, k = pair()
    delta = torch.rand(LENGTH, generator=torch.Generator().manual_seed(3)).double()
    found = nearest_attention(ssd(q, k, steps_of(delta), 0.7), q, k)
    assert float(found.residual[0, 0, 0]) <= EXACT  # one weight is always a multiple of one score
    assert float(found.residual[..., 3:].min()) > 1e-3
    assert float(found.residual.max()) <= 1
    per_channel = mamba_recurrence(normal(1, LENGTH, 2), -torch.rand(2, WIDTH).double(),
                                   k[:, :, 0], q[:, :, 0], softplus=True)  # fmt: skip
    shared = (x.expand(1, LENGTH, 2, WIDTH) for x in (q, k))
    assert float(nearest_attention(per_channel, *shared).residual.max()) > 1e-2


def test_with_the_past_in_q_and_k_it_always_is():
    q, k = pair()
    r = ssd(q, k, steps_of(torch.rand(LENGTH).double()), 0.7)
    same = history_scaled(r)
    assert same.A.structure == "identity"
    assert float((dsf.materialise(same) - dsf.materialise(r)).abs().max()) <= EXACT
    B, C = same.dense_input_output()
    found = nearest_attention(r, C[..., 0, :], B[..., 0])
    assert float(found.residual.max()) <= 1e-10
    assert abs(found.gain.values - 1).max() <= 1e-10


def test_messages():
    q, k = pair()
    with pytest.raises(DsfValueError, match="expected decay >= 0 and gain > 0"):
        attention_steps(3, 0.1, 0.0)
    with pytest.raises(DsfTypeError, match="expected a scalar positive decay"):
        history_scaled(linear_attention_recurrence(q, k, feature_map="identity", normalise=False))
    with pytest.raises(DsfValueError, match="n_state: expected 4 or more, got 2"):
        expand_state(ssd(q, k, steps_of(torch.ones(LENGTH).double()), 0.1), 2)
