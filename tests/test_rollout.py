"""A frozen stack of layers against frozen models written by hand, differentiated by autograd."""

from __future__ import annotations

import functools

import frozen_models
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

import dsf
from dsf import memory
from dsf.errors import (
    DsfFidelityError,
    DsfShapeError,
    DsfTypeError,
    DsfUnsupportedError,
    DsfValueError,
)

EXACT = 1e-8
"""The bound asked for; what is reached is the next."""
REACHED = 1e-12
SINGLE = 1e-5
LENGTH, WIDTH = 9, 24
TOKEN = 6


def torch_encoder(norm_first: bool, activation: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 3, 32, norm_first=norm_first, activation=activation, batch_first=True)  # fmt: skip
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


def drawn(shape: torch.Size | tuple, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@functools.cache
def case(name: str):
    """(traces, frozen function of x and mlp) of one small float64 model."""
    if name.startswith("encoder"):
        model = torch_encoder("pre" in name, "gelu" if "gelu" in name else "relu")
        found = dsf.trace(model, drawn((2, LENGTH, WIDTH), 5))
        return found, lambda x, mlp: frozen_models.torch_encoder(model, x, mlp)
    model = tiny_models.model(name, torch.float64)
    inputs = tiny_models.inputs("right" if name == "bert" else "none", LENGTH)
    traces = dsf.trace(model, inputs)
    if name == "bert":
        mask = inputs["attention_mask"]
        return traces, lambda x, mlp: frozen_models.bert(model, x, mlp, mask)
    written = getattr(frozen_models, "mamba" if name == "mamba2" else name)
    return traces, lambda x, mlp: written(model, x, mlp)


NAMES = ["llama", "bert", "mamba", "mamba2", "recurrent_gemma", "encoder_pre_gelu",
         "encoder_post_relu"]  # fmt: skip
ORACLES = [(name, mlp) for name in NAMES for mlp in ("omitted", "jacobian")
           if mlp == "omitted" or "mamba" not in name]  # fmt: skip


@pytest.mark.parametrize(("name", "mlp"), ORACLES)
def test_rows_and_products_are_those_of_the_frozen_model(name, mlp):
    traces, frozen = case(name)
    found = dsf.rollout(traces, mlp=mlp)
    direction, seed = drawn(found.input.shape, 1), drawn(found.output.shape, 2)
    output, forward = jvp(lambda x: frozen(x, mlp), (found.input,), (direction,))
    _, pull = vjp(lambda x: frozen(x, mlp), found.input)
    assert REACHED < EXACT
    output, forward = output.detach(), forward.detach()
    assert float((output - found.output).abs().max()) <= REACHED * float(output.abs().max())
    assert float((found.apply(direction) - forward).abs().max()) <= REACHED * float(
        forward.abs().max())  # fmt: skip
    backward = pull(seed)[0].detach()
    assert float((found.transposed(seed) - backward).abs().max()) <= REACHED * float(
        backward.abs().max())  # fmt: skip
    assert found.error <= REACHED

    at = torch.zeros_like(seed)
    at[:, TOKEN] = seed[0, 0]
    row = found.row(TOKEN, seed[0, 0])
    assert row.dims == ("batch", "key", "input")
    exact = pull(at)[0].detach()
    assert float((torch.tensor(row.values) - exact).abs().max()) <= REACHED * float(
        exact.abs().max())  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "mamba2"])
def test_maps_norms_and_traces_are_those_of_the_blocks(name):
    found = dsf.rollout(case(name)[0])
    rows = torch.stack([torch.tensor(found.row(t).values) for t in range(LENGTH)], 1)
    n_out = rows.shape[2]
    o, i = drawn((n_out,), 3), drawn((n_out,), 4)
    expected = {
        "norm": torch.linalg.vector_norm(rows, dim=(2, 4)),
        "trace": torch.einsum("btoko->btk", rows),
        "map": torch.einsum("btoki,o,i->btk", rows, o, i),
        "contributions": torch.linalg.vector_norm(
            torch.einsum("btoki,bki->btko", rows, found.input), dim=-1),
    }  # fmt: skip
    given = {"norm": found.norm(), "trace": found.trace(), "map": found.map(o, i),
             "contributions": found.contributions()}  # fmt: skip
    for kind, exact in expected.items():
        assert given[kind].dims == ("batch", "query", "key"), kind
        error = float((torch.tensor(given[kind].values) - exact).abs().max())
        assert error <= REACHED * float(exact.abs().max()), kind
    x = drawn(found.input.shape, 6)
    whole = torch.einsum("btoki,bki->bto", rows, x)
    assert float((whole - found.apply(x)).abs().max()) <= REACHED * float(whole.abs().max())
    some = found.norm(slice(2, 5))
    assert list(some["query"].values) == [2, 3, 4]
    assert np.allclose(some.values, given["norm"].values[:, 2:5], rtol=REACHED)


