"""Half-lives, horizons and state sizes against closed forms and a published table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dsf
from dsf import measures
from dsf.errors import DsfTypeError
from dsf.transitions import Diagonal, Householder, Identity, Shift

NEAR = 1e-12


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_decay(decay: torch.Tensor) -> dsf.Recurrence:
    n = decay.shape[-1]
    ones = torch.ones(1, decay.shape[1], 1, n, 1, dtype=torch.float64)
    return dsf.Recurrence(Diagonal.from_decay(decay), ones, ones.mT, system="decay")


@pytest.mark.parametrize(
    ("pre_activation", "half_life"),
    [(-80, 0.1), (-20, 0.6), (-5, 2.2), (0, 16), (2, 87), (5, 1652)],
)
def test_half_lives_of_the_metala_decay(pre_activation: float, half_life: float) -> None:
    log_decay = torch.nn.functional.logsigmoid(torch.tensor(pre_activation).double()) / 16
    r = with_decay(torch.ones(1, 50, 1, 1)).replace(A=Diagonal(log_decay.expand(1, 50, 1, 1)))
    found = float(measures.memory_half_life(r)[0, 0, 0])
    assert found == pytest.approx(half_life, rel=0.05 if half_life < 100 else 1e-3, abs=0.05)


def test_half_lives_of_constant_decays() -> None:
    a = torch.tensor([0.5, 0.99, -0.5, 1.0, 1.1, 0.0], dtype=torch.float64)
    r = with_decay(a.expand(1, 300, 1, 6))
    found = measures.memory_half_life(r)
    expected = [1, math.log(0.5) / math.log(0.99), 1, math.inf, math.inf, 0]
    assert np.allclose(found[0, 0], expected, rtol=NEAR)
    assert found.attrs["expansive"] == 1
    assert np.allclose(measures.survival_steps(r)[0, 10, 0], expected, rtol=1e-10)


def test_the_first_decay_acts_on_the_initial_state_alone() -> None:
    a = torch.full((1, 9, 1, 1), 0.5, dtype=torch.float64)
    a[:, 0] = 1e-9
    assert float(measures.memory_half_life(with_decay(a))[0, 0, 0]) == pytest.approx(1)


def test_a_reset_is_met_after_the_steps_until_it() -> None:
    a = torch.ones(1, 9, 1, 1, dtype=torch.float64)
    a[:, 5] = 0
    steps = measures.survival_steps(with_decay(a))[0, :, 0, 0].values
    assert steps[:5].tolist() == [4, 3, 2, 1, 0]
    assert np.isinf(steps[5:]).all()
    assert float(measures.memory_half_life(with_decay(a))[0, 0, 0]) == 2


def test_norms_agree_with_logs() -> None:
    a = 0.5 + 0.5 * torch.rand(1, 12, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    r = with_decay(a)
    dense = r.replace(A=r.A.widen().widen())
    assert dense.structure == "dense"
    for measure in (measures.memory_half_life, measures.survival_steps):
        np.testing.assert_allclose(measure(dense), measure(r), rtol=1e-10)


def test_half_lives_by_structure() -> None:
    q = random(1, 7, 1, 3)
    softmax = dsf.Recurrence(Identity(7), dsf.OneHot(7, 7), dsf.SoftmaxRows(q, q))
    assert np.isinf(measures.memory_half_life(softmax)).all()
    ones = torch.ones(1, 7, 1, 4, 1, dtype=torch.float64)
    register = dsf.Recurrence(Shift(4), ones, ones.mT)
    assert measures.memory_half_life(register)[0, 0].values.tolist() == [4, 3, 2, 1]
    k = torch.nn.functional.normalize(random(1, 7, 1, 4), dim=-1)
    erased = dsf.Recurrence(Householder(torch.ones(1, 7, 1).double(), k), ones, ones.mT)
    lived = measures.memory_half_life(erased)
    assert np.isfinite(lived).all()
    assert lived.attrs["gauge"] == "as given"


def test_half_life_depends_on_the_gauge_and_the_horizon_does_not() -> None:
    a = torch.full((1, 30, 1, 1), 0.8, dtype=torch.float64)
    r = with_decay(a)
    total = torch.cumsum(torch.log(a), 1)
    ones = torch.ones(1, 30, 1, 1, 1, dtype=torch.float64)
    moved = dsf.Recurrence(
        Identity(1), ones * torch.exp(-total)[..., None], ones * torch.exp(total)[..., None],
        gauge="decay in keys and queries",
    )  # fmt: skip
    assert float(measures.memory_half_life(r)[0, 0, 0]) == pytest.approx(math.log(0.5, 0.8))
    assert np.isinf(measures.memory_half_life(moved)).all()
    assert measures.effective_horizon(r).item() == measures.effective_horizon(moved).item()
    assert measures.memory_half_life(moved).attrs["gauge"] == "decay in keys and queries"


def test_lags_of_a_window() -> None:
    w = torch.zeros(8, 8, dtype=torch.float64)
    for lag, mass in enumerate((0.5, -0.3, 0.2)):
        w += mass * torch.diag(torch.ones(8 - lag, dtype=torch.float64), -lag)
    shares = measures.lag_mass(w)
    assert shares.values[:3].sum() == pytest.approx(1)
    assert float(shares[0]) == pytest.approx((1 + 0.5 / 0.8 + 6 * 0.5) / 8)
    horizons = [measures.effective_horizon(w, m).item() for m in (0.5, 0.85, 1.0)]
    assert horizons == [0, 1, 2]


def test_state_sizes() -> None:
    q = random(1, 7, 4, 3)
    softmax = dsf.Recurrence(Identity(7), dsf.OneHot(7, 7), dsf.SoftmaxRows(q, q))
    values = random(1, 7, 4, 5)
    found = measures.n_state(softmax, values)
    assert found.values.tolist() == [35] * 4
    assert (found.attrs["channels"], found.attrs["n_scheduler"]) == (5, 21)
    encoder = dsf.Bidirectional.from_rows(softmax)
    assert measures.n_state(encoder, values).values.tolist() == [35] * 4
    r = with_decay(torch.ones(1, 7, 1, 6, dtype=torch.float64))
    assert measures.n_state(r, channels=2).values.tolist() == [12]
    assert measures.n_state(dsf.Bidirectional(r, dsf.anticausal(r))).values.tolist() == [12]
    turning = r.replace(A=Diagonal(torch.zeros(1, 1, 1, 6), phase=torch.ones(1, 1, 1, 6)))
    assert measures.n_state(turning).values.tolist() == [12]
    with pytest.raises((DsfTypeError, TypeError)):
        measures.n_state(torch.eye(3))
