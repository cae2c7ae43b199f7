"""The Elman layer: its system along the trajectory is torch's RNN, its Jacobian autograd's."""

import pytest
import torch
from model_laws import assert_near, check_all, check_linearisation, fresh_input, shaken

import dsf
from dsf.models.rnn import Rnn, recurrences_of
from dsf.transitions import Dense

EXACT = 1e-12


@pytest.mark.parametrize("options", [{"nonlinearity": "relu"}, {"n_hidden": 8, "bias": False}])
def test_contract_with_options(options):
    torch.manual_seed(0)
    check_all(shaken(Rnn(8, **options)), fresh_input(8))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@torch.no_grad()
def test_every_layer_and_direction(nonlinearity):
    torch.manual_seed(0)
    module = torch.nn.RNN(5, 6, 2, nonlinearity=nonlinearity, bidirectional=True,
                          batch_first=True).double()  # fmt: skip
    x, h0 = fresh_input(5), fresh_input(6, length=2, batch=4, seed=3)
    runs = recurrences_of(module, x, h0)
    assert [(r.layer, r.direction) for r in runs] == [
        (0, "forward"), (0, "backward"), (1, "forward"), (1, "backward")]  # fmt: skip
    assert_near("module", torch.cat([r.output for r in runs[2:]], -1), module(x, h0)[0], EXACT)
    for run in runs:
        y = run.readout(dsf.scan(run.system, run.values))
        assert_near("scan", y, run.output, EXACT)


def test_linearisation_is_autograd_and_relu_is_its_own():
    """The map of `linearized` is the total Jacobian; for relu A is the Jacobian too."""
    torch.manual_seed(0)
    x = fresh_input(3, length=5, batch=1)
    for nonlinearity in ("tanh", "relu"):
        layer = shaken(Rnn(3, n_hidden=4, nonlinearity=nonlinearity))
        check_linearisation(layer, x, EXACT)
        r, _ = layer.recurrence(x)
        assert isinstance(r.A, Dense)
        assert r.mode == "exact_along_trajectory"
        same = torch.allclose(r.A.matrix, layer.linearized(x).A.matrix)
        assert same == (nonlinearity == "relu")


def test_a_zero_preactivation_has_the_slope_as_gain():
    layer = Rnn(2).double()
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    r, _ = layer.recurrence(torch.zeros(1, 3, 2, dtype=torch.float64))
    assert torch.equal(r.B[0, 0, 0], torch.eye(2, dtype=torch.float64))