def test_the_future_has_no_part_in_a_causal_stack():
    found = dsf.rollout(case("llama")[0], mlp="jacobian")
    norm = found.norm()
    assert norm.attrs["direction"] == "causal"
    assert float(np.triu(norm.values[0], 1).max()) == 0
    assert dsf.rollout(case("bert")[0]).norm().attrs["direction"] == "bidirectional"


def test_random_probes_estimate_norms_without_bias():
    found = dsf.rollout(case("bert")[0])
    exact, sketched = found.norm().values ** 2, found.norm(probes=400).values ** 2
    some = exact > 0  # padded keys have none
    assert abs(float((sketched[some] / exact[some]).mean()) - 1) < 0.1
    assert not np.allclose(sketched, exact, rtol=1e-3)


def test_tokens_become_coordinates():
    found = dsf.rollout(case("mamba")[0])
    tokens = [f"t{i}" for i in range(LENGTH)]
    norm, row = found.norm(probes=2, tokens=tokens), found.row(-1, drawn((16,)), tokens=tokens)
    assert list(norm["query_token"].values) == list(norm["key_token"].values) == tokens
    assert list(row["key_token"].values) == tokens
    assert row.attrs["token"] == LENGTH - 1
    with pytest.raises(DsfShapeError, match="expected 9 texts, got 1"):
        found.norm(tokens=["a"])


def test_the_map_may_end_at_the_models_output():
    """A head on top: a direction is then a word, and the final norm is frozen like any other."""
    bare = tiny_models.model("llama", torch.float64)
    torch.manual_seed(1)
    import transformers

    model = transformers.LlamaForCausalLM(bare.config).double().eval()
    inputs = tiny_models.inputs(length=LENGTH)
    traces = dsf.trace(model, inputs)
    stack, whole = (dsf.rollout(traces, end=end) for end in ("layers", "model"))
    assert whole.output.shape == (2, LENGTH, tiny_models.VOCABULARY)
    x = drawn(stack.input.shape)
    norm = model.model.norm
    h = frozen_models.rms(stack.output, norm.weight, norm.variance_epsilon) / stack.output
    expected = model.lm_head(stack.apply(x) * h).detach()
    assert float((whole.apply(x) - expected).abs().max()) <= REACHED * float(expected.abs().max())


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "t5_encoder", "gemma2", "jamba", "nemotron_h"])
def test_other_models_are_explained_up_to_rounding(name):
    """Sandwich norms, relative biases, hybrids: placed where the models' own code has them."""
    attention = "eager" if name in tiny_models.EAGER_ONLY else None
    model = tiny_models.model(name, torch.float64, attention)
    found = dsf.rollout(dsf.trace(model, tiny_models.inputs()))
    assert found.error <= REACHED
    x, z = drawn(found.input.shape, 1), drawn(found.output.shape, 2)
    gap = float((found.apply(x) * z).sum() - (found.transposed(z) * x).sum())
    assert abs(gap) <= REACHED * float(found.apply(x).norm() * z.norm())


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "rwkv", "xlstm", "minimax",
                                  "qwen4_exp", "zamba2"])  # fmt: skip
def test_linear_mixers_gated_residuals_and_token_shifts_are_explained_too(name):
    model = tiny_models.model(name, torch.float64)
    assert dsf.rollout(dsf.trace(model, tiny_models.inputs()), mlp="jacobian").error <= REACHED


