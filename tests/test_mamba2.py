"""Mamba-2: the core against two reference runs and a naive loop, the layer against the release."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, check_all, fresh_input, shaken
from torch.nn.functional import rms_norm, silu, softplus

import dsf
from dsf.errors import DsfShapeError
from dsf.models._projections import GatedRmsNorm
from dsf.models.mamba2 import Mamba2, mamba2_recurrence, ssd_recurrence


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_discrete_core_matches_the_reference_run(backend):
    case = golden("mamba2_ssd_minimal")
    system = ssd_recurrence(case["in.A_log_decay"], case["in.B"], case["in.C"])
    y, state = dsf.scan(system, case["in.X"], backend, return_state=True)
    assert_golden(y, case["out.Y"])
    assert_golden(state.mT, case["out.final_state"])
    assert_golden(dsf.materialise(system), case["weights"])
    system = ssd_recurrence(
        case["in.A_log_decay"], case["in.B"], case["in.C"],
        initial_state=case["in.initial_state"].mT,
    )  # fmt: skip
    y, state = dsf.scan(system, case["in.X"], backend, return_state=True)
    assert_golden(y, case["out.Y_with_initial_state"])
    assert_golden(state.mT, case["out.final_state_with_initial_state"])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_core_with_step_groups_skip_and_gate_matches_the_reference_run(backend):
    case = golden("mamba2_ssd_combined_ref")

    def core(D=None):
        return mamba2_recurrence(
            case["in.dt"], case["in.A"], case["in.B"], case["in.C"], D,
            step_bias=case["in.dt_bias"], softplus=True,
        )  # fmt: skip

    y, state = dsf.scan(core(), case["in.x"], backend, return_state=True)
    assert_golden(y, case["out.y_no_D"])
    assert_golden(state.mT, case["out.final_state"])
    y = dsf.scan(core(case["in.D"]), case["in.x"], backend)
    assert_golden(y, case["out.y_with_D"])
    assert_golden(y * silu(case["in.z"]), case["out.y_with_D_and_gate"])
    assert_golden(dsf.materialise(core()), case["weights"])


def drawn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def naive(step, A, B, C, D, x, h, limits, reset):
    """One step after another, written for one batch, head and group at a time."""
    batch, length, head, channel = x.shape
    y, h = torch.zeros_like(x), h.clone()
    group = B.shape[2]
    for b in range(batch):
        for k in range(head):
            g = k // (head // group)
            for t in range(length):
                s = softplus(step[b, t, k]).clamp(*limits)
                decay = 0.0 if reset[b, t] else torch.exp(s * A[k])
                h[b, k] = decay * h[b, k] + s * B[b, t, g, :, None] * x[b, t, k]
                skip = D[k] if D.ndim == 2 else D[k].expand(channel)
                y[b, t, k] = C[b, t, g] @ h[b, k] + skip * x[b, t, k]
    return y, h


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("n_group", [1, 2, 4])
def test_every_option_matches_the_naive_loop(n_group, per_channel):
    batch, length, head, channel, n_state = 2, 9, 4, 3, 5
    step, A = drawn(batch, length, head), -drawn(head, seed=1).abs()
    B, C = drawn(2, batch, length, n_group, n_state, seed=2)
    D = drawn(head, channel, seed=3) if per_channel else drawn(head, seed=3)
    x, h = (
        drawn(batch, length, head, channel, seed=4),
        drawn(batch, head, n_state, channel, seed=5),
    )
    reset = torch.zeros(batch, length, dtype=torch.bool)
    reset[0, 4], reset[1, 0] = True, True
    limits = (0.4, 0.9)
    system = mamba2_recurrence(
        step, A, B, C, D, softplus=True, limits=limits, reset=reset, initial_state=h
    )
    values = x.flatten(2)[..., None] if per_channel else x
    y, last = dsf.scan(system.validate(), values, return_state=True)
    if per_channel:
        y = y.unflatten(2, (head, channel))[..., 0]
        last = last[..., 0].unflatten(1, (head, channel)).mT
    expected, expected_last = naive(step, A, B, C, D, x, h, limits, reset)
    assert_near("output", y, expected, FACES_ATOL)
    assert_near("final state", last, expected_last, FACES_ATOL)


def released_layer():
    case = golden("hf_mamba2_mixer")
    layer = Mamba2(6, 3, n_state=5).double()
    layer.load_state_dict(case.group("param"))
    return layer, case


def test_layer_matches_the_reference_run():
    layer, case = released_layer()
    assert_golden(layer(case["in.x"]), case["out.y"])
    state, outputs = None, []
    for t in range(case["in.x"].shape[1]):
        y, state = layer.step(case["in.x"][:, t], state)
        outputs.append(y)
    assert_golden(torch.stack(outputs, 1), case["out.y"])


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_norm_in_groups(norm_before_gate):
    y, z = drawn(2, 3, 8), drawn(2, 3, 8, seed=1)
    norm = GatedRmsNorm(8, n_group=2, norm_before_gate=norm_before_gate).double()
    torch.nn.init.normal_(norm.weight)
    inside = y if norm_before_gate else y * silu(z)
    parts = [rms_norm(p, (4,), eps=1e-5) for p in inside.split(4, dim=-1)]
    expected = torch.cat(parts, -1) * norm.weight * (silu(z) if norm_before_gate else 1)
    assert_near("norm", norm(y, z), expected, FACES_ATOL)


@pytest.mark.parametrize(
    "options",
    [
        {"n_head": 4, "n_group": 2, "n_state": 3, "conv_bias": False, "bias": True},
        {"head_width": 4, "n_state": 3, "norm_before_gate": True, "limits": (0.01, 0.02)},
    ],
    ids=["groups", "limits"],
)
def test_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(Mamba2(6, **options)), fresh_input(6))


def test_wrong_sizes_are_named():
    with pytest.raises(DsfShapeError, match="divisor of 12"):
        Mamba2(6, 5)
    with pytest.raises(DsfShapeError, match="multiple of n_group=2"):
        Mamba2(6, 3, n_group=2)
    log_decay, B = drawn(1, 4, 3), drawn(1, 4, 2, 5)
    with pytest.raises(DsfShapeError, match="dividing head=3"):
        ssd_recurrence(log_decay, B, B)
