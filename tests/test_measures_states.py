"""Measures of states: known orders, effective sizes, certified sketches, trusted values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from systems_with_states import of_structure, random, selective, softmax, uniform

import dsf
from dsf import measures
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.measures import _cut_values
from dsf.models.gla import gla_recurrence
from dsf.models.hierarchical_attention import hierarchical_attention_recurrence
from dsf.models.inline_attention import inline_attention_recurrence, register_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.models.mamba import mamba_recurrence
from dsf.models.mamba2 import ssd_recurrence
from dsf.models.metala import metala_recurrence
from dsf.models.monarch_attention import monarch_attention_recurrence
from dsf.models.taylor_attention import taylor_attention_recurrence
from dsf.models.zeros import zeros_radial_recurrence, zeros_recurrence
from dsf.transitions import Dense, Diagonal
from dsf.trees import tree_from_branching

THRESHOLD = 1e-10
NEAR = 1e-10
L, D = 32, 3


def qk(length: int = L, width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    return random(1, length, 1, width), random(1, length, 1, width, seed=1)


def order(system: object, **options: object) -> int:
    """The largest rank by SVDs of the map's blocks, not from the coefficients."""
    return int(measures.epsilon_rank(dsf.materialise(system), THRESHOLD, **options).max())


# -- item 11: the table of known orders ---------------------------------------------------------


