"""Gated attention's metrics: first-token attention, gate scores, sparsity, massive activations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

import dsf
from dsf import measures
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError
from dsf.models.gated_attention import gated_attention_recurrence
from dsf.transitions import Identity

NEAR = 1e-12
F_ATTN = {4096: 0.00217166, 2048: 0.00400492, 8: 0.33973214}
"""Mean over t of 1/t: the first token's share under uniform causal attention."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("length", F_ATTN)
def test_first_token_attention_of_uniform_rows(length: int) -> None:
    ones = torch.ones(1, length, 1, 1, 1, dtype=torch.float64)
    n = torch.arange(1, length + 1, dtype=torch.float64)[None, :, None, None, None]
    shares = measures.first_token_share(dsf.Recurrence(Identity(1), ones, ones / n))
    assert shares.attrs["method"] == "float64 scans, no map"
    assert float(shares.mean()) == pytest.approx(F_ATTN[length], abs=1e-8)
    later = measures.query_mean(shares, start=1)["mean"].item()
    assert later == pytest.approx((F_ATTN[length] * length - 1) / (length - 1), abs=1e-8)
    if length > 8:
        return
    q = torch.zeros(1, length, 1, 1, dtype=torch.float64)
    r = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), dsf.SoftmaxRows(q, q))
    assert float(measures.first_token_share(r).mean()) == pytest.approx(F_ATTN[8], abs=1e-8)


def test_orderings_of_the_published_table() -> None:
    """Spearman over the six gated rows: gate mean with F-Attn, M-Act, perplexity."""
    gate = [0.116, 0.172, 0.271, 0.221, 0.335, 0.653]
    first = [0.048, 0.073, 0.301, 0.297, 0.364, 0.451]
    activation = [94, 98, 286, 125, 471, 892]
    loss = [5.761, 5.792, 5.801, 5.820, 5.917, 5.900]
    for column, expected in ((first, 1.00), (activation, 1.00), (loss, 0.89)):
        assert scipy.stats.spearmanr(gate, column).statistic == pytest.approx(expected, abs=0.01)


def test_row_sums_under_each_gate() -> None:
    """G1: the gate; G2: at most 1; G3 and G4: 1, since they act inside the softmax."""
    q, k = random(1, 20, 2, 4), random(1, 20, 2, 4, seed=1)
    one = torch.sigmoid(random(1, 20, 2, 1, seed=2))
    wide = torch.sigmoid(random(1, 20, 2, 4, seed=3))
    sums = measures.row_sum(gated_attention_recurrence(q, k, output_gate=one))
    np.testing.assert_allclose(sums, one[..., 0].transpose(1, 2), rtol=0, atol=1e-13)
    sums = measures.row_sum(gated_attention_recurrence(q, k, value_gate=one))
    assert float(sums.max()) <= 1 + 1e-15
    for gates in ({"key_gate": wide}, {"query_gate": wide}):
        sums = measures.row_sum(gated_attention_recurrence(q, k, **gates))
        assert float(abs(sums - 1).max()) <= 1e-13


def test_a_sink_is_the_gate_that_its_share_implies() -> None:
    """A first key of value zero: y with it = (1 - a_t1) y without it, to 1e-14."""
    q, k, v = (random(1, 21, 2, 4, seed=i) for i in range(3))
    v[:, 0] = 0
    r = dsf.Recurrence(Identity(21), dsf.OneHot(21, 21), dsf.SoftmaxRows(q, k))
    implied = 1 - measures.first_token_share(r).values[0].T  # (query, head)
    rest = dsf.Recurrence(Identity(20), dsf.OneHot(20, 20), dsf.SoftmaxRows(q[:, 1:], k[:, 1:]))
    expected = torch.from_numpy(implied[1:])[None, :, :, None] * dsf.scan(rest, v[:, 1:])
    assert float((dsf.scan(r, v)[:, 1:] - expected).abs().max()) <= 1e-14


