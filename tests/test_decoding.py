"""Decoding with a cache, call by call, against the pass over the whole sequence."""

from __future__ import annotations

from typing import Any

import attention_models
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

import dsf
from dsf.adapters.transformers_own_attention import OwnAttentionWithCache
from dsf.decoding import trace_decoding
from dsf.errors import DsfFidelityError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.tracing import LayerTrace, relative_error, trace

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Of a model with its own other way of computing the same, through all its layers."""
WRONG = 1e-3
N_TOKEN = 4
ROOM = 20
"""Slots of a static cache, more than there are tokens."""

CASES = [
    *[("llama", attention, cache) for attention in ("eager", "sdpa")
      for cache in ("dynamic", "static")],
    ("mistral", "sdpa", "dynamic"), ("mistral", "sdpa", "static"), ("t5", "eager", "dynamic"),
    ("bart", "sdpa", "dynamic"), ("mamba", None, "dynamic"), ("mamba2", None, "dynamic"),
    ("recurrent_gemma", None, "dynamic"), ("qwen3_next", None, "dynamic"),
    ("gptj", None, "static"), ("falcon", "sdpa", "dynamic"), ("bloom", None, "dynamic"),
    ("rwkv_with_cache", None, "dynamic"),
]  # fmt: skip
MORE = [
    *[(name, attention, cache)
      for name in ("gpt2", "gpt_neox", "qwen3", "gemma3", "diffllama", "phi3", "opt")
      for attention in ("eager", "sdpa") for cache in ("dynamic", "static")],
    *[(name, None, "dynamic") for name in (
        "falcon_mamba", "jamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "granite",
        "qwen3_5", "olmo_hybrid", "kimi_linear")],
    *[(name, None, cache) for name in ("codegen", "mpt", "megatron_bert_decoder",
                                       "rembert_decoder", "roformer_decoder")
      for cache in ("dynamic", "static")],
    ("gptj", None, "dynamic"), ("falcon", "eager", "dynamic"), ("falcon", "sdpa", "static"),
    ("gpt_neo", None, "dynamic"),
    ("t5", "sdpa", "dynamic"), ("bart", "eager", "dynamic"), ("marian", "eager", "dynamic"),
]  # fmt: skip


def _cache(kind: str, model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=ROOM) if kind == "static" else None


def _joined(steps: list[dict[str, LayerTrace]], name: str) -> Tensor:
    return torch.cat([step[name].output for step in steps], 1)


@pytest.mark.parametrize(("dtype", "padding"), [
    (torch.float64, "left"),
    pytest.param(torch.float32, "none", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize(("name", "attention", "cache"), [
    *CASES, *[pytest.param(*case, marks=pytest.mark.slow) for case in MORE]])  # fmt: skip
def test_every_call_is_reproduced_and_all_together_are_the_full_pass(
    name, attention, cache, dtype, padding
):
    model = attention_models.model(name, dtype, attention)
    inputs = attention_models.inputs(name, padding)
    if name == "rwkv_with_cache":  # see test_a_batch_that_rwkv_mixes_is_refused
        inputs = {n: x[-1:] for n, x in inputs.items()}
    steps = trace_decoding(model, inputs, N_TOKEN, cache=_cache(cache, model))
    full = trace(model, inputs)
    assert len(steps) == 1 + N_TOKEN
    assert steps[0].keys() == full.keys()
    real = inputs["decoder_attention_mask" if name in attention_models.ENCODER_DECODERS
                  else "attention_mask"].bool()  # fmt: skip
    for step in steps:
        for layer in step.values():
            assert layer.error <= TOLERANCE[dtype], (layer.name, layer.error)
            assert layer.attrs["scan_error"] <= TOLERANCE[dtype]
    for layer in steps[-1]:
        together = _joined(steps, layer)[real]
        assert relative_error(together, full[layer].output[real]) <= AGREEMENT[dtype], layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "mamba2", "recurrent_gemma",
                                  "qwen3_next", "gptj"])  # fmt: skip
def test_the_last_state_of_a_call_is_the_first_of_the_next(name):
    model = attention_models.model(name, torch.float64)
    steps = trace_decoding(model, tiny_models.inputs(), N_TOKEN)
    for layer in steps[0]:
        before = None
        for step in steps:
            r = step[layer].recurrence
            assert isinstance(r, dsf.Recurrence)
            if before is not None:
                start = r.initial_state
                assert start is not None
                kept = min(start.shape[2], before.shape[2])  # a cache grows, a window forgets
                window = kept < before.shape[2] or start.shape[2] == before.shape[2]
                if r.system == "softmax_attention" and window:
                    shift = before.shape[2] - start.shape[2] + 1
                    before, start = before[:, :, shift:], start[:, :, : start.shape[2] - 1]
                elif r.system == "softmax_attention":
                    start = start[:, :, :kept]
                assert relative_error(start, before) <= TOLERANCE[torch.float64], layer
            _, before = dsf.scan(r, step[layer].values, return_state=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_backend_runs_a_call_with_a_cache(cache):
    """Eager left padding reads ahead in the first call, of empty slots too where there are any."""
    model = attention_models.model("llama", torch.float64, "eager")
    steps = trace_decoding(model, tiny_models.inputs("left"), 2, cache=_cache(cache, model))
    kinds = [type(layer.recurrence) for step in steps for layer in step.values()]
    assert kinds == 2 * [dsf.Bidirectional] + 4 * [dsf.Recurrence]
    for step in steps:
        for layer in step.values():
            expected = dsf.scan(layer.recurrence, layer.values, "reference")
            for backend in ("auto", "chunked"):
                y = dsf.scan(layer.recurrence, layer.values, backend)
                assert relative_error(y, expected) <= TOLERANCE[torch.float64]
            length = layer.values.shape[1]
            weights = dsf.materialise(layer.recurrence)
            assert weights.shape[-2:] == (length, length)
            fresh = torch.einsum("bhqk,bkhc->bqhc", weights, layer.values)
            if length > 1:  # nothing was cached
                assert relative_error(fresh, expected) <= TOLERANCE[torch.float64]
            else:
                assert relative_error(fresh, expected) > WRONG


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_of_the_map_come_one_by_one(cache):
    model = attention_models.model("llama", torch.float64, "sdpa")
    inputs = tiny_models.inputs("left")
    steps = trace_decoding(model, inputs, N_TOKEN, cache=_cache(cache, model))
    full = trace(model, inputs)
    length = inputs["input_ids"].shape[1]
    for name, layer in full.items():
        whole = dsf.materialise(layer.recurrence)
        for t, step in enumerate(steps[1:], length - N_TOKEN):
            rows = step[name].recurrence.C  # type: ignore[union-attr]
            row = rows.tile(slice(0, 1), slice(0, rows.n_key))
            assert relative_error(row[..., : t + 1], whole[..., t : t + 1, : t + 1]) <= 1e-14
            assert not bool(row[..., t + 1 :].any())


def test_a_generation_is_traced_from_its_tokens():
    torch.manual_seed(0)
    model = LlamaForCausalLM(attention_models.model("llama").config).double().eval()
    prompt = tiny_models.inputs()["input_ids"][:, :6]
    generated = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    steps = trace_decoding(model, {"input_ids": generated}, 5)
    assert list(steps[0]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [s["model.layers.0.self_attn"].values.shape[1] for s in steps] == [6, 1, 1, 1, 1, 1]


def test_layers_whose_calls_with_a_cache_are_not_known_are_refused_and_others_may_be_named(
    monkeypatch,
):
    model, inputs = attention_models.model("jamba"), tiny_models.inputs()
    attention = "layers.1.self_attn"
    steps = trace_decoding(model, inputs, N_TOKEN, [attention])
    assert [list(step) for step in steps] == [[attention]] * (1 + N_TOKEN)
    monkeypatch.setattr(OwnAttentionWithCache, "decodes", False)
    with pytest.raises(DsfUnsupportedError, match=r"h.0.attn: .*GPTJAtt.* reads whole sequences"):
        trace_decoding(attention_models.model("gptj"), inputs, N_TOKEN)


@pytest.mark.parametrize("name", ["openai", "mpnet", "deberta", "deberta_v2"])
def test_a_model_that_takes_no_cache_is_refused_and_says_so(name):
    with pytest.raises(DsfUnsupportedError, match=r"got \w+Model, which takes no cache\. Use dsf"):
        trace_decoding(attention_models.model(name), tiny_models.inputs(), N_TOKEN)


def test_a_layer_that_takes_no_cache_is_refused_and_says_so():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention_models.model("mpnet")
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            return self.inner(input_ids)

    with pytest.raises(DsfUnsupportedError, match=r"MPNetSelfAttention, which takes no cache\. N"):
        trace_decoding(Around(), tiny_models.inputs(), N_TOKEN)


def test_xglm_decodes_in_float32():
    """Its own code cannot run in float64."""
    model, inputs = attention_models.model("xglm"), tiny_models.inputs("left")
    for cache in ("dynamic", "static"):
        steps = trace_decoding(model, inputs, N_TOKEN, cache=_cache(cache, model))
        full, real = trace(model, inputs), inputs["attention_mask"].bool()
        for name in full:
            together = _joined(steps, name)[real]
            error = relative_error(together, full[name].output[real])
            assert error <= AGREEMENT[torch.float32]


def test_a_batch_that_rwkv_mixes_is_refused():
    """transformers 5.23.0 gives each of one token of two sequences an output for both."""
    model, inputs = attention_models.model("rwkv_with_cache"), tiny_models.inputs()
    with pytest.raises(DsfUnsupportedError, match=r"blocks.0.attention: .* Give one sequence at"):
        trace_decoding(model, inputs, N_TOKEN)


def test_rwkv_starts_from_the_sums_of_its_cache_whatever_their_unit():
    """Keys so large that sums overflow unless they are kept by their largest weight."""
    model = attention_models.model("rwkv_with_cache", torch.float64)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.attention.key.weight.mul_(2000)
    ids = tiny_models.inputs()["input_ids"][:1]
    steps, full = (
        trace_decoding(model, {"input_ids": ids}, N_TOKEN),
        trace(model, {"input_ids": ids}),
    )
    for name in full:
        assert relative_error(_joined(steps, name), full[name].output) <= AGREEMENT[torch.float64]
        start = steps[-1][name].recurrence.initial_state  # type: ignore[union-attr]
        assert start is not None
        assert bool(torch.isfinite(start).all())
        y = dsf.scan(steps[-1][name].recurrence, steps[-1][name].values)
        again = steps[-1][name].readout(y)
        assert torch.equal(again, steps[-1][name].readout(y)), "a readout writes on the state"


@pytest.mark.parametrize("name", ["llama", "mamba", "recurrent_gemma", "bart", "bloom"])
def test_the_model_is_left_as_it_was_also_after_an_exception(name):
    model = attention_models.model(name)
    inputs = attention_models.inputs(name)
    if name == "recurrent_gemma":
        model(**inputs, use_cache=True)  # fills the states its modules hold
    model.train()
    before = _snapshot(model)
    trace_decoding(model, inputs, N_TOKEN)
    assert _same(_snapshot(model), before)
    calls: list[int] = []

    def fail_in_the_third_call(*_) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("inside the pass")

    hook = model.register_forward_hook(fail_in_the_third_call)
    with pytest.raises(RuntimeError, match="inside the pass"):
        trace_decoding(model, inputs, N_TOKEN)
    hook.remove()
    assert _same(_snapshot(model), before)


def _snapshot(model: nn.Module) -> list:
    return [
        (m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks),
         getattr(getattr(m, "config", None), "_attn_implementation", None),
         m.__dict__.get("recurrent_states"), m.__dict__.get("conv1d_state"))
        for m in model.modules()
    ]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def test_readouts_do_not_write_on_the_cache():
    model = attention_models.model("gpt_neox")
    cache = DynamicCache(config=model.config)
    steps = trace_decoding(model, tiny_models.inputs(), N_TOKEN, cache=cache)
    assert cache.get_seq_length() == tiny_models.LENGTH
    for layer in steps[-1].values():
        layer.readout(dsf.scan(layer.recurrence, layer.values))
    assert cache.get_seq_length() == tiny_models.LENGTH


def test_a_changed_weight_fails_the_gate_of_a_later_call():
    model = attention_models.model("mamba2")
    weight = model.get_parameter("layers.0.mixer.out_proj.weight")
    calls: list[int] = []

    def spoil(*_) -> None:
        calls.append(1)
        if len(calls) == 1 + N_TOKEN:
            with torch.no_grad():
                weight.mul_(1.01)

    model.register_forward_hook(spoil)
    with pytest.raises(DsfFidelityError, match=r"layers.0.mixer"):
        trace_decoding(model, tiny_models.inputs(), N_TOKEN)


def test_wrong_arguments_are_refused_before_any_work():
    model, inputs = attention_models.model("llama"), tiny_models.inputs()
    for n_token in (0, tiny_models.LENGTH):
        with pytest.raises(DsfValueError, match=r"n_token: expected 1 to 12, got"):
            trace_decoding(model, inputs, n_token)
    with pytest.raises(DsfTypeError, match=r"input_ids \(batch, time\), got NoneType"):
        trace_decoding(model, {}, 1)
    with pytest.raises(DsfUnsupportedError, match="use_cache: expected none in inputs"):
        trace_decoding(model, {**inputs, "use_cache": True}, 1)
    with pytest.raises(DsfValueError, match="precision: expected 'auto' or 'native'"):
        trace_decoding(model, inputs, 1, precision="half")
    with pytest.raises(DsfUnsupportedError, match="model: expected a transformers model"):
        trace_decoding(nn.LSTM(3, 3), inputs, 1)