class Skipping(nn.Module):
    """A layer that is given the embeddings as well, as Zamba's are."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0] + self.linear(embeddings)


class SkippingStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Skipping(), Skipping()])

    def forward(self, x: Tensor) -> Tensor:
        embeddings = x.clone()
        for layer in self.layers:
            x = layer(x, embeddings)
        return x


def test_embeddings_handed_to_later_layers_are_the_input_too():
    torch.manual_seed(0)
    traces = dsf.trace(SkippingStack().double(), drawn((1, 5, 8)))
    assert dsf.rollout(traces).error <= REACHED


def test_float32_is_explained_within_its_rounding():
    found = dsf.rollout(dsf.trace(tiny_models.model("bert"), tiny_models.inputs("right")))
    assert found.error <= SINGLE
    assert found.norm(slice(0, 1)).dtype == np.float32


def test_nothing_of_the_model_is_changed():
    model = tiny_models.model("bert")
    traces = dsf.trace(model, tiny_models.inputs())
    model.train()
    model.encoder.layer[0].output.dense.bias.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    dsf.rollout(traces, mlp="jacobian")
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


# -- what is refused ---------------------------------------------------------------------------


class Squared(nn.Module):
    """A layer with a nonlinearity that is neither norm, mixer nor MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attention(x, x, x)[0]
        return y + y.square()


def test_a_nonlinearity_that_is_not_frozen_is_found():
    torch.manual_seed(0)
    model = nn.Sequential(Squared(), Squared()).double()
    traces = dsf.trace(model, drawn((1, 5, 8)))
    with pytest.raises(DsfFidelityError, match=r"expected the stack to be linear .* got a relat"):
        dsf.rollout(traces)
    assert dsf.rollout(traces, tolerance=10.0).error > SINGLE


def test_weights_changed_since_the_trace_are_found():
    model = tiny_models.model("llama", torch.float64)
    traces = dsf.trace(model, tiny_models.inputs())
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.mul_(1.01)
    with pytest.raises(DsfFidelityError, match=r"layers.1.self_attn: .*changed since the trace"):
        dsf.rollout(traces)
    for module in model.modules():
        assert "forward" not in module.__dict__


def test_incomplete_or_mixed_traces_are_refused(unchecked):
    model = tiny_models.model("llama")
    traces = dsf.trace(model, tiny_models.inputs())
    first, second = traces.values()
    with pytest.raises(DsfValueError, match=r"every mixer of layers, .*'layers.1.self_attn'"):
        dsf.rollout([first])
    other = dsf.trace(model, tiny_models.inputs())["layers.1.self_attn"]
    with pytest.raises(DsfValueError, match="those of one pass"):
        dsf.rollout([first, other])
    with pytest.raises(DsfValueError, match=r"traces: expected what dsf\.trace returns"):
        dsf.rollout({})
    with pytest.raises(DsfValueError, match=r"got something else"):
        dsf.rollout([1])
    with pytest.raises(DsfValueError, match="mlp 'omitted' or 'jacobian'"):
        dsf.rollout([first, second], mlp="none")


def test_two_stacks_and_parts_of_a_module_are_refused():
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    model = T5Model(T5Config(
        vocab_size=tiny_models.VOCABULARY, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3,
        pad_token_id=0, decoder_start_token_id=0,
    )).eval()  # fmt: skip
    inputs = tiny_models.inputs()
    traces = dsf.trace(model, {**inputs, "decoder_input_ids": inputs["input_ids"]})
    with pytest.raises(DsfUnsupportedError, match="layers of one stack"):
        dsf.rollout(traces)
    lstm = dsf.trace(nn.LSTM(3, 4, num_layers=2), torch.randn(5, 1, 3))
    with pytest.raises(DsfUnsupportedError, match=r"parts of one module: 'l0'"):
        dsf.rollout(lstm)


def test_maps_that_would_not_fit_are_refused_with_their_size(monkeypatch):
    traces = dsf.trace(tiny_models.model("llama"), tiny_models.inputs())
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"softmax maps .*layer=2, batch=2, head=4, .* needs"):
        dsf.rollout(traces)


def test_axes_that_do_not_fit_are_refused(unchecked):
    found = dsf.rollout(case("mamba")[0])
    with pytest.raises(DsfShapeError, match=r"apply: x: expected axes"):
        found.apply(torch.zeros(1, 1, 16))
    with pytest.raises(DsfShapeError, match=r"direction: expected \(16,\)"):
        found.row(0, torch.zeros(3))
    with pytest.raises(
        DsfValueError, match=r"row: token: expected a position within 0\.\.\d+, got 99"
    ):
        found.row(99)
    with pytest.raises(DsfValueError, match=r"Rollout.norm: probes: expected at least 1 or None"):
        found.norm(probes=0)
    with pytest.raises(DsfTypeError, match=r"Rollout: queries: expected a slice or a range"):
        found.norm(queries=[0, 1])
