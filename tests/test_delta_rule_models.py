"""The delta rules against released code, the rule written as a loop, and each other."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import assert_near, check_all, fresh_input, normal, shaken, stepped

import dsf
from dsf.errors import DsfShapeError
from dsf.models.comba import Comba, comba_recurrence
from dsf.models.delta_net import DeltaNet, delta_net_recurrence
from dsf.models.gated_delta_net import GatedDeltaNet, gated_delta_net_recurrence
from dsf.models.gated_delta_product import GatedDeltaProduct, gated_delta_product_recurrence
from dsf.models.kimi_delta_attention import KimiDeltaAttention, kimi_delta_attention_recurrence
from dsf.transitions import DiagonalLowRank, Householder

EXACT = 1e-12


def check_core(make, case, names, transposed=False, weights=True):
    """Output and final state, from zero and from the given state, and the map."""

    def by_time(x):
        return x.transpose(1, 2) if transposed and x.ndim > 2 else x

    inputs = [by_time(case[f"in.{n}"]) for n in names]
    v = by_time(case["in.v"])
    for end, start in (("", None), ("_with_initial_state", case["in.initial_state"])):
        r = make(*inputs, initial_state=start)
        for backend in ("reference", "auto"):
            y, state = dsf.scan(r, v, backend, return_state=True)
            assert_golden(by_time(y), case[f"out.o{end}"])
            if f"out.final_state{end}" in case:
                assert_golden(state, case[f"out.final_state{end}"])
        if weights and start is None:
            assert_golden(dsf.materialise(r), case["weights"])


def test_golden_delta_net():
    check_core(delta_net_recurrence, golden("fla_delta_rule"), ["q", "k", "beta"], True)


def test_golden_gated_delta_net():
    case = golden("fla_gated_delta_rule")
    check_core(gated_delta_net_recurrence, case, ["q", "k", "g", "beta"])


def test_golden_kimi_delta_attention():
    """Equal decays on all channels commute with the reflection: the gated delta rule's numbers."""
    case = golden("fla_gated_delta_rule")

    def make(q, k, g, beta, initial_state):
        spread = g[..., None].expand_as(k)
        return kimi_delta_attention_recurrence(q, k, spread, beta, initial_state=initial_state)

    check_core(make, case, ["q", "k", "g", "beta"])


def test_golden_comba():
    case = golden("fla_comba")
    names = ["q", "k", "p", "g", "beta"]
    check_core(comba_recurrence, case, names)
    r = comba_recurrence(
        *(case[f"in.{n}"] for n in names), decay_first=False,
        initial_state=case["in.initial_state"],
    )  # fmt: skip
    y, state = dsf.scan(r, case["in.v"], return_state=True)
    assert_golden(y, case["info.o_chunk_variant_with_initial_state"])
    assert_golden(state, case["info.final_state_chunk_variant_with_initial_state"])


@pytest.mark.parametrize(("gated", "initial"), [(True, True), (True, False), (False, False)])
def test_golden_gated_delta_product(gated, initial):
    case = golden("fla_gated_delta_product")
    n = int(case["opt.num_householder"])
    k, v, beta = (case[f"in.{x}"].unflatten(1, (-1, n)).movedim(2, 3) for x in ("k", "v", "beta"))
    r = gated_delta_product_recurrence(
        case["in.q"], k, case["in.g"] if gated else None, beta, scale=1.0,
        initial_state=case["in.initial_state"] if initial else None,
    )  # fmt: skip
    end = "_with_initial_state" * initial
    for backend in ("reference", "auto"):
        y, state = dsf.scan(r, v, backend, return_state=True)
        assert_golden(y, case[f"out.o{end}" if gated else "out.o_without_gate"])
        if gated:
            assert_golden(state, case[f"out.final_state{end}"])


def test_golden_layer_of_qwen3_next():
    """The whole released layer: projections, convolution, unit keys, gates, norm."""
    case = golden("hf_qwen3next_gated_deltanet")
    layer = GatedDeltaNet(10, 2, key_width=8, value_width=10, norm_eps=1e-6).double()
    given = case.group("param")
    by_head = given["in_proj_qkvz.weight"].unflatten(0, (2, -1)).split([4, 4, 5, 5], dim=1)
    q, k, v, z = (part.flatten(0, 1) for part in by_head)
    b, a = given["in_proj_ba.weight"].unflatten(0, (2, 2)).unbind(1)
    conv = given["conv1d.weight"].split([8, 8, 10])
    parameters = {
        "strength.weight": b, "step_size.weight": a, "decay.A_log": given["A_log"],
        "decay.dt_bias": given["dt_bias"], "output.gate.weight": z,
        "output.norm.weight": given["norm.weight"], "output.out.weight": given["out_proj.weight"],
    }  # fmt: skip
    for name, weight, taps in zip(("query", "key", "value"), (q, k, v), conv, strict=True):
        parameters |= {f"{name}.linear.weight": weight, f"{name}.conv.weight": taps}
    layer.load_state_dict(parameters)
    x = case["in.x"]
    with torch.no_grad():
        r, values = layer.recurrence(x)
        assert_golden(values, case["mid.v"])
        assert_golden(dsf.scan(r, values), case["mid.o_core"])
        assert_golden(dsf.materialise(r), case["weights"])
        assert_golden(layer(x), case["out.y"])
        assert_golden(stepped(layer, x), case["out.y"])