@pytest.mark.parametrize("length", [8, 16, 32])
def test_softmax_needs_as_many_states_as_there_are(length: int) -> None:
    q, k = qk(length)
    block = torch.exp(q[0, :, 0] @ k[0, :, 0].T)[length // 2 :, : length // 2]
    sigma = torch.linalg.svdvals(block)
    assert int((sigma > 1e-13 * sigma[0]).sum()) == length // 2
    ranks = measures.cut_rank(dsf.materialise(softmax(length, 8)), THRESHOLD).values[0, 0]
    t = np.arange(1, length)
    assert np.array_equal(ranks, np.minimum(t, length - t))


ORDERS = {
    "linear attention": (
        lambda: linear_attention_recurrence(*qk(), feature_map="identity", normalise=False), D),
    "normalised linear attention": (
        lambda: linear_attention_recurrence(*qk(), feature_map="elu_plus_one"), D),
    "S6": (lambda: mamba_recurrence(
        uniform(1, L, 2), -uniform(2, D, seed=1) - 0.1, random(1, L, D), random(1, L, D, seed=1)),
        D),
    "SSD": (lambda: ssd_recurrence(-uniform(1, L, 1), *qk()), D),
    "MetaLA": (lambda: metala_recurrence(qk()[0], -uniform(1, L, 1, D)), D),
    "GLA": (lambda: gla_recurrence(*qk(), -uniform(1, L, 1, D)), D),
    "InLine, causal": (lambda: inline_attention_recurrence(*qk()), D + 1),
    "window of 5 keys": (lambda: register_recurrence(random(1, L, 1, 5)), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_mixers_need_the_states_they_have(name: str) -> None:
    make, expected = ORDERS[name]
    assert order(make()) == expected


@pytest.mark.parametrize("degree", [2, 4])
def test_truncated_taylor_softmax(degree: int) -> None:
    most = math.comb(2 + degree, degree)
    assert 1 < order(taylor_attention_recurrence(*qk(48, 2), order=degree)) <= most


@pytest.mark.parametrize("same", [False, True])
def test_zeros(same: bool) -> None:
    """L = 120, d = 7: 3 radial and 21 full; with equal gates 2 and 14."""
    length, d = 120, 7
    s = random(1, length, 1)
    first = torch.sigmoid(random(1, length, 1, seed=2))
    higher = first if same else torch.sigmoid(random(1, length, 1, seed=3))
    radial = zeros_radial_recurrence(s, first, higher)
    full = zeros_recurrence(*qk(length, d), s, first, higher)
    cuts = [20, 45, 60, 90]
    assert order(radial, cuts=cuts) == (2 if same else 3)
    assert order(full, cuts=cuts) == (2 * d if same else 3 * d)


@pytest.mark.parametrize("branching", [
    (4, 4, 4), (2, 4, 8), pytest.param((16, 8, 4, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_hierarchical_attention(branching: tuple[int, ...]) -> None:
    length = math.prod(branching)
    tree = tree_from_branching(length, branching)
    M = dsf.materialise(hierarchical_attention_recurrence(*qk(length, 8), tree))
    most = (1 + sum(b - 1 for b in branching)) // 2
    cuts = list(range(1, length))
    if length == 1024:  # through the middle of every family: 7 x 64 + 3 x 8 + 1 x 2 + 1
        assert most == 13
        cuts = list(range(470, 481))
    for side in ("lower", "upper"):
        assert int(measures.epsilon_rank(M, THRESHOLD, cuts=cuts, side=side).max()) == most


def test_monarch_does_not_reduce() -> None:
    system = monarch_attention_recurrence(*qk(16, 8), block=4)
    ranks = measures.cut_rank(dsf.materialise(system), THRESHOLD, side="lower").values[0, 0]
    t = np.arange(1, 16)
    assert np.array_equal(ranks, np.minimum(t, 16 - t))


# -- minimal states ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["current", "direct", "predictor"])
def test_minimal_states_are_what_realisation_attains(form: str) -> None:
    plain = selective(L, 4)
    with_d = plain.replace(D=random(1, 1, 1, 1, 1, seed=5))
    for system in (plain, with_d, softmax(12, 8), dsf.anticausal(plain)):
        found = measures.minimal_state(system, form)
        T = dsf.materialise(system)
        T = T.flip(-1, -2) if isinstance(system, dsf.Anticausal) else T
        states = dsf.map_blocks.minimal_states(T, form=form)
        states = states.flip(-1) if isinstance(system, dsf.Anticausal) else states
        assert np.array_equal(found.values, states.numpy())
    expected = 5 if form == "current" else 4
    assert int(measures.minimal_state(with_d, form).max()) == expected
    assert "no map" in measures.minimal_state(plain, "predictor").attrs["method"]


def test_minimal_states_of_both_halves() -> None:
    both = dsf.Bidirectional(selective(30, 2), dsf.anticausal(selective(30, 3, seed=7),
                                                              strict=True))  # fmt: skip
    for system in (both, dsf.materialise(both)):
        lower, upper = (measures.minimal_state(system, "predictor", side=s)
                        for s in ("lower", "upper"))  # fmt: skip
        assert (int(lower.max()), int(upper.max())) == (2, 3)
    assert upper.values[0, 0, -2:].tolist() == [2, 1]  # runs from the last step back
    with pytest.raises((DsfValueError, TypeError), match=r"form: expected|Type-check error"):
        measures.minimal_state(both, "other")


# -- effective state-size ----------------------------------------------------------------------


def test_effective_state_sizes_by_hand() -> None:
    """One cut matters: the block has singular values 3, 1, 0.01."""
    w = torch.zeros(6, 6, dtype=torch.float64)
    w[3, 0], w[4, 1], w[5, 2] = 3, 1, 0.01
    p = np.array([3, 1, 0.01]) / 4.01
    entropy = measures.effective_state_size(w, cuts=[3])
    assert entropy.item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=NEAR)
    counts = {t: int(measures.effective_state_size(w, "tolerance", t, cuts=[3]).item())
              for t in (0.001, 0.1, 2.0, 5.0)}  # fmt: skip
    assert counts == {0.001: 3, 0.1: 2, 2.0: 1, 5.0: 0}
    doubled = measures.effective_state_size(2 * w, "tolerance", 5.0, cuts=[3])
    assert doubled.item() == 1, "the tolerance is absolute"
    assert measures.effective_state_size(2 * w, cuts=[3]).item() == pytest.approx(entropy.item())
    assert float(measures.effective_state_size(0 * w).max()) == 0
    assert entropy.attrs["form"] == "entropy"


def test_effective_state_sizes_of_systems() -> None:
    r = selective(40, 5)
    for form in ("entropy", "tolerance"):
        fast = measures.effective_state_size(r, form, 1e-9)
        slow = measures.effective_state_size(dsf.materialise(r), form, 1e-9)
        np.testing.assert_allclose(fast.values, slow.values, rtol=1e-9)
        assert float(fast.max()) <= 5
        assert "no map" in fast.attrs["method"]
    copies = torch.zeros(8, 8, dtype=torch.float64)
    copies[4:, :4] = torch.eye(4)  # four directions of one size
    assert measures.effective_state_size(copies, cuts=[4]).item() == pytest.approx(4, rel=NEAR)
    with pytest.raises(DsfValueError, match="sketch: expected form='tolerance'"):
        measures.effective_state_size(softmax(20), sketch=4)
    with pytest.raises(DsfValueError, match="tolerance: expected in"):
        measures.effective_state_size(softmax(20), "tolerance", 0.0)


# -- sketches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 12])
def test_the_bounds_of_a_sketch_hold(size: int) -> None:
    """s_k <= sigma_k <= sqrt(s_k^2 + e^2) and sigma_{size+1} <= e at every cut."""
    cuts = [3, 18, 24, 40]
    encoder = dsf.Bidirectional.from_rows(
        softmax(48).replace(C=dsf.SoftmaxRows(*qk(48, 4), causal=False)))  # fmt: skip
    for system, side in ((softmax(48), "lower"), (encoder, "upper"), (selective(48, 9), "lower")):
        source = measures._maps.open_map(system)
        true = torch.from_numpy(
            measures.cut_singular_values(dsf.materialise(system), cuts=cuts, side=side).values
        )
        found = _cut_values.cut_values(system, source, cuts, side, None, size)
        s, e = found.sigma, found.noise[..., None]
        k = min(size, true.shape[-1])
        assert bool((s[..., :k] <= true[..., :k] * (1 + 1e-12) + 1e-14).all())
        assert bool((torch.hypot(s, e)[..., :k] >= true[..., :k] * (1 - 1e-12) - 1e-14).all())
        if size < true.shape[-1]:
            assert bool((true[..., size] <= e[..., 0] + 1e-13).all())


def test_ranks_by_sketches_are_those_of_the_blocks_and_say_their_risk() -> None:
    system, cuts = softmax(48), [6, 17, 24, 40]
    for tolerance in (0.1, 1e-3):
        exact = measures.cut_rank(system, tolerance, cuts=cuts)
        found = measures.cut_rank(system, tolerance, cuts=cuts, sketch=3)
        assert np.array_equal(found.values, exact.values)
        assert found.attrs["failure_probability"] == pytest.approx(4 * 5.0**-12)
        assert found.attrs["n_undecided"] == 0
        assert "failure_probability" not in exact.attrs
    absolute = measures.effective_state_size(system, "tolerance", 0.01, cuts=cuts, sketch=3)
    same = measures.effective_state_size(system, "tolerance", 0.01, cuts=cuts)
    assert np.array_equal(absolute.values, same.values)
    assert absolute.attrs["failure_probability"] < 1e-6
    values = measures.cut_singular_values(system, cuts=cuts, sketch=6)
    assert bool((values.n_trusted <= 6).all())


def test_long_systems_are_sketched_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cut_values, "SKETCH_FROM", 40)
    system, cuts = softmax(48), [10, 24]
    found = measures.epsilon_rank(system, 0.05, cuts=cuts)
    assert "sketch" in found.attrs["method"]
    exact = measures.epsilon_rank(dsf.materialise(system), 0.05, cuts=cuts)
    assert found.item() == exact.item()
    assert "blocks" in measures.epsilon_rank(softmax(40), 0.05).attrs["method"]
    assert "no map" in measures.epsilon_rank(selective(60, 3), 0.05).attrs["method"]
    gated = dsf.Gated(system, torch.ones(1, 48, 1, 2, dtype=torch.float64))
    assert "blocks" in measures.epsilon_rank(gated, 0.05, cuts=cuts).attrs["method"]
    with pytest.raises(DsfUnsupportedError, match="no gate by channel"):
        measures.epsilon_rank(gated, sketch=4)
    with pytest.raises(DsfTypeError, match="expected a dsf system, got a map"):
        measures.epsilon_rank(dsf.materialise(system), sketch=4)


# -- trusted values ----------------------------------------------------------------------------


def test_values_above_rounding_are_counted() -> None:
    r = selective(40, 4)
    for system in (r, dsf.materialise(r)):
        found = measures.cut_singular_values(system)
        assert found.n_trusted.dims == ("batch", "head", "time")
        t = np.arange(1, 40)
        assert np.array_equal(found.n_trusted.values[0, 0], np.minimum(4, np.minimum(t, 40 - t)))
    single = measures.cut_singular_values(dsf.materialise(r).float())
    assert int(single.n_trusted.max()) <= 4
    gated = measures.cut_singular_values(dsf.Gated(r, random(1, 40, 1, 2)))
    assert gated.n_trusted.dims == ("batch", "head", "channel", "time")


def test_hankel_values_of_time_invariant_systems() -> None:
    log = -torch.linspace(0.01, 2, 24, dtype=torch.float64)
    b, c = random(1, 1, 1, 24, 1), random(1, 1, 1, 1, 24, seed=1)
    diagonal = dsf.Recurrence(Diagonal(log[None, None, None]), b, c, system="made up")
    found = measures.hankel_values(diagonal)
    assert found.n_trusted.item() == 24
    assert float(found.hankel_singular_values.min()) < 1e-30
    dense = diagonal.replace(A=Dense(diagonal.A.as_dense()))
    plain = measures.hankel_values(dense)
    k = plain.n_trusted.item()
    assert 3 < k < 24
    assert bool(plain.hankel_singular_values[0, 0, k:].isnull().all())
    np.testing.assert_allclose(plain.hankel_singular_values[0, 0, :k],
                               found.hankel_singular_values[0, 0, :k], rtol=0.1)  # fmt: skip
    assert plain.attrs == {}
    assert plain.n_trusted.attrs["system"] == "made up"
    assert plain.hankel_singular_values.attrs["units"] == "1"
    with pytest.raises((DsfTypeError, TypeError), match=r"expected a dsf system|Type-check error"):
        measures.hankel_values(dsf.materialise(of_structure("dense")))
