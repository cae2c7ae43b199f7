"""Measures of a map against known answers: closed forms, hand-made rows, published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dsf
from dsf import measures
from dsf.errors import DsfMemoryError, DsfShapeError, DsfValueError
from dsf.transitions import Diagonal, Identity, Scalar

LENGTH = 24
EXACT = 1e-14
NEAR = 1e-12


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def causal_map(weights: torch.Tensor) -> torch.Tensor:
    return weights.tril()[None, None]


def uniform() -> torch.Tensor:
    n = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    return causal_map(torch.ones(LENGTH, LENGTH, dtype=torch.float64) / n[:, None])


def zeros_radial() -> torch.Tensor:
    """ZeroS rows: sigma1 delta / t + sigma_h epsilon, both parts zero-sum."""
    logits, rows = random(LENGTH, LENGTH), []
    for t in range(1, LENGTH + 1):
        s = logits[t - 1, :t]
        delta = s - s.mean()
        epsilon = torch.softmax(s, 0) - 1 / t - delta / t
        row = torch.zeros(LENGTH, dtype=torch.float64)
        row[:t] = 0.7 * delta / t + 0.4 * epsilon
        rows.append(row)
    return torch.stack(rows)[None, None]


# -- rows --------------------------------------------------------------------------------------


def test_uniform_rows() -> None:
    w = uniform()
    n = np.arange(1, LENGTH + 1)
    assert np.allclose(measures.row_sum(w), 1, atol=EXACT, rtol=0)
    assert np.allclose(measures.spread(w), 0, atol=EXACT, rtol=0)
    assert np.allclose(measures.entropy(w)[0, 0], np.log(n), atol=NEAR, rtol=0)
    assert np.allclose(measures.perplexity(w)[0, 0], n, rtol=NEAR)
    assert np.allclose(measures.first_token_share(w)[0, 0], 1 / n, atol=EXACT, rtol=0)
    assert np.all(measures.negative_mass(w) == 0)


def test_one_hot_rows() -> None:
    w = causal_map(torch.eye(LENGTH, dtype=torch.float64))
    n = np.arange(1, LENGTH + 1)
    assert np.allclose(measures.spread(w)[0, 0], np.sqrt(n - 1) / n, atol=EXACT, rtol=0)
    assert np.allclose(measures.scaled_spread(w)[0, 0], np.sqrt(n - 1), rtol=NEAR)
    assert np.all(measures.entropy(w) == 0)
    assert measures.first_token_share(w)[0, 0].values.tolist() == [1] + [0] * (LENGTH - 1)


def test_zero_sum_rows() -> None:
    w = zeros_radial()
    assert float(abs(measures.row_sum(w)).max()) <= EXACT
    assert np.allclose(measures.negative_mass(w)[0, 0, 1:], 0.5, atol=NEAR, rtol=0)
    spread = measures.spread(w)[0, 0].values
    for t in range(1, LENGTH + 1):
        row = w[0, 0, t - 1, :t].numpy()
        assert spread[t - 1] == pytest.approx(row.std(), abs=EXACT)
    first = measures.spread(causal_map(0.3 * (random(LENGTH, LENGTH))))
    row = 0.3 * random(LENGTH, LENGTH)[-1].numpy()
    assert float(first[0, 0, -1]) == pytest.approx(row.std(), rel=NEAR)


def test_first_order_spread_is_the_spread_of_the_logits() -> None:
    s, sigma = random(LENGTH), 0.6
    w = (sigma * (s - s.mean()) / LENGTH).expand(LENGTH, LENGTH)
    full = dsf.attention_map(full_system(w[None, None]))
    scaled = measures.scaled_spread(full)[0, 0].values
    assert np.allclose(scaled, sigma * s.std(unbiased=False).item(), rtol=NEAR)


def full_system(weights: torch.Tensor) -> dsf.Bidirectional:
    n = weights.shape[-1]
    rows = dsf.ExplicitRows(weights, causal=False)
    return dsf.Bidirectional.from_rows(dsf.Recurrence(Identity(n), dsf.OneHot(n, n), rows))


def test_signed_rows_by_hand() -> None:
    w = torch.tensor([[1.0, 0, 0], [3, -1, 0], [-2, 1, -1]], dtype=torch.float64)[None, None]
    assert measures.row_sum(w)[0, 0].values.tolist() == [1, 2, -2]
    assert measures.negative_mass(w)[0, 0].values.tolist() == [0, 0.25, 0.75]
    assert measures.negative_count_share(w)[0, 0].values.tolist() == [0, 0.5, 2 / 3]
    assert measures.first_token_share(w)[0, 0].values.tolist() == [1, 0.75, 0.5]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(measures.entropy(w)[0, 0, 1]) == pytest.approx(entropy, abs=EXACT)


def test_rows_of_zeros_have_no_shares() -> None:
    w = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    for name in ("entropy", "negative_mass", "first_token_share", "perplexity"):
        assert np.isnan(getattr(measures, name)(w)).all(), name
    assert np.all(measures.row_sum(w) == 0)
    assert np.all(measures.spread(w) == 0)


def test_a_complex_map_keeps_its_sums_and_has_no_signs() -> None:
    w = causal_map(random(5, 5, dtype=torch.complex128))
    assert np.allclose(measures.row_sum(w)[0, 0], w[0, 0].sum(-1).numpy())
    assert np.isnan(measures.negative_mass(w)).all()
    assert float(measures.entropy(w)[0, 0, -1]) <= math.log(5)


def test_masked_keys_do_not_count() -> None:
    q, mask = random(2, 6, 2, 3), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    rows = dsf.SoftmaxRows(torch.zeros_like(q), q, key_mask=mask, causal=False)
    r = dsf.Bidirectional.from_rows(dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), rows))
    assert np.allclose(measures.spread(r), 0, atol=EXACT)  # uniform over the keys there are
    assert np.allclose(measures.negative_count_share(r), 0)
    window = dsf.SoftmaxRows(torch.zeros_like(q), q, window=2)
    r = dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), window)
    assert np.allclose(measures.spread(r), 0, atol=EXACT)
    assert float(measures.entropy(r)[0, 0, -1]) == pytest.approx(math.log(2))


def test_wrong_axes_are_refused() -> None:
    with pytest.raises(DsfShapeError, match=r"dsf.measures: map: expected axes \(query, key\)"):
        measures.row_sum(torch.zeros(2, 3, 3))
    with pytest.raises(DsfShapeError, match="expected dims query and key"):
        measures.row_sum(measures.row_sum(uniform()))


# -- ranks of the whole map --------------------------------------------------------------------


def test_ranks_of_known_maps() -> None:
    eye = torch.eye(LENGTH, dtype=torch.float64)[None, None]
    assert measures.effective_rank(eye).item() == pytest.approx(LENGTH, rel=NEAR)
    assert measures.stable_rank(eye).item() == pytest.approx(LENGTH, rel=NEAR)
    ones = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.float64)
    assert measures.effective_rank(ones).item() == pytest.approx(1, abs=1e-10)
    assert measures.stable_rank(ones).item() == pytest.approx(1, abs=1e-10)
    assert measures.effective_rank(0 * ones).item() == measures.stable_rank(0 * ones).item() == 0
    two = torch.diag(torch.tensor([3.0, 1, 0], dtype=torch.float64))[None, None]
    p = np.array([0.75, 0.25])
    expected = np.exp(-(p * np.log(p)).sum())
    assert measures.effective_rank(two).item() == pytest.approx(expected, rel=NEAR)
    assert measures.stable_rank(two).item() == pytest.approx(10 / 9, rel=NEAR)


# -- ranks across a cut ------------------------------------------------------------------------


def rank(system: object, tolerance: float = 1e-10) -> int:
    return int(measures.epsilon_rank(system, tolerance).max())


def test_known_orders() -> None:
    """The table of realisation theory: states that each mixer needs."""
    q, k = random(1, LENGTH, 1, 3), random(1, LENGTH, 1, 3, seed=1)
    scores = (q[:, :, 0] @ k[:, :, 0].mT)[:, None]
    assert rank(torch.exp(scores).tril()) == LENGTH // 2
    assert rank(scores.tril()) == 3
    assert rank(((1 + scores) ** 2).tril()) <= math.comb(3 + 2, 2)
    assert rank(torch.eye(LENGTH, dtype=torch.float64)[None, None]) == 0
    assert rank(torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64)) == 0
    normalised = scores.tril() / scores.tril().sum(-1, keepdim=True)
    assert rank(normalised) == 3
    assert rank(zeros_radial_separable()) == 3


def zeros_radial_separable() -> torch.Tensor:
    """Radial ZeroS with logits of the keys alone: alpha e^s + beta s + gamma, order 3."""
    s = random(LENGTH)
    weights = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    for t in range(1, LENGTH + 1):
        delta = s[:t] - s[:t].mean()
        a, b = torch.sigmoid(random(2, seed=t))
        weights[t - 1, :t] = a * delta / t + b * (torch.softmax(s[:t], 0) - 1 / t - delta / t)
    return weights[None, None]


@pytest.mark.parametrize("states", [1, 4])
def test_states_of_a_recurrence_are_found_from_the_map_and_from_the_states(states: int) -> None:
    A = Diagonal(-random(2, LENGTH, 2, states).abs())
    r = dsf.Recurrence(
        A, random(2, LENGTH, 2, states, 1, seed=1), random(2, LENGTH, 2, 1, states, seed=2)
    )
    assert rank(r) == rank(dsf.materialise(r)) == states
    assert "no map" in measures.epsilon_rank(r).attrs["method"]
    fast, slow = measures.cut_singular_values(r), measures.cut_singular_values(dsf.materialise(r))
    gap = abs(fast.values - slow.values[..., :states]).max()
    assert gap <= NEAR * float(slow.max())


def test_both_criteria_by_hand() -> None:
    """One cut matters: the block has singular values 10, 1, 0.05."""
    w = torch.zeros(6, 6, dtype=torch.float64)
    w[3, 0], w[4, 1], w[5, 2] = 10, 1, 0.05
    found = {t: int(measures.epsilon_rank(w, t, cuts=[3])) for t in (0.2, 0.05, 0.01, 0.001)}
    assert found == {0.2: 1, 0.05: 2, 0.01: 2, 0.001: 3}
    by_norm = {t: int(measures.epsilon_rank(w, t, cuts=[3], criterion="frobenius"))
               for t in (0.2, 0.09, 0.01, 0.001)}  # fmt: skip
    assert by_norm == {0.2: 1, 0.09: 2, 0.01: 2, 0.001: 3}
    ranks = measures.cut_rank(w, 0.001)
    assert ranks.time.values.tolist() == [1, 2, 3, 4, 5]
    assert ranks.values.tolist() == [1, 2, 3, 2, 1]


def test_sides_of_a_bidirectional_map() -> None:
    A, shape = Scalar(-random(1, LENGTH, 1).abs(), n_state=2), (1, LENGTH, 1, 2, 1)
    one = dsf.Recurrence(A, random(*shape, seed=1), random(*shape, seed=2).mT)
    three = one.replace(A=Scalar(A.log_decay, n_state=3), B=random(1, LENGTH, 1, 3, 1, seed=3),
                        C=random(1, LENGTH, 1, 1, 3, seed=4))  # fmt: skip
    both = dsf.Bidirectional(one, dsf.anticausal(three, strict=True))
    for system in (both, dsf.attention_map(both)):
        sides = [
            int(measures.epsilon_rank(system, 1e-9, side=s).max()) for s in ("lower", "upper")
        ]
        assert sides == [2, 3]
    assert rank(dsf.anticausal(three), 1e-9) == 3


def test_a_sketch_finds_the_leading_values_without_the_map() -> None:
    q, k = random(1, 48, 2, 4), random(1, 48, 2, 4, seed=1)
    rows = dsf.SoftmaxRows(q, k, scale=0.3)
    softmax = dsf.Recurrence(Identity(48), dsf.OneHot(48, 48), rows)
    encoder = dsf.Bidirectional.from_rows(softmax.replace(C=dsf.SoftmaxRows(q, k, causal=False)))
    for system, side in ((softmax, "lower"), (encoder, "upper")):
        cuts = [6, 24, 40]
        true = measures.cut_singular_values(system, cuts=cuts, side=side).values
        found = measures.cut_singular_values(system, cuts=cuts, side=side, sketch=12).values
        assert (found <= true[..., :12] * (1 + 1e-12) + 1e-15).all()
        assert abs(found[..., :4] / true[..., :4] - 1).max() < 1e-4
        exact = measures.epsilon_rank(system, cuts=cuts, side=side)
        assert (measures.epsilon_rank(system, cuts=cuts, side=side, sketch=4) == exact).all()
    with pytest.raises(DsfValueError, match="sketch: expected criterion='sigma'"):
        measures.epsilon_rank(softmax, sketch=4, criterion="frobenius")
    with pytest.raises(DsfMemoryError, match="Pass sketch=32"):
        measures.epsilon_rank(softmax, max_memory=1000)


def test_several_inputs_and_outputs_are_taken_jointly() -> None:
    A = Diagonal(-random(1, LENGTH, 1, 4).abs())
    r = dsf.Recurrence(A, random(1, LENGTH, 1, 4, 2), random(1, LENGTH, 1, 2, 4, seed=1))
    short = r.time_slice(0, 8)  # as many states as half the steps: through the map
    assert "blocks" in measures.epsilon_rank(short).attrs["method"]
    assert rank(r) == rank(short) == 4


def test_tolerances_outside_are_refused() -> None:
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(DsfValueError, match=r"tolerance: expected in \(0, 1\)"):
            measures.epsilon_rank(uniform(), bad)
    with pytest.raises(DsfValueError, match="cuts: expected within 1"):
        measures.epsilon_rank(uniform(), cuts=[LENGTH])
