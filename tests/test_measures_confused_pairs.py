"""Confusion counts: exact on constructed rows, frozen prefixes, tiles, and what attrs say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from model_laws import normal

import dsf
import dsf.measures._frozen_rows as _frozen_rows
import dsf.measures.confused_pairs as module
from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.measures.confused_pairs import confusion_counts
from dsf.measures.moduli import local_modulus
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.transitions import Diagonal, Identity

EXACT = 1e-12
LENGTH, WIDTH = 15, 4
EPSILON, ETA = (1e-4, 1e-2, 0.2), (0.1, 0.5, 1.0)


def qk(length: int = LENGTH, batch: int = 2, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    return normal(batch, length, 2, width), normal(batch, length, 2, width, seed=1)


def softmax(q: torch.Tensor, k: torch.Tensor, causal: bool) -> dsf.wrappers.System:
    n = k.shape[1]
    rows = dsf.SoftmaxRows(q, k, causal=causal)
    r = dsf.Recurrence(Identity(n), dsf.OneHot(n, n), rows, system="softmax")
    return r if causal else dsf.Bidirectional.from_rows(r)


def system(name: str, q: torch.Tensor, k: torch.Tensor, causal: bool) -> dsf.wrappers.System:
    if name == "softmax":
        return softmax(q, k, causal)
    if name == "inline":
        return inline_attention_recurrence(q, k, causal=causal, scale="published")
    normalise = name != "undivided"
    return linear_attention_recurrence(
        q, k, causal=causal, normalise=normalise, feature_map="relu" if name == "relu" else
        "elu_plus_one")  # fmt: skip


NAMES = ("softmax", "inline", "linear", "undivided")


def rows_of(name: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Rows (query, key) of one head over all the keys given."""
    phi = dsf.feature_maps.elu_plus_one
    if name == "softmax":
        return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1)
    if name == "inline":
        return q @ (k - k.mean(0)).T + 1 / len(k)
    w = phi(q) @ phi(k).T
    return w / w.sum(-1, keepdim=True) if name == "linear" else w


def pairs_by_hand(a: torch.Tensor, q: torch.Tensor, epsilon: float, eta: float) -> tuple[int, int]:
    rms = float(q.square().sum(-1).mean().sqrt())
    count = far = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        away = float((q[i] - q[j]).norm()) >= eta * rms
        near = float((a[i] - a[j]).norm()) <= epsilon * float(a[i].norm() + a[j].norm()) / 2
        far += away
        count += away and near
    return count, far


def test_identical_rows_and_distant_queries_are_counted_exactly() -> None:
    """Seven queries: 0, 1, 2 share a row, 3, 4 another; 5 is 0's row and nearly 0's query."""
    a, b = normal(9), normal(9, seed=1)
    weights = torch.stack([a, a, a, b, b, a, normal(9, seed=2)])[None, None]
    q = torch.tensor([0.0, 4, -4, 8, -8, 0.01, 2], dtype=torch.float64)[None, :, None, None]
    found = confusion_counts(square(weights), pad_queries(q), epsilon=EPSILON[:2], eta=(0.1,))
    # of the rows that a gives (0, 1, 2, 5) all six pairs but (0, 5), and (3, 4)
    assert found["count"].values.ravel().tolist() == [6, 6]
    assert found.rate.values.ravel().tolist() == pytest.approx([6 / found.far_pairs.item()] * 2)


def square(weights: torch.Tensor) -> torch.Tensor:
    """7 x 9 rows among rows that are far from all others, so that the map is square."""
    extra = 100 * torch.eye(9, dtype=torch.float64)[:2] + 5
    return torch.cat([weights, extra[None, None]], 2)


