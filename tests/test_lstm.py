"""LSTM: torch's module in every option as systems, exact along the trajectory and linearised."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, check_linearisation, fresh_input
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dsf
from dsf.errors import DsfShapeError, DsfTypeError, DsfUnsupportedError
from dsf.linearize import linearized
from dsf.models.lstm import Lstm, lstm_gates, lstm_recurrence, recurrences_of

JACOBIAN = 1e-12
"""The map of the linearised system against autograd's Jacobian of the layer, relative."""


def outputs_of(runs, backend="auto"):
    """The module's output from its last layer's systems, each through scan and readout."""
    last = max(r.layer for r in runs)
    sides = [r.readout(dsf.scan(r.system, r.values, backend)) for r in runs if r.layer == last]
    return torch.cat(sides, -1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_reference_run(backend):
    case = golden("torch_lstm")
    module = torch.nn.LSTM(5, 6, batch_first=True).double()
    module.load_state_dict(case.group("param"))
    for initial, end in ((None, ""), ((case["in.h0"], case["in.c0"]), "_with_initial")):
        (run,) = recurrences_of(module, case["in.x"], initial)
        cell, state = dsf.scan(run.system, run.values, backend, return_state=True)
        assert_golden(run.readout(cell), case["out.y" + end])
        assert_golden(state[..., 0, 0], case["out.c_n" + end][0])
        assert_golden(run.readout(cell)[:, -1], case["out.h_n" + end][0])
        assert run.system.mode == "exact_along_trajectory"


def test_layer_matches_the_reference_run():
    case = golden("torch_lstm")
    layer = Lstm(5, n_hidden=6).double()
    layer.rnn.load_state_dict(case.group("param"))
    x = case["in.x"]
    assert_golden(layer(x), case["out.y"])
    state = (case["in.h0"][0], case["in.c0"][0])
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        assert_golden(y, case["out.y_with_initial"][:, t])
    assert_golden(state[1], case["out.c_n_with_initial"][0])


OPTIONS = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
]


def build(options):
    torch.manual_seed(0)
    return torch.nn.LSTM(3, 4, **options).double()


def states(module, batch):
    n = module.num_layers * (2 if module.bidirectional else 1)
    g = torch.Generator().manual_seed(1)
    sizes = (module.proj_size or 4, 4)
    return tuple(torch.randn(n, batch, w, dtype=torch.float64, generator=g) for w in sizes)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stacked_module(options, with_initial, backend):
    module, x = build(options), fresh_input(3)
    given = x if module.batch_first else x.transpose(0, 1)
    initial = states(module, 2) if with_initial else None
    expected, (h_n, c_n) = module(given, initial)
    expected = expected if module.batch_first else expected.transpose(0, 1)
    runs = recurrences_of(module, given, initial)
    assert len(runs) == module.num_layers * (2 if module.bidirectional else 1)
    assert_near("output", outputs_of(runs, backend), expected, FACES_ATOL)
    for n, run in enumerate(runs):
        y, state = dsf.scan(run.system, run.values, backend, return_state=True)
        assert_near("readout", run.readout(y), run.output, FACES_ATOL)
        assert_near("c_n", state[..., 0, 0], c_n[n], FACES_ATOL)
        last = run.output[:, 0 if run.direction == "backward" else -1]
        assert_near("h_n", last, h_n[n], FACES_ATOL)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(bidirectional):
    module = build({"num_layers": 2, "bidirectional": bidirectional, "batch_first": True})
    x, initial = fresh_input(3, batch=3), states(module, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 11, 7]), True, enforce_sorted=False)
    y, (_, c_n) = module(packed, initial)
    expected, _ = pad_packed_sequence(y, batch_first=True)
    runs = recurrences_of(module, packed, initial)
    assert_near("output", outputs_of(runs), expected, FACES_ATOL)
    for n, run in enumerate(runs):
        _, state = dsf.scan(run.system, run.values, return_state=True)
        assert_near("c_n", state[..., 0, 0], c_n[n], FACES_ATOL)
    with pytest.raises(DsfUnsupportedError, match="one by one"):
        runs[0].linearize()


def test_unbatched_input():
    module, x = build({"bidirectional": True}), fresh_input(3)[0]
    h, c = states(module, 1)
    expected, _ = module(x, (h[:, 0], c[:, 0]))
    runs = recurrences_of(module, x, (h[:, 0], c[:, 0]))
    assert_near("output", outputs_of(runs)[0], expected, FACES_ATOL)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
def test_linearised_map_is_the_jacobian(options):
    module = build({**options, "batch_first": True})
    x, initial = fresh_input(3, length=5, batch=1), states(module, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, initial)[0], x)
    width = module.proj_size or 4
    for n, run in enumerate(recurrences_of(module, x, initial)):
        system = run.linearize()
        M = dsf.materialise(system)[0, 0]
        side = slice(n * width, (n + 1) * width)
        expected = jacobian[0, :, side, 0].permute(0, 2, 1, 3)
        assert_near("Jacobian", M, expected.contiguous(), JACOBIAN)
        change = 1e-6 * fresh_input(3, length=5, batch=1, seed=3)
        got = dsf.scan(system, change[:, :, None, :, None])[:, :, 0, :, 0]
        moved = (module(x + change, initial)[0] - module(x, initial)[0])[..., side]
        assert_near("first-order change", got / 1e-6, moved / 1e-6, 1e-5)


def test_layer_linearisation_and_its_label():
    torch.manual_seed(0)
    check_linearisation(Lstm(3).double(), fresh_input(3, length=4, batch=1), JACOBIAN)


def test_frozen_gates_do_not_hold_for_another_input():
    torch.manual_seed(0)
    layer, x = Lstm(3).double(), fresh_input(3)
    system, _ = layer.recurrence(x)
    _, other = layer.recurrence(2 * x)
    difference = layer.readout(dsf.scan(system, other), x) - layer(2 * x)
    assert float(difference.detach().abs().max()) > 1e-3


def test_saturated_forget_gates_keep_their_logs():
    raw = torch.tensor([[[40.0]], [[-800.0]]], dtype=torch.float64)
    system = lstm_recurrence(raw, raw)
    got = system.A.log_decay.flatten().tolist()
    assert got == pytest.approx([-4.248354255291589e-18, -800.0], rel=1e-14)


def test_empty_sequence():
    layer = Lstm(3).double()
    gates = lstm_gates(fresh_input(3)[:, :0], layer._weights())
    assert [g.shape for g in gates] == [(2, 0, 3)] * 6
    assert Lstm(3).double()(fresh_input(3)[:, :0]).shape == (2, 0, 3)


def test_wrong_arguments_are_named():
    module, x = build({"num_layers": 2}), fresh_input(3)
    with pytest.raises(DsfShapeError, match="feature=3"):
        recurrences_of(module, fresh_input(4))
    with pytest.raises(DsfShapeError, match="initial: expected states"):
        recurrences_of(module, x, states(module, 5))
    with pytest.raises(DsfTypeError, match="PackedSequence"):
        recurrences_of(module, [1, 2])
    with pytest.raises(DsfShapeError, match="batch is fixed by inputs"):
        linearized(lambda s, x: s + x, x, x[:1, 0])
    dropping = torch.nn.LSTM(3, 4, num_layers=2, dropout=0.5).double()
    with pytest.raises(DsfUnsupportedError, match=r"Call \.eval\(\)"):
        recurrences_of(dropping, x)
    assert len(recurrences_of(dropping.eval(), x)) == 2
