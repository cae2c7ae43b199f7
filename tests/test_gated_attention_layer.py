"""The gated attention layer in all its options, its parameter counts, its nonlinearity."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfValueError
from dsf.models._gates import ACTIVATIONS, gate_scores, non_sparse_sigmoid, split_query_gate
from dsf.models.gated_attention import GatedAttention

EXACT = 1e-13
SAME = 1e-14


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def gate(*shape, seed=9):
    return torch.sigmoid(normal(*shape, seed=seed))


# -- the layer ---------------------------------------------------------------------------------

OPTIONS = {
    f"{position}_{granularity}": {"position": position, "granularity": granularity}
    for position in ("output", "value", "key", "query", "dense")
    for granularity in ("elementwise", "headwise")
} | {
    "none": {"position": None}, "additive": {"additive": True, "activation": "silu"},
    "additive_value": {"position": "value", "additive": True, "activation": "silu"},
    "shared_logits": {"shared": "logits"}, "shared_value": {"position": "value",
                                                            "shared": "scores"},
    "grouped_value": {"position": "value", "n_group": 2}, "fixed": {"input_dependent": False},
    "tanh": {"activation": torch.tanh}, "rms_norm": {"nonlinearity": "rms_norm"},
    "silu": {"position": None, "nonlinearity": "silu"},
    "encoder": {"position": "value", "causal": False}, "encoder_output": {"causal": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_with_options(name):
    torch.manual_seed(0)
    check_all(shaken(GatedAttention(8, 4, **OPTIONS[name])), fresh_input(8, length=6))


@torch.no_grad()
def test_dense_gate_and_shared_gate():
    torch.manual_seed(0)
    x = fresh_input(8)
    layer = shaken(GatedAttention(8, 2, position="dense"))
    score = layer.scores(x)[:, :, 0]
    layer.position = None
    plain = layer(x)
    layer.position = "dense"
    near(layer(x), score * plain)
    logits = normal(2, 5, 1, 3).expand(2, 5, 4, 3)
    for shared in ("logits", "scores"):
        near(gate_scores(logits, "sigmoid", shared), gate_scores(logits[:, :, :1]), SAME)


@torch.no_grad()
def test_additive_gate_is_a_feed_through():
    """The difference to the ungated heads is SiLU(x W), whatever the values are."""
    torch.manual_seed(0)
    layer = shaken(GatedAttention(8, 2, additive=True, activation="silu"))
    x = fresh_input(8)
    system, values = layer.recurrence(x)
    eye = torch.eye(8, dtype=torch.float64)
    layer.o_proj.weight.copy_(eye)
    term = torch.nn.functional.silu(layer.gate_proj(x))
    for u in (values, 3 * values + 1):
        y = dsf.scan(system, u)
        near(layer.readout(y, x) - y.flatten(-2), term, SAME)


def test_activations():
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)
    ns = non_sparse_sigmoid(x)
    assert float(ns.min()) >= 0.5
    assert float(ns.max()) <= 1
    layer = GatedAttention(8, 2, input_dependent=False).double()
    assert bool((layer.scores(fresh_input(8)) == 0.5).all())
    near(gate_scores(x[:, None, None, None], "silu")[:, 0, 0, 0], x * torch.sigmoid(x), SAME)
    assert set(ACTIVATIONS) == {"sigmoid", "silu", "identity", "non_sparse_sigmoid"}


@pytest.mark.parametrize(("options", "count"), [
    ({"position": "output"}, 201_326_592), ({"position": "value"}, 25_165_824),
    ({"position": "dense"}, 100_663_296),
    ({"position": "output", "granularity": "headwise"}, 1_572_864),
    ({"position": "value", "granularity": "headwise"}, 196_608),
])  # fmt: skip
def test_parameter_counts_of_the_paper(options, count):
    """24 layers of width 2048 with 32 query and 4 key-value heads of 128."""
    with torch.device("meta"):
        layer = GatedAttention(2048, 32, n_group=4, head_width=128, **options)
    assert 24 * sum(p.numel() for p in layer.gate_proj.parameters()) == count


@torch.no_grad()
def test_a_gate_breaks_the_low_rank_merge():
    """W_V W_O has rank d_k; with a gate from x, one head on one token is not linear in x."""
    torch.manual_seed(0)
    x, other = fresh_input(8, length=1), fresh_input(8, length=1, seed=3)
    for position, linear in [(None, True), ("output", False), ("value", False)]:
        layer = shaken(GatedAttention(8, 1, head_width=3, position=position, rope_base=None))
        product = layer.o_proj.weight @ layer.v_proj.weight
        assert int(torch.linalg.matrix_rank(product)) == 3
        gap = float((layer(x + other) - layer(x) - layer(other)).abs().max())
        assert (gap <= EXACT) == linear


@torch.no_grad()
def test_key_mask():
    torch.manual_seed(0)
    layer = shaken(GatedAttention(8, 4, position="value", causal=False))
    x, real = fresh_input(8, length=7), torch.ones(2, 7, dtype=torch.bool)
    real[0, 5:] = False
    y = layer(x, key_mask=real)
    near(layer(x.masked_fill(~real[..., None], 7.0), key_mask=real)[real], y[real])
    system, values = layer.recurrence(x, key_mask=real)
    near(layer.readout(dsf.scan(system, values), x), y)


def test_refusals():
    with pytest.raises(DsfValueError, match="position: expected one of"):
        GatedAttention(8, position="G1")
    with pytest.raises(DsfValueError, match="shared: expected one of"):
        gate_scores(normal(1, 2, 3, 4), shared="heads")
    with pytest.raises(DsfValueError, match="activation: expected one of"):
        GatedAttention(8, activation="step")
    with pytest.raises(DsfShapeError, match="2 groups of 8 query rows"):
        split_query_gate(normal(13, 4), 2, 2, 4)