def pad_queries(q: torch.Tensor) -> torch.Tensor:
    return torch.cat([q, torch.tensor([3.0, -3]).double()[None, :, None, None]], 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_all_pairs(name: str, causal: bool) -> None:
    """Causal: later queries evaluated on the first keys alone, as the mixer itself would."""
    q, k = qk()
    q[:, 9] = 3 * q[:, 8]  # a pair on one ray
    q[:, 12] = q[:, 11] + 1e-6
    prefix = 6
    found = confusion_counts(
        system(name, q, k, causal), q, epsilon=EPSILON, eta=ETA,
        prefix=prefix if causal else None)  # fmt: skip
    first = prefix if causal else 0
    for b, h in itertools.product(range(2), range(2)):
        keys = k[b, :prefix, h] if causal else k[b, :, h]
        a, own = rows_of(name, q[b, first:, h], keys), q[b, first:, h]
        for i, j in itertools.product(range(3), range(3)):
            count, far = pairs_by_hand(a, own, EPSILON[i], ETA[j])
            assert int(found["count"][b, h, i, j]) == count
            assert int(found.far_pairs[b, h, j]) == far
            assert float(found.rate[b, h, i, j]) == pytest.approx(count / far)
    assert found["count"].attrs["n_query"] == LENGTH - first
    assert found["count"].attrs["prefix"] == (prefix if causal else -1)
    assert float(found.near_rays.min()) >= 1 / found["count"].attrs["pairs"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_rows_are_the_mixer_over_the_prefix(name: str, causal: bool) -> None:
    q, k = qk()
    s = system(name, q, k, causal)
    source = dsf.measures._maps.open_map(s)
    rows = _frozen_rows.frozen_rows(s, source, 6 if causal else None, None, "dsf.test")
    found = rows.read(range(2, 5))
    first = 6 if causal else 0
    keys = k[1, :6, 1] if causal else k[1, :, 1]
    expected = rows_of(name, q[1, first + 2 : first + 5, 1], keys)
    assert float((found[1, 1] - expected).abs().max()) <= EXACT


def test_a_decaying_state_is_read_where_it_was_frozen() -> None:
    A = Diagonal(-normal(1, LENGTH, 2, 3).abs())
    r = dsf.Recurrence(A, normal(1, LENGTH, 2, 3, 1, seed=1), normal(1, LENGTH, 2, 1, 3, seed=2))
    rows = _frozen_rows.frozen_rows(r, dsf.measures._maps.open_map(r), 5, None, "dsf.test")
    state = torch.zeros(3, 5, dtype=torch.float64)
    for t in range(5):
        state = state * torch.exp(A.log_decay[0, t, 1])[:, None]
        state[:, t] += r.B[0, t, 1, :, 0]
    expected = r.C[0, 5:, 1, 0] @ state
    assert float((rows.read(range(10))[0, 1] - expected).abs().max()) <= EXACT
    back = dsf.anticausal(r.flip_time())
    one, two = confusion_counts(r, prefix=5), confusion_counts(back, prefix=5)
    assert (one["count"].values == two["count"].values).all()
    np.testing.assert_allclose(one.rate, two.rate)


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk()
    q[:, 9] = 3 * q[:, 8]
    kinds = [(n, c) for n in ("softmax", "inline") for c in (True, False)]
    whole = [confusion_counts(system(n, q, k, c), epsilon=(1e-3, 0.3), moduli=0) for n, c in kinds]
    monkeypatch.setattr(module, "_MOST_ROWS", 4)
    tiled = [confusion_counts(system(n, q, k, c), epsilon=(1e-3, 0.3), moduli=0) for n, c in kinds]
    for one, two in zip(whole, tiled, strict=True):
        assert one.equals(two)


def test_pairs_at_the_bound_are_measured_entry_by_entry() -> None:
    """Rows 1e-9 apart: the product form |a|^2 + |b|^2 - 2 a.b cannot tell them from equal."""
    row = normal(6)
    step = torch.zeros(6, dtype=torch.float64)
    step[0] = 1e-9
    weights = torch.stack([row + i * step for i in range(6)])[None, None]
    q = torch.arange(6, dtype=torch.float64)[None, :, None, None]
    bounds = (0.5e-9, 1.5e-9, 2.5e-9, 5.5e-9)
    found = confusion_counts(weights, q, epsilon=bounds, eta=(0.0,), relative=False)
    assert found["count"].values.ravel().tolist() == [0, 5, 9, 15]


@pytest.mark.parametrize("name", ["softmax", "relu", "inline"])
def test_gaussian_queries_are_not_confused(name: str) -> None:
    """197 queries of width 32: no rows closer than 1e-2."""
    q, k = (normal(1, 197, 1, 32, seed=s) for s in (0, 1))
    found = confusion_counts(system(name, q, k, False), q, epsilon=(1e-2,), eta=(0.0,),
                             relative=False, moduli=0)  # fmt: skip
    assert found["count"].item() == 0
    assert found.far_pairs.item() == 197 * 196 // 2


def test_collinear_queries_are_confused_by_relu_alone() -> None:
    q, k = qk(40)
    q = q[:, :1].abs() * torch.linspace(0.5, 3, 40).double()[None, :, None, None]
    count = {n: int(confusion_counts(system(n, q, k, False), q, epsilon=(1e-3,), eta=(0.1,))[
        "count"].sum()) for n in ("softmax", "relu", "inline")}  # fmt: skip
    assert count["relu"] > 1000
    assert count["softmax"] == count["inline"] == 0


def test_the_companions_come_with_the_counts() -> None:
    q, k = qk()
    found = confusion_counts(softmax(q, k, False), moduli=5)
    each = local_modulus(softmax(q, k, False), [14, 11, 8, 5, 2])
    np.testing.assert_allclose(found.modulus_min, each.min("query"))
    np.testing.assert_allclose(found.modulus_median, each.median("query"))
    assert np.isnan(confusion_counts(softmax(q, k, False), moduli=0).modulus_min).all()
    assert float(confusion_counts(system("relu", q, k, False)).modulus_min.max()) <= 1e-14
    for key in ("n_key", "pairs", "sum_rule", "cosine_gap", "length_ratio", "space", "relative"):
        assert key in found["count"].attrs
    assert found["count"].dims == ("batch", "head", "epsilon", "eta")


@pytest.mark.parametrize("length", [1, 2])
def test_no_pair_has_no_rate(length: int) -> None:
    q, k = qk(length)
    found = confusion_counts(softmax(q, k, True))
    assert np.isnan(found.rate).all()
    assert int(found["count"].sum()) == 0
    assert np.isnan(found.near_rays).all()


def test_complex_maps_and_refusals() -> None:
    q, k = qk()
    weights = torch.complex(normal(1, 1, 5, 5), normal(1, 1, 5, 5, seed=1))
    weights[..., 1, :] = weights[..., 0, :]
    found = confusion_counts(weights, normal(1, 5, 1, 3))
    assert int(found["count"][0, 0, 0, 0]) == 1
    with pytest.raises(DsfValueError, match="do not hold their queries"):
        confusion_counts(weights)
    with pytest.raises(DsfShapeError, match=r"queries: expected axes \(batch=2, time=15, head=2"):
        confusion_counts(softmax(q, k, True), q[:, 1:])
    with pytest.raises(DsfValueError, match="prefix: expected None"):
        confusion_counts(softmax(q, k, False), prefix=3)
    with pytest.raises(DsfValueError, match=r"prefix: expected 1\.\.15"):
        confusion_counts(softmax(q, k, True), prefix=16)
    with pytest.raises(DsfValueError, match="epsilon: expected numbers of at least 0"):
        confusion_counts(softmax(q, k, True), epsilon=(-1.0,))
    with pytest.raises(DsfValueError, match="rule: expected one of"):
        confusion_counts(system("linear", q, k, True), rule="other")
    with pytest.raises(DsfUnsupportedError, match="cut backwards"):
        confusion_counts(dsf.anticausal(softmax(q, k, False).causal))  # type: ignore[union-attr]
