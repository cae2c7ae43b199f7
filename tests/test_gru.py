"""GRU: torch's module in every option as systems, exact along the trajectory and linearised."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, check_linearisation, fresh_input
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dsf
from dsf.models.gru import Gru, gru_gates, gru_recurrence, recurrences_of

JACOBIAN = 1e-12
"""The map of the linearised system against autograd's Jacobian of the layer, relative."""


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_reference_run(backend):
    case = golden("torch_gru")
    module = torch.nn.GRU(5, 6, batch_first=True).double()
    module.load_state_dict(case.group("param"))
    for initial, end in ((None, ""), (case["in.h0"], "_with_initial")):
        (run,) = recurrences_of(module, case["in.x"], initial)
        y, state = dsf.scan(run.system, run.values, backend, return_state=True)
        assert_golden(run.readout(y), case["out.y" + end])
        assert_golden(state[..., 0, 0], case["out.h_n" + end][0])
        assert run.system.mode == "exact_along_trajectory"


def test_layer_matches_the_reference_run():
    case = golden("torch_gru")
    layer = Gru(5, n_hidden=6).double()
    layer.rnn.load_state_dict(case.group("param"))
    x = case["in.x"]
    assert_golden(layer(x), case["out.y"])
    state = case["in.h0"][0]
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        assert_golden(y, case["out.y_with_initial"][:, t])


def build(options):
    torch.manual_seed(0)
    return torch.nn.GRU(3, 4, **options).double()


def states(module, batch):
    n = module.num_layers * (2 if module.bidirectional else 1)
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, batch, 4, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
    ],
    ids=str,
)
def test_stacked_module(options, with_initial):
    module, x = build(options), fresh_input(3)
    given = x if module.batch_first else x.transpose(0, 1)
    initial = states(module, 2) if with_initial else None
    expected, h_n = module(given, initial)
    expected = expected if module.batch_first else expected.transpose(0, 1)
    runs = recurrences_of(module, given, initial)
    outputs = []
    for n, run in enumerate(runs):
        for backend in ("reference", "auto"):
            y, state = dsf.scan(run.system, run.values, backend, return_state=True)
            assert_near("readout", run.readout(y), run.output, FACES_ATOL)
            assert_near("h_n", state[..., 0, 0], h_n[n], FACES_ATOL)
        if run.layer == module.num_layers - 1:
            outputs.append(run.readout(y))
    assert_near("output", torch.cat(outputs, -1), expected, FACES_ATOL)


def test_packed_sequences():
    module = build({"bidirectional": True, "batch_first": True})
    x, initial = fresh_input(3, batch=3), states(module, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 11, 7]), True, enforce_sorted=False)
    y, h_n = module(packed, initial)
    expected, _ = pad_packed_sequence(y, batch_first=True)
    outputs = []
    for n, run in enumerate(recurrences_of(module, packed, initial)):
        y, state = dsf.scan(run.system, run.values, return_state=True)
        outputs.append(run.readout(y))
        assert_near("h_n", state[..., 0, 0], h_n[n], FACES_ATOL)
    assert_near("output", torch.cat(outputs, -1), expected, FACES_ATOL)


def test_linearised_map_is_the_jacobian():
    module = build({"bidirectional": True, "batch_first": True})
    x, initial = fresh_input(3, length=5, batch=1), states(module, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, initial)[0], x)
    for n, run in enumerate(recurrences_of(module, x, initial)):
        expected = jacobian[0, :, 4 * n : 4 * n + 4, 0].permute(0, 2, 1, 3)
        M = dsf.materialise(run.linearize())[0, 0]
        assert_near("Jacobian", M, expected.contiguous(), JACOBIAN)


def test_layer_linearisation_and_its_label():
    torch.manual_seed(0)
    check_linearisation(Gru(3).double(), fresh_input(3, length=4, batch=1), JACOBIAN)


def test_linearisation_is_differentiable():
    torch.manual_seed(0)
    layer, x = Gru(2).double(), fresh_input(2, length=3, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dsf.materialise(layer.linearized(x)), (x,))


def test_rows_of_the_map_sum_to_one_less_what_the_start_keeps():
    """h_t is a weighted mean of the candidates and h_0: the weights sum to 1 - prod z."""
    g = torch.Generator().manual_seed(0)
    logit = torch.randn(2, 9, 3, dtype=torch.float64, generator=g)
    M = dsf.materialise(gru_recurrence(logit))
    kept = torch.sigmoid(logit).cumprod(1).transpose(1, 2)
    assert_near("row sums", M.sum(-1), 1 - kept, 1e-14)


def test_empty_sequence():
    gates = gru_gates(fresh_input(3)[:, :0], Gru(3).double()._weights())
    assert [g.shape for g in gates] == [(2, 0, 3)] * 3
    assert Gru(3).double()(fresh_input(3)[:, :0]).shape == (2, 0, 3)
