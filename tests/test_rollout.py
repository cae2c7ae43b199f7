"""A frozen stack of layers against frozen models written by hand, differentiated by autograd."""

from __future__ import annotations

import functools

import attention_models
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


def test_progress_is_told_before_each_row_and_at_the_end():
    found = dsf.rollout(case("mamba")[0])
    n_out = found.output.shape[-1]
    one = drawn((n_out,), 3)
    for call, steps in (
        (lambda tell: found.norm(slice(2, 5), progress=tell), range(2, 5)),
        (lambda tell: found.trace(slice(2, 5), progress=tell), range(2, 5)),
        (lambda tell: found.map(one, one, slice(2, 5), progress=tell), range(2, 5)),
        (lambda tell: found.contributions(progress=tell), range(LENGTH)),
    ):
        said: list[tuple[int, int, str]] = []
        call(lambda *word, said=said: said.append(word))
        axis = "key" if len(steps) == LENGTH else "query"
        assert said == [*((i, len(steps), f"{axis} {t}") for i, t in enumerate(steps)),
                        (len(steps), len(steps), "done")]  # fmt: skip


def test_what_is_not_finite_is_refused():
    """A derivative would spread it over all tokens, those before it too."""
    found = dsf.rollout(case("mamba")[0])
    for function, like in (("apply", found.input), ("transposed", found.output)):
        for bad in (float("nan"), float("inf")):
            x = torch.zeros_like(like)
            x[:, -1, 0] = bad
            with pytest.raises(DsfValueError, match=rf"Rollout.{function}: .: .*got 2 NaN or inf"):
                getattr(found, function)(x)
    direction = torch.full((found.output.shape[-1],), float("nan"), dtype=torch.float64)
    with pytest.raises(DsfValueError, match=r"Rollout: direction: expected finite numbers"):
        found.row(0, direction)


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


# -- encoder-decoders, shared layers, short convolutions ----------------------------------------


@functools.cache
def encoder_decoder(name: str):
    """(model, traces) with 9 tokens to decode of an other sequence of 13, some of it padding."""
    model = attention_models.model(name, torch.float64)
    return model, dsf.trace(model, attention_models.inputs(name, "right", queries=LENGTH))


def encoder_decoder_rollout(name: str, source: str, mlp: str = "omitted") -> dsf.Rollout:
    stack = "decoder.block" if name == "t5" else "decoder.layers"
    return dsf.rollout(encoder_decoder(name)[1], stack=stack, source=source, mlp=mlp)


