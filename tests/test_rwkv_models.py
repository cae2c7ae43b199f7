"""RWKV-4, 6 and 7 against released code, their loops, and decays that a division would lose."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.models.rwkv4 import Rwkv4, rwkv4_recurrence
from dsf.models.rwkv6 import Rwkv6, rwkv6_recurrence
from dsf.models.rwkv7 import Rwkv7, rwkv7_recurrence

EXACT = 1e-12


def states_of(r, v, expected):
    """The last state, by either path; the outputs (batch, head, time, channel) are checked."""
    for backend in ("reference", "auto"):
        y, state = dsf.scan(r, v, backend, return_state=True)
        assert_golden(y.transpose(1, 2), expected)
        yield state


def test_golden_rwkv4():
    case = golden("rwkv4_wkv")
    log_decay = -case["param.time_decay_raw"].exp()
    k, v, u = case["in.key"], case["in.value"][..., None], case["param.time_first"]
    r = rwkv4_recurrence(k, log_decay, u)
    for backend in ("reference", "auto"):
        assert_golden(dsf.scan(r, v, backend)[..., 0], case["out.y"])
    assert_golden(dsf.materialise(r), case["weights_per_channel"])
    bare = rwkv4_recurrence(k, log_decay, u, normalise=False)
    for values, name in ((v, "num"), (torch.ones_like(v), "den")):
        _, state = dsf.scan(bare, values, return_state=True)
        total = log_decay.exp() * state[..., 0, 0] + state[..., 1, 0]
        assert_golden(total, case[f"out.final_{name}"] * case["out.final_max"].exp())


def test_rwkv4_goes_on_from_its_numerator_and_denominator():
    case = golden("rwkv4_wkv")
    log_decay = -case["param.time_decay_raw"].exp()
    k, v, u = case["in.key"], case["in.value"][..., None], case["param.time_first"]
    weight = torch.exp(torch.arange(5, -1, -1)[:, None] * log_decay + k[:, :6])
    start, total = (weight * v[:, :6, :, 0]).sum(1), weight.sum(1)
    r = rwkv4_recurrence(k[:, 6:], log_decay, u, initial_state=start, initial_sum=total)
    assert_golden(dsf.scan(r, v[:, 6:])[..., 0], case["out.y"][:, 6:])


@pytest.mark.parametrize("initial", [False, True])
def test_golden_rwkv6(initial):
    case = golden("fla_rwkv6")
    q, k, v, w = (case[f"in.{n}"].transpose(1, 2) for n in "qkvw")
    r = rwkv6_recurrence(
        q, k, w, case["in.u"], scale=float(case["opt.scale"]),
        initial_state=case["in.initial_state"] if initial else None,
    )  # fmt: skip
    end = "_with_initial_state" * initial
    for state in states_of(r, v, case[f"out.o{end}"]):
        before, written = state.unflatten(2, (-1, 2)).unbind(3)
        final = w[:, -1, :, :, None].exp() * before + written
        assert_golden(final, case[f"out.final_state{end}"])
    if not initial:
        assert_golden(dsf.materialise(r), case["weights"])


@pytest.mark.parametrize("name", ["fla_dplr_delta_rule", "fla_iplr_delta_rule"])
@pytest.mark.parametrize("initial", [False, True])
def test_golden_rwkv7(name, initial):
    """The released generalised delta rules, of which RWKV-7's core is one."""
    case = golden(name)
    q, k, v, alpha, beta = (
        case[f"in.{n}"].transpose(1, 2) for n in ("q", "k", "v", "alpha", "beta"))  # fmt: skip
    w = case["in.gk"].transpose(1, 2) if "in.gk" in case else torch.zeros_like(q)
    r = rwkv7_recurrence(
        q, k, w, -alpha, beta, scale=q.shape[-1] ** -0.5,
        initial_state=case["in.initial_state"] if initial else None,
    )  # fmt: skip
    end = "_with_initial_state" * initial
    for state in states_of(r, v, case[f"out.o{end}"]):
        assert_golden(state, case[f"out.final_state{end}"])
    if not initial:
        assert_golden(dsf.materialise(r), case["weights"])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0])
def test_rwkv6_reads_what_the_decay_is_about_to_take(size):
    """Decays of exactly 0, 1e-30 and 1: y_t still holds S_{t-1} to round-off, nothing divided."""
    r, k, v = (normal(1, 6, 2, 3, seed=i) for i in range(3))
    decay = torch.sigmoid(normal(1, 6, 2, 3, seed=3))
    decay[:, ::2] = size
    u = normal(2, 3, seed=4)
    state, expected = torch.zeros(1, 2, 3, 3).double(), []
    for t in range(6):
        new = k[:, t, :, :, None] * v[:, t, :, None]
        expected.append(torch.einsum("bhn,bhnp->bhp", r[:, t], state + u[..., None] * new))
        state = decay[:, t, :, :, None] * state + new
    system = rwkv6_recurrence(r, k, decay.log(), u)
    assert_near("loop", dsf.scan(system, v), torch.stack(expected, 1), EXACT)


def test_rwkv7_with_replacement_equal_removal_is_a_projection():
    """w = 0, b = kappa: the state's part along kappa is gone, the rest is as it was."""
    kappa = torch.nn.functional.normalize(normal(1, 1, 1, 4), dim=-1)
    q = normal(1, 1, 1, 4, seed=1)
    A = rwkv7_recurrence(q, q, torch.zeros_like(q), kappa, kappa).A
    state = normal(1, 1, 1, 4, 2, seed=2)
    erased = A.apply(state)
    assert_near("along", kappa[..., None, :] @ erased, torch.zeros(1, 1, 1, 1, 2).double(), EXACT)
    assert_near("twice", A.apply(erased), erased, EXACT)


@torch.no_grad()
def test_rwkv4_layer_against_transformers():
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    config = pytest.importorskip("transformers").RwkvConfig(
        hidden_size=8, attention_hidden_size=12, num_hidden_layers=1)  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.RwkvSelfAttention(config).double()
    for parameter in theirs.parameters():
        parameter.uniform_(-1, 1)
    ours = Rwkv4(8, n_hidden=12).double()
    ours.load_state_dict(theirs.state_dict())
    x = fresh_input(8, length=9)
    y, _ = theirs(x)
    # the released layer computes the sums in float32
    assert_near("layer", ours(x), y, 1e-6)


OPTIONS = {
    "rwkv4": (Rwkv4, {"n_hidden": 6}),
    "rwkv6": (Rwkv6, {"n_head": 2, "mix_rank": 2, "decay_rank": 3}),
    "rwkv7": (Rwkv7, {"n_head": 2, "rank": 3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    check_all(shaken(kind(8, **options), size=0.3), fresh_input(8, length=7))
