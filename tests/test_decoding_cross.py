"""Decoders that read another sequence, given as hidden states, step by step with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import _ENCODER, _IDS, VOCABULARY, _build
from transformers import DynamicCache, EncoderDecoderCache

import dsf
from dsf.adapters.transformers_attention import RegistryAttention
from dsf.decoding import trace_decoding
from dsf.errors import DsfFidelityError
from dsf.tracing import relative_error, trace
from dsf.wrappers import core

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-13}
WRONG = 1e-3
N_TOKEN, OTHER = 4, 6
"""Tokens one by one; tokens of the other sequence."""
_READS = {"is_decoder": True, "add_cross_attention": True}
_BART = {"vocab_size": VOCABULARY, "d_model": 24, "decoder_layers": 2, "encoder_layers": 2,
         "decoder_attention_heads": 3, "encoder_attention_heads": 3, "decoder_ffn_dim": 32,
         "encoder_ffn_dim": 32, **_IDS}  # fmt: skip
MODELS = {
    "bert": _build("BertModel", "BertConfig", **_ENCODER, **_READS),
    "roberta": _build("RobertaModel", "RobertaConfig", **_ENCODER, **_READS),
    "electra": _build("ElectraModel", "ElectraConfig", **_ENCODER, **_READS, embedding_size=24),
    "bert_generation": _build("BertGenerationDecoder", "BertGenerationConfig", **_ENCODER,
                              **_READS),
    "camembert": _build("CamembertModel", "CamembertConfig", **_ENCODER, **_READS),
    "ernie": _build("ErnieModel", "ErnieConfig", **_ENCODER, **_READS),
    "gpt2": _build("GPT2Model", "GPT2Config", vocab_size=VOCABULARY, n_embd=24, n_layer=2,
                   n_head=3, **_IDS, add_cross_attention=True),
    "bart": _build("BartForCausalLM", "BartConfig", **_BART, is_decoder=True,
                   is_encoder_decoder=False),
    "rembert": _build("RemBertModel", "RemBertConfig", **_ENCODER, **_READS,
                      input_embedding_size=24),
    "roformer": _build("RoFormerModel", "RoFormerConfig", **_ENCODER, **_READS,
                       embedding_size=24),
}  # fmt: skip
OWN = ("rembert", "roformer")
"""Outside the attention interface, which know no sdpa."""
QUICK = (("bert", "sdpa"), ("gpt2", "eager"), ("rembert", "eager"))


def _inputs(dtype: torch.dtype, padding: str = "left") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, OTHER, dtype=torch.long)
    mask[1, 4:] = 0
    other = torch.randn(2, OTHER, 24, generator=generator).to(dtype)
    return {**tiny_models.inputs(padding), "encoder_hidden_states": other,
            "encoder_attention_mask": mask}  # fmt: skip


@pytest.mark.parametrize(("dtype", "padding"), [
    (torch.float64, "left"),
    pytest.param(torch.float32, "none", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize(("name", "attention"), [
    pytest.param(name, attention, marks=[] if (name, attention) in QUICK else pytest.mark.slow)
    for name in MODELS for attention in ("eager", "sdpa")
    if attention == "eager" or name not in OWN
])  # fmt: skip
def test_every_call_is_reproduced_and_all_together_are_the_full_pass(
    name, attention, dtype, padding
):
    model, inputs = tiny_models.made(MODELS[name], dtype, attention), _inputs(dtype, padding)
    steps, full = trace_decoding(model, inputs, N_TOKEN), trace(model, inputs)
    assert len(steps) == 1 + N_TOKEN
    assert steps[0].keys() == full.keys()
    assert len(full) == 4  # two layers, each with both kinds
    real = inputs["attention_mask"].bool()
    for step in steps:
        assert max(layer.error for layer in step.values()) <= TOLERANCE[dtype]
    for layer, whole in full.items():
        joined = torch.cat([step[layer].output for step in steps], 1)
        assert relative_error(joined[real], whole.output[real]) <= AGREEMENT[dtype], layer


@pytest.mark.parametrize("name", ["bert", "rembert"])
def test_the_other_sequence_is_read_whole_at_each_call(name):
    """Its map has a row for the new token and columns for all tokens of the other sequence."""
    model, inputs = tiny_models.made(MODELS[name], torch.float64, "eager"), _inputs(torch.float64)
    steps, full = trace_decoding(model, inputs, N_TOKEN), trace(model, inputs)
    reading = [n for n, layer in full.items() if "n_key" in layer.attrs]
    assert len(reading) == 2
    for layer in reading:
        whole = dsf.materialise(full[layer].recurrence)[..., OTHER:, :OTHER]
        for past, step in zip(range(13 - N_TOKEN, 13), steps[1:], strict=True):
            assert (step[layer].attrs["n_key"], step[layer].attrs["n_query"]) == (OTHER, 1)
            row = dsf.materialise(step[layer].recurrence)[..., OTHER:, :OTHER]
            assert float((row[..., 0, :] - whole[..., past, :]).abs().max()) <= 1e-13
    for layer in set(full) - set(reading):
        state = core(steps[-1][layer].recurrence).initial_state
        assert state is not None  # the values of the tokens before
        assert state.shape[2] == 13


def test_a_cache_of_the_callers_own_is_written_on():
    model, inputs = tiny_models.made(MODELS["bert"], torch.float64, "sdpa"), _inputs(torch.float64)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    steps = trace_decoding(model, inputs, N_TOKEN, cache=cache)
    assert cache.get_seq_length() == 13
    own = trace_decoding(model, inputs, N_TOKEN)
    for step, other in zip(steps, own, strict=True):
        assert all(torch.equal(step[n].output, other[n].output) for n in step)


def test_a_wrong_map_fails_the_gate_of_a_later_call(monkeypatch):
    """Of what reads the other sequence, whose keys are in the cache after the first call."""
    model, inputs = (
        tiny_models.made(MODELS["bert"], torch.float64, "eager"),
        _inputs(torch.float64),
    )
    built = RegistryAttention.build

    def spoiled(self, visit):
        if "crossattention" in visit.path and visit.past == 11:
            call = visit.taps[0]
            call.args = (call.args[0], (1 + WRONG) * call.args[1], *call.args[2:])
        return built(self, visit)

    monkeypatch.setattr(RegistryAttention, "build", spoiled)
    with pytest.raises(DsfFidelityError, match="crossattention"):
        trace_decoding(model, inputs, N_TOKEN)
