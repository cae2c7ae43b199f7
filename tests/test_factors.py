"""The cache, rows that are already there, and what does not fit together."""

from __future__ import annotations

import math

import laws
import pytest
import torch
from softmax_cases import system_of
from structures import Draw

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.transitions import Identity

RTOL = 1e-12
"""float64 against the map times the values."""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=RTOL, atol=RTOL)


# -- rows that are already there ---------------------------------------------------------------


def test_explicit_rows_are_the_map_they_hold():
    d = Draw(18)
    for causal in (True, False):
        weights = d.normal(2, 3, 7, 7)
        weights = weights.tril() if causal else weights
        rows = dsf.ExplicitRows(weights, causal=causal)
        system = system_of(rows)
        u = d.normal(2, 7, 3, 4)
        for backend in ("auto", "reference"):
            assert same(dsf.scan(system, u, backend), laws.apply_map(weights, u))
        assert torch.equal(dsf.materialise(system), weights)
        assert torch.equal(rows.time_slice(2, 4).weights, weights[:, :, 2:4])
    causal_part = dsf.Recurrence(Identity(7), dsf.OneHot(7, 7), dsf.ExplicitRows(weights, False))
    assert same(dsf.scan(causal_part, u), laws.apply_map(weights.tril(), u))
    assert torch.equal(dsf.materialise(causal_part), weights.tril())


def test_one_hot_writes_one_slot_per_step():
    B = dsf.OneHot(3, 5, offset=1)
    assert B.shape == (1, 3, 1, 5, 1)
    assert torch.equal(B.as_dense()[0, :, 0, :, 0], torch.eye(5, dtype=torch.float64)[1:4])
    assert B.time_slice(1, 3) == dsf.OneHot(2, 5, offset=2)


def test_empty_sequences():
    for length, batch in [(0, 2), (3, 0)]:
        q = torch.zeros(batch, length, 2, 4)
        for causal in (True, False):
            system = system_of(dsf.SoftmaxRows(q, q, causal=causal))
            y = dsf.scan(system, torch.zeros(batch, length, 2, 3))
            assert y.shape == (batch, length, 2, 3)


# -- what is refused ---------------------------------------------------------------------------

Q, K = torch.zeros(2, 6, 4, 5), torch.zeros(2, 6, 2, 5)
WRONG = {
    "groups": (dict(key=torch.zeros(2, 6, 3, 5)), "C.key: expected width=5 and a group that"),
    "width": (dict(key=torch.zeros(2, 6, 2, 4)), "C.key: expected width=5"),
    "batch": (dict(key=torch.zeros(3, 6, 2, 5)), "C.key: expected batch=2 or 1"),
    "axes": (dict(query=torch.zeros(2, 6, 5)), "C: expected query"),
    "mask": (dict(key_mask=torch.ones(2, 5)), r"C.key_mask: expected axes \(batch, key\) = "),
    "bias": (dict(bias=torch.zeros(4, 6, 6)), r"C.bias: expected axes \(batch, head, query, key"),
    "sink": (dict(sink=torch.zeros(2)), r"C.sink: expected axes \(head,\) = \(4,\)"),
    "window": (dict(window=0), "C.window: expected a positive number or None, got 0"),
    "softcap": (dict(softcap=-1.0), "C.softcap: expected a positive number or None, got -1.0"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_softmax_rows_that_do_not_fit_are_refused(fault):
    changes, message = WRONG[fault]
    rows = dsf.SoftmaxRows(**{"query": Q, "key": K, **changes})
    with pytest.raises(DsfShapeError, match=message):
        dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), rows).validate()


def test_caches_that_do_not_fit_are_refused():
    rows = dsf.SoftmaxRows(Q, K)
    with pytest.raises(DsfShapeError, match=r"B: expected offset \+ length <= n_slot=6"):
        dsf.Recurrence(Identity(6), dsf.OneHot(6, 6, offset=2), rows).validate()
    with pytest.raises(DsfShapeError, match=r"C: expected axes .*state=7"):
        dsf.Recurrence(Identity(7), dsf.OneHot(6, 7), rows).validate()
    with pytest.raises(DsfShapeError, match=r"C.weights: expected axes"):
        dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), dsf.ExplicitRows(Q[0])).validate()


def test_nonfinite_queries_are_refused_and_closed_biases_are_not():
    bad = Q.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(DsfValueError, match=r"C.query: expected finite numbers, got 1 NaN"):
        dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), dsf.SoftmaxRows(bad, K)).validate()
    bias = torch.full((1, 1, 6, 6), -math.inf)
    assert dsf.Recurrence(Identity(6), dsf.OneHot(6, 6), dsf.SoftmaxRows(Q, K, bias)).validate()