@pytest.mark.parametrize("mlp", ["omitted", "jacobian"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoders_are_the_frozen_model_in_both_their_sequences(name, mlp):
    model, _ = encoder_decoder(name)
    inputs = attention_models.inputs(name, "right", queries=LENGTH)
    own, other = (encoder_decoder_rollout(name, source, mlp) for source in ("own", "other"))
    assert own.input.shape[1] == LENGTH
    assert other.input.shape[1] == tiny_models.LENGTH
    assert torch.equal(own.output, other.output)
    assert max(own.error, other.error) <= REACHED
    written = getattr(frozen_models, f"{name}_decoder")
    seen = (inputs["decoder_attention_mask"].bool(), inputs["attention_mask"].bool())

    def frozen(x: Tensor, read: Tensor) -> Tensor:
        return written(model, x, read, mlp, *seen)

    at = own.input, other.input
    output = frozen(*at).detach()
    assert float((output - own.output).abs().max()) <= REACHED * float(output.abs().max())
    seed = drawn(own.output.shape, 2)
    _, pull = vjp(frozen, *at)
    for found, exact, direction in zip((own, other), pull(seed), (3, 4), strict=True):
        exact, x = exact.detach(), drawn(found.input.shape, direction)
        assert float(exact.abs().max()) > REACHED
        error = float((found.transposed(seed) - exact).abs().max())
        assert error <= REACHED * float(exact.abs().max())
        zero = [torch.zeros_like(y) for y in at]
        zero[0 if found is own else 1] = x
        forward = jvp(frozen, at, tuple(zero))[1].detach()
        error = float((found.apply(x) - forward).abs().max())
        assert error <= REACHED * float(forward.abs().max())
        row = torch.zeros_like(seed)
        row[:, TOKEN] = seed[0, 0]
        exact = pull(row)[0 if found is own else 1].detach()
        got = torch.tensor(found.row(TOKEN, seed[0, 0]).values)
        assert float((got - exact).abs().max()) <= REACHED * float(exact.abs().max())


def test_maps_between_two_sequences_have_the_texts_of_both():
    own, other = (encoder_decoder_rollout("bart", source) for source in ("own", "other"))
    read, written = [f"q{i}" for i in range(LENGTH)], [f"k{i}" for i in range(13)]
    norm = other.norm(probes=2, tokens=(read, written))
    assert norm.sizes == {"batch": 2, "query": LENGTH, "key": 13}
    assert list(norm["query_token"].values) == read
    assert list(norm["key_token"].values) == written
    assert norm.attrs["direction"] == "cross"
    assert float(norm.values[1, :, -tiny_models.PADDED :].max()) == 0  # padding is not read
    assert own.norm(probes=2).attrs["direction"] == "causal"
    assert float(np.triu(own.norm(probes=2).values[0], 1).max()) == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_is_a_stack_of_its_own_and_feeds_the_other(name):
    """What the encoder's tokens do to the decoder: the product of two maps, where norms follow."""
    _, traces = encoder_decoder(name)
    stack = "encoder.block" if name == "t5" else "encoder.layers"
    encoder = dsf.rollout(traces, stack=stack)
    assert encoder.error <= REACHED
    if name == "bart":  # T5 has a norm between both
        other = encoder_decoder_rollout(name, "other")
        assert float((encoder.output - other.input).abs().max()) <= REACHED
        assert other.apply(encoder.apply(encoder.input)).shape == other.output.shape


@pytest.mark.parametrize("length", [LENGTH, 13])
def test_torchs_transformer_has_two_stacks_too(length):
    """With as many keys as queries its cross-attention looks like any other layer."""
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 3, 1, 2, 32, dropout=0.0, batch_first=True).double().eval()
    mask = model.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    traces = dsf.trace(model, {
        "src": drawn((2, length, WIDTH)), "tgt": drawn((2, LENGTH, WIDTH), 1), "tgt_mask": mask,
        "tgt_is_causal": True,
    })  # fmt: skip
    own, other = (
        dsf.rollout(traces, stack="decoder.layers", source=source) for source in ("own", "other")
    )
    assert max(own.error, other.error) <= REACHED
    assert own.attrs["direction"] == "causal"
    assert other.input.shape == (2, length, WIDTH)
    parts = own.apply(own.input) + other.apply(other.input)
    assert float((own.output - parts).abs().max()) > SINGLE  # biases and MLPs
    read = dsf.rollout(traces, stack="encoder.layers").output
    norm = model.encoder.norm
    assert norm is not None
    assert float((norm(read) - other.input).abs().max()) <= REACHED


@pytest.mark.parametrize("mlp", ["omitted", "jacobian"])
@pytest.mark.parametrize("name", ["albert", "lfm3", "lfm2"])
def test_shared_layers_and_short_convolutions_are_the_frozen_model(name, mlp):
    model, inputs = tiny_models.model(name, torch.float64), tiny_models.inputs("right", LENGTH)
    found = dsf.rollout(dsf.trace(model, inputs), mlp=mlp)
    assert found.error <= REACHED
    written, mask = getattr(frozen_models, name.rstrip("23")), inputs["attention_mask"]

    def frozen(x: Tensor) -> Tensor:
        return written(model, x, mlp, mask)

    output, forward = jvp(frozen, (found.input,), (drawn(found.input.shape, 1),))
    output, forward = output.detach(), forward.detach()
    assert float((output - found.output).abs().max()) <= REACHED * float(output.abs().max())
    error = float((found.apply(drawn(found.input.shape, 1)) - forward).abs().max())
    assert error <= REACHED * float(forward.abs().max())
    seed = drawn(found.output.shape, 2)
    backward = vjp(frozen, found.input)[1](seed)[0].detach()
    error = float((found.transposed(seed) - backward).abs().max())
    assert error <= REACHED * float(backward.abs().max())


def test_residuals_inside_mixers_and_experts_are_explained():
    for name in ("bloom", "lfm2_moe"):
        model = attention_models.model(name, torch.float64)
        assert dsf.rollout(dsf.trace(model, tiny_models.inputs())).error <= REACHED, name


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
    with pytest.raises(DsfValueError, match="mlp: expected 'omitted' or 'jacobian'"):
        dsf.rollout([first, second], mlp="none")


def test_stacks_that_are_not_named_and_parts_of_a_module_are_refused():
    traces = encoder_decoder("t5")[1]
    with pytest.raises(DsfValueError, match=r"stack: .*'encoder.block', 'decoder.block', .* None"):
        dsf.rollout(traces)
    with pytest.raises(DsfValueError, match=r"stack: .*, got 'decoder'"):
        dsf.rollout(traces, stack="decoder")
    with pytest.raises(DsfValueError, match=r"end: expected 'layers' for encoder.block, got 'mod"):
        dsf.rollout(traces, stack="encoder.block", end="model")
    with pytest.raises(DsfValueError, match=r"source: expected 'own' for layers without cross-at"):
        dsf.rollout(traces, stack="encoder.block", source="other")
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
    with pytest.raises(DsfShapeError, match=r"tokens: expected a pair"):
        encoder_decoder_rollout("bart", "other").norm(probes=1, tokens=["a"])
    with pytest.raises(DsfTypeError, match=r"Rollout: queries: expected a slice or a range"):
        found.norm(queries=[0, 1])