def test_gate_scores_and_sparsity_by_hand() -> None:
    gate = torch.tensor([[0.005, 0.5], [0.5, 0.5]], dtype=torch.float64)[None, :, :, None]
    output = torch.tensor(
        [[[1.0, 0.001], [2.0, 0.011]], [[0.015, -4.0], [0.0, 0.1]]], dtype=torch.float64
    )
    found = measures.gate_sparsity(gate, output[None], threshold=1e-2)
    assert found.gate_score.values.tolist() == pytest.approx([0.2525, 0.5])
    assert found.gate_below.values.tolist() == [0.5, 0]
    assert found.output_below.values.tolist() == [0.25, 0.25]
    # head 0: 0.005, 5e-6, 0.0075, 2; head 1: 1, 0.0055, 0, 0.05
    assert found.gated_below.values.tolist() == [0.75, 0.5]
    assert found.mean_gated_below.values.tolist() == [0.5, 0.5]
    assert found.output_size.values.tolist() == pytest.approx([5.016 / 4, 2.111 / 4], rel=1e-6)
    assert found.gated_size.values.tolist() == pytest.approx(
        [(0.005005 + 2.0075) / 4, 1.0555 / 4], rel=1e-6)  # fmt: skip
    assert found.gate_score.attrs["threshold"] == 0.01


def test_gates_of_a_system_shared_gates_and_wrong_ones() -> None:
    gate = torch.sigmoid(random(1, 9, 1, 1))
    system = dsf.Gated(
        dsf.Recurrence(Identity(2), random(1, 9, 3, 2, 1), random(1, 9, 3, 1, 2)), gate
    )
    output = random(1, 9, 3, 4)
    found = measures.gate_sparsity(system, output)
    assert found.sizes["head"] == 3
    assert float(found.gate_score[0]) == pytest.approx(float(gate.mean()), rel=NEAR)
    constant = measures.gate_sparsity(torch.full_like(gate, 0.3), output)
    assert constant.gated_below.equals(constant.mean_gated_below)
    with pytest.raises(DsfShapeError, match="gate: expected axes"):
        measures.gate_sparsity(gate[0])
    with pytest.raises(DsfShapeError, match="output: expected axes"):
        measures.gate_sparsity(gate, output[:, :5])
    with pytest.raises(DsfValueError, match="threshold: expected above 0"):
        measures.gate_sparsity(gate, threshold=0.0)
    with pytest.raises((DsfTypeError, TypeError)):
        measures.gate_sparsity(None)


def test_massive_activations_by_hand() -> None:
    quiet = torch.ones(1, 6, 4)
    loud = quiet.clone()
    loud[0, 2, 1], loud[0, 4, 3] = -5000.0, 1500.0
    small = 1e-3 * loud
    found = measures.massive_activations({"quiet": quiet, "loud": loud, "small": small})
    assert found.layer_name.values.tolist() == ["quiet", "loud", "small"]
    assert found.largest.values.tolist() == pytest.approx([1, 5000, 5])
    assert found["count"].values.tolist() == [0, 2, 0]  # 5 is no more than the floor of 100
    assert found.ratio.values.tolist() == pytest.approx([1, 5000, 5000], rel=1e-6)
    assert found.token.values[1:].tolist() == [2, 2]
    assert found.attrs["m_act"] == pytest.approx(5006 / 3)
    assert measures.massive_activations(small, floor=1.0)["count"].values.tolist() == [2]
    assert np.isnan(measures.massive_activations(torch.zeros(1, 2, 2)).ratio).all()


def test_massive_activations_of_a_trace() -> None:
    output = random(1, 7, 4)
    r = dsf.Recurrence(Identity(1), torch.ones(1, 7, 1, 1, 1), torch.ones(1, 1, 1, 1, 1))
    trace = dsf.LayerTrace("mixer", 0, "made", r, output, lambda y: y, output, 0.0, {})
    found = measures.massive_activations({"mixer": trace})
    assert float(found.largest[0]) == pytest.approx(float(output.abs().max()), rel=NEAR)
    assert measures.massive_activations(trace).largest.values == found.largest.values


def test_activations_that_are_none_are_refused() -> None:
    for bad in (torch.zeros(1, 0, 3), torch.full((1, 2, 2), torch.nan)):
        with pytest.raises(DsfValueError, match="expected numbers"):
            measures.massive_activations(bad)
    with pytest.raises(DsfValueError, match="expected a layer"):
        measures.massive_activations({})
    with pytest.raises(DsfShapeError, match="expected axes"):
        measures.massive_activations(torch.zeros(3))
    with pytest.raises(DsfTypeError, match="expected a tensor or a trace"):
        measures.massive_activations({"a": 3.0})
