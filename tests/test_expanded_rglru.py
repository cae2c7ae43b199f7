"""The state-expanded RG-LRU against its plain loop, and against the RG-LRU where they meet."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models.expanded_rglru import ExpandedRglru, expanded_rglru_recurrence
from dsf.models.rglru import rglru_recurrence

EXACT = 1e-12


def inputs(length=9, channel=3, n_state=4):
    """Logits, keys, queries, parameters, an initial state and values."""
    return (normal(2, length, channel), normal(2, length, n_state, seed=1),
            normal(2, length, n_state, seed=2), normal(n_state, channel, seed=3),
            normal(2, channel, n_state, seed=4), normal(2, length, channel, seed=5))  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_scan_is_the_plain_loop(length, backend):
    r, b, c, parameter, h, u = inputs(length)
    system = expanded_rglru_recurrence(r, b, c, parameter, c=3.0, initial_state=h)
    outputs = []
    for t in range(length):
        a = torch.exp(-3 * torch.sigmoid(r[:, t, :, None]) * torch.log1p(parameter.exp()).T)
        h = a * h + torch.sqrt(1 - a**2) * b[:, t, None] * u[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    y, last = dsf.scan(system, u[..., None], backend, return_state=True)
    assert_near("output", y[..., 0], torch.stack(outputs, 1), EXACT)
    assert_near("state", last[..., 0], h, EXACT)


def test_one_state_that_is_written_by_a_gate_is_the_rglru():
    """Of one channel: the key is then its input gate, the query 1."""
    r, i, _, parameter, _, u = inputs(channel=1, n_state=1)
    wide = expanded_rglru_recurrence(r, torch.sigmoid(i), torch.ones_like(i), parameter)
    plain = rglru_recurrence(r, i, parameter[0])
    assert_near("scan", dsf.scan(wide, u[..., None]), dsf.scan(plain, u[..., None]), EXACT)


@pytest.mark.parametrize("n_state", [1, 5])
def test_sizes_keep_the_contract(n_state):
    torch.manual_seed(0)
    check_all(shaken(ExpandedRglru(6, n_state=n_state), 0.3), fresh_input(6))


def test_what_does_not_fit_is_refused():
    r, b, c, parameter, *_ = inputs()
    with pytest.raises(DsfShapeError, match=r"query: expected shape \(2, 9, 4\), got \(2, 9, 3\)"):
        expanded_rglru_recurrence(r, b, c[..., :3], parameter)
    with pytest.raises(DsfShapeError, match=r"parameter: expected shape \(4, 3\), got \(3, 4\)"):
        expanded_rglru_recurrence(r, b, c, parameter.T)
    with pytest.raises(DsfValueError, match="n_state: expected at least 1, got 0"):
        ExpandedRglru(6, n_state=0)
