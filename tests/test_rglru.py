"""RG-LRU: the unit against the released code, the block against transformers' own."""

import pytest
import torch
from golden_vectors import assert_golden, golden
from model_laws import FACES_ATOL, assert_near, check_all, fresh_input, shaken

import dsf
from dsf.errors import DsfShapeError
from dsf.models.rglru import Rglru, RgLruCore, rglru_recurrence

EXACT = 1e-12
"""The framework's form against the elementwise recurrence (specification, section 7)."""


def released_core():
    case = golden("hf_rglru")
    core = RgLruCore(8, int(case["opt.num_heads"])).double()
    core.load_state_dict(case.group("param"))
    return core, case


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_unit_matches_the_reference_run(backend):
    core, case = released_core()
    reset = case["in.position_ids"] == 0
    x = case["in.x"]
    y, state = dsf.scan(core(x, reset), x[..., None], backend, return_state=True)
    assert_golden(y[..., 0], case["out.y"])
    assert_golden(state[..., 0, 0], case["out.final_state"])


def test_unit_without_the_root_matches_the_implicit_attention_code():
    core, case = released_core()
    x, reset = case["in.x"], case["in.position_ids"] == 0
    system = rglru_recurrence(
        core._logit("recurrent_gate", x), core._logit("input_gate", x), core.recurrent_param,
        normalised=False, reset=reset,
    )  # fmt: skip
    key = "without_gamma_UnifiedImplicitAttnRepr"
    assert_golden(dsf.scan(system, x[..., None])[..., 0], case[f"out.y_{key}"])
    assert_golden(dsf.materialise(system), case[f"weights_per_channel_{key}"])


@pytest.mark.parametrize(("c", "epsilon"), [(8.0, 0.0), (3.0, 1e-6)])
def test_unit_is_the_elementwise_recurrence(c, epsilon):
    g = torch.Generator().manual_seed(0)
    r, i, x = (torch.randn(2, 9, 3, dtype=torch.float64, generator=g) for _ in range(3))
    parameter, h = torch.randn(3, dtype=torch.float64, generator=g), torch.ones(2, 3).double()
    system = rglru_recurrence(r, i, parameter, c=c, epsilon=epsilon, initial_state=h)
    out = []
    for t in range(9):
        a = torch.exp(-c * torch.sigmoid(r[:, t]) * torch.log1p(torch.exp(parameter)))
        h = a * h + torch.sqrt(1 - a**2 + epsilon) * torch.sigmoid(i[:, t]) * x[:, t]
        out.append(h)
    y, last = dsf.scan(system, x[..., None], return_state=True)
    assert_near("output", y[..., 0], torch.stack(out, 1), EXACT)
    assert_near("final state", last[..., 0, 0], h, EXACT)


def test_reset_inside_the_sequence_starts_a_new_run():
    core, case = released_core()
    x = case["in.x"]
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 0], reset[1, 5] = True, True
    y = dsf.scan(core(x, reset), x[..., None])
    assert_golden(y[:1, ..., 0], case["out.y"][:1])
    alone = dsf.scan(core(x[1:, 5:], reset[1:, 5:]), x[1:, 5:, :, None])
    assert_near("after the reset", y[1:, 5:], alone, FACES_ATOL)


def test_a_reset_cuts_the_map_exactly():
    g = torch.Generator().manual_seed(0)
    r, i = (torch.randn(1, 6, 2, dtype=torch.float64, generator=g) for _ in range(2))
    reset = torch.tensor([[False, False, False, True, False, False]])
    M = dsf.materialise(rglru_recurrence(r, i, torch.zeros(2).double(), reset=reset))
    assert not bool(M[..., 3:, :3].any())
    assert torch.equal(M[0, :, 3, 3], torch.sigmoid(i[0, 3]))


def test_slow_decays_keep_the_root_and_its_gradient():
    """1 - a^2 = 2e-12 in float32, where 1 - a**2 itself would be 0."""
    r = torch.zeros(1, 1, 1, requires_grad=True)
    parameter = torch.log(torch.expm1(torch.tensor([2.5e-13])))
    system = rglru_recurrence(r, torch.full((1, 1, 1), 100.0), parameter)
    assert float(system.B.detach()) == pytest.approx((2e-12) ** 0.5, rel=1e-4)
    system.B.sum().backward()
    assert bool(torch.isfinite(r.grad).all())
    closed = torch.full((1, 1, 1), -1e4, requires_grad=True)  # sigmoid underflows: a is exactly 1
    system = rglru_recurrence(closed, torch.zeros(1, 1, 1), parameter)
    assert float(system.B.detach()) == 0.0
    system.B.sum().backward()
    assert bool(torch.isfinite(closed.grad).all())


def test_block_matches_transformers():
    pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=6, lru_width=8, num_attention_heads=2, conv1d_width=3, vocab_size=11
    )
    theirs = RecurrentGemmaRecurrentBlock(config, 0).double().eval()
    layer = Rglru(6, 2, n_hidden=8, conv_kernel=3).double()
    theirs.load_state_dict(shaken(layer).state_dict())
    scan = theirs.rg_lru._rnn_scan
    # their accumulator is float32 unless told otherwise
    theirs.rg_lru._rnn_scan = lambda **kw: scan(**kw, acc_dtype=torch.float64)
    x = fresh_input(6)
    position = torch.arange(11).expand(2, 11)
    expected, _ = theirs(x, position, None, use_cache=False)
    assert_near("output", layer(x), expected, FACES_ATOL)


def test_resets_given_to_the_layer():
    torch.manual_seed(0)
    layer, x = shaken(Rglru(6, 2)), fresh_input(6)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[:, [0, 5]] = True
    system, values = layer.recurrence(x, reset)
    y = dsf.scan(system, values)
    alone = dsf.scan(layer.rg_lru(values[:, 5:, :, 0], reset[:, 5:]), values[:, 5:])
    assert_near("after the reset", y[:, 5:], alone, FACES_ATOL)


def test_options_keep_the_contract():
    torch.manual_seed(0)
    check_all(shaken(Rglru(6, 3, n_hidden=9, conv_kernel=2)), fresh_input(6))


def test_initial_decays_are_the_published_ones():
    torch.manual_seed(0)
    core = RgLruCore(512, 4)
    # a^c = exp(-softplus(parameter)) lies in [0.9, 0.999]
    a = torch.exp(-torch.nn.functional.softplus(core.recurrent_param.detach()))
    assert 0.9 <= float(a.min()) < 0.91
    assert 0.998 < float(a.max()) <= 0.9991


def test_wrong_head_count_is_named():
    with pytest.raises(DsfShapeError, match="divisor of 6"):
        Rglru(6, 4)