def test_channel_decays_act_before_the_correction():
    """S~ = diag(e^g) S, then S = S~ + beta k (v - S~^T k)^T, step by step."""
    q, k = normal(2, 9, 2, 4), torch.nn.functional.normalize(normal(2, 9, 2, 4, seed=1), dim=-1)
    g, beta = -normal(2, 9, 2, 4, seed=2).exp(), torch.sigmoid(normal(2, 9, 2, seed=3))
    v = normal(2, 9, 2, 3, seed=4)
    state, expected = torch.zeros(2, 2, 4, 3, dtype=v.dtype), []
    for t in range(9):
        state = g[:, t, :, :, None].exp() * state
        error = v[:, t] - torch.einsum("bhnp,bhn->bhp", state, k[:, t])
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None]
        expected.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]) / 2)
    r = kimi_delta_attention_recurrence(q, k, g, beta)
    assert_near("loop", dsf.scan(r, v), torch.stack(expected, 1), EXACT)


def test_one_write_is_the_gated_delta_rule():
    q, k = normal(1, 6, 2, 3), torch.nn.functional.normalize(normal(1, 6, 2, 3, seed=1), dim=-1)
    g, beta = -normal(1, 6, 2, seed=2).exp(), torch.sigmoid(normal(1, 6, 2, seed=3))
    product = gated_delta_product_recurrence(q, k[:, :, :, None], g, beta[..., None])
    single = gated_delta_net_recurrence(q, k, g, beta)
    assert_near("maps", dsf.materialise(product).flatten(2), dsf.materialise(single).flatten(2),
                EXACT)  # fmt: skip


def test_product_of_reflections_is_the_matrix_product():
    """A_t = exp(g_t) H_n ... H_1 against the dense product, a decay of exactly zero among them."""
    k = torch.nn.functional.normalize(normal(1, 3, 1, 3, 4), dim=-1)
    beta, g = 2 * torch.sigmoid(normal(1, 3, 1, 3, seed=1)), -normal(1, 3, 1, seed=2).exp()
    g[:, 1] = -torch.inf
    r = gated_delta_product_recurrence(normal(1, 3, 1, 4), k, g, beta)
    expected = torch.eye(4, dtype=k.dtype)
    for j in range(3):
        expected = Householder(beta[..., j], k[..., j, :]).as_dense() @ expected
    assert_near("A", r.A.as_dense(), g.exp()[..., None, None] * expected, EXACT)
    with pytest.raises(DsfShapeError, match=r"write >= 1"):
        gated_delta_product_recurrence(normal(1, 3, 1, 4), k[:, :, :, :0], g, beta[..., :0])


def test_structures():
    q, beta = normal(1, 3, 2, 4), torch.ones(1, 3, 2).double()
    assert isinstance(delta_net_recurrence(q, q[:, :, :1], beta).A, Householder)
    assert isinstance(gated_delta_net_recurrence(q, q, -beta, beta).A, DiagonalLowRank)
    with pytest.raises(DsfShapeError, match=r"dsf\.delta_net_recurrence: key"):
        delta_net_recurrence(q, torch.cat([q, q[:, :, :1]], 2), beta)


def test_full_strength_overwrites_and_double_strength_reflects():
    """beta = 1: a key read again gives its last value; beta = 2: A is orthogonal."""
    k = torch.nn.functional.normalize(normal(1, 1, 1, 4), dim=-1).expand(1, 3, 1, 4)
    v = normal(1, 3, 1, 2)
    y = dsf.scan(delta_net_recurrence(k, k, torch.ones(1, 3, 1).double(), scale=1.0), v)
    assert_near("last value", y, v, EXACT)
    A = delta_net_recurrence(k, k, torch.full((1, 3, 1), 2.0).double()).A.as_dense()
    assert_near("orthogonal", A @ A.mT, torch.eye(4).double().expand_as(A), EXACT)
    layer = shaken(DeltaNet(8, 2, negative_eigenvalues=True), size=2.0)
    with torch.no_grad():
        assert float(layer.write_strength(fresh_input(8)).max()) > 1


OPTIONS = {
    "delta_net": (DeltaNet, {"gate": "silu", "conv_size": 0, "negative_eigenvalues": True}),
    "gated_delta_net": (GatedDeltaNet, {"n_group": 1, "key_width": 3, "value_width": 12}),
    "gated_delta_product": (GatedDeltaProduct, {"n_write": 3, "decays": False}),
    "gated_delta_product_1": (GatedDeltaProduct, {"n_write": 1, "conv_size": 2}),
    "kimi": (KimiDeltaAttention, {"rank": 3, "conv_size": 2}),
    "comba": (Comba, {"decay_first": True, "correction": 0.02}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    kind, options = OPTIONS[name]
    torch.manual_seed(0)
    check_all(shaken(kind(8, 2, **options)), fresh_input(8, length=7))
