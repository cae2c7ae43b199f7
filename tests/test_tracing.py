"""from_layer and trace: selection, refusals, restoration, plug-ins."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.models.bert.modeling_bert import BertAttention, BertConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import dsf
from dsf import memory
from dsf.errors import DsfFidelityError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.tracing import LayerTrace, from_layer, trace

ROUNDING = 1e-6
FAMILIES = ["bert", "llama", "mamba", "mamba2", "recurrent_gemma"]


# -- what comes out ----------------------------------------------------------------------------


def test_the_public_names_are_the_ones_of_this_module():
    assert (dsf.from_layer, dsf.trace, dsf.LayerTrace) == (from_layer, trace, LayerTrace)


def test_a_trace_is_frozen_and_says_how_it_was_made():
    model = tiny_models.model("mamba2")
    layer = trace(model, tiny_models.inputs())["layers.1.mixer"]
    assert (layer.name, layer.layer, layer.system) == ("layers.1.mixer", 1, "mamba2")
    for key, value in {
        "implementation": "torch", "precision": "float32", "float32_casts": "as shipped",
        "class": "Mamba2Mixer", "path": "layers.1.mixer", "tolerance": 1e-5,
        "torch_version": torch.__version__, "transformers_version": transformers.__version__,
    }.items():  # fmt: skip
        assert layer.attrs[key] == value, key
    assert 0 <= layer.attrs["scan_error"] <= ROUNDING
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.error = 0.0  # type: ignore[misc]


def test_a_trace_is_shown_in_one_line_without_its_numbers():
    layer = from_layer(nn.GRU(3, 2), torch.randn(4, 1, 3))
    assert repr(dataclasses.replace(layer, error=1.25e-7)) == (
        "LayerTrace('l0': Recurrence(gru: A diagonal, B (1, 4, 2, 1, 1), C (1, 1, 1, 1, 1), "
        "exact_along_trajectory), values (1, 4, 2, 1), error 1.2e-07)"
    )
    encoder = from_layer(nn.MultiheadAttention(4, 2), *torch.randn(3, 5, 1, 4), need_weights=False)
    assert repr(encoder).startswith("LayerTrace('': Bidirectional, Recurrence(softmax_attention: ")
    assert "tensor" not in repr(encoder)


def test_three_forms_of_asking_give_the_same_recurrence():
    model = tiny_models.model("llama")
    inputs, path = tiny_models.inputs("left"), "layers.1.self_attn"
    captured = []
    keep = model.get_submodule(path).register_forward_pre_hook(
        lambda m, args, kwargs: captured.append((args, kwargs)), with_kwargs=True
    )
    by_path = from_layer(model, layer=path, inputs=inputs)
    keep.remove()
    args, kwargs = captured[0]
    alone = from_layer(model.get_submodule(path), *args, **kwargs)
    of_all = trace(model, inputs)[path]
    for other in (alone, of_all):
        assert torch.equal(other.output, by_path.output)
        assert torch.equal(
            dsf.materialise(other.recurrence), dsf.materialise(by_path.recurrence))  # fmt: skip


def test_layers_are_chosen_by_path_and_come_in_the_order_they_ran():
    model = tiny_models.model("jamba")
    inputs = tiny_models.inputs()
    assert list(trace(model, inputs)) == ["layers.0.mamba", "layers.1.self_attn"]
    assert list(trace(model, inputs, ["layers.1.self_attn"])) == ["layers.1.self_attn"]
    with pytest.raises(DsfValueError, match=r"'layers.9.mamba'.*Covered here: 'layers.0.mamba'"):
        trace(model, inputs, ["layers.9.mamba"])
    with pytest.raises(DsfValueError, match=r"holds the layers 'layers.0.mamba'"):
        trace(model, inputs, ["layers.0"])


def test_inputs_may_be_a_mapping_a_tuple_or_one_tensor():
    model = tiny_models.model("mamba")
    ids = tiny_models.inputs()["input_ids"]
    batch = transformers.BatchEncoding({"input_ids": ids})
    found = [trace(model, given) for given in ({"input_ids": ids}, batch, (ids,), ids)]
    assert all(torch.equal(f["layers.0.mixer"].output, found[0]["layers.0.mixer"].output)
               for f in found)  # fmt: skip
    with pytest.raises(DsfTypeError, match="inputs: expected the model's inputs"):
        trace(model, None)


def test_a_module_that_holds_one_layer_is_taken_for_it():
    config = BertConfig(hidden_size=24, num_attention_heads=3, attn_implementation="eager")
    layer = from_layer(BertAttention(config), torch.randn(2, 5, 24))
    assert (layer.name, layer.system) == ("self", "softmax_attention")
    with pytest.raises(DsfValueError, match=r"2: 'layers.0.mixer'.*layer=\"layers.0.mixer\""):
        from_layer(tiny_models.model("mamba"), **tiny_models.inputs())


def test_what_a_pre_hook_of_the_user_gives_the_layer_is_what_is_traced():
    model = tiny_models.model("mamba")
    mixer = model.get_submodule("layers.0.mixer")
    before = trace(model, tiny_models.inputs())["layers.0.mixer"]
    mixer.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]) if args else None)
    mixer.register_forward_hook(lambda m, args, out: out + 1)  # after the layer, not part of it
    after = trace(model, tiny_models.inputs())["layers.0.mixer"]
    assert after.error <= ROUNDING
    assert not torch.equal(before.output + 1, after.output)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_nothing_in_a_trace_is_on_the_graph(name):
    attention = "eager" if name == "gpt_oss" else None
    for layer in trace(
        tiny_models.model(name, attention=attention), tiny_models.inputs()
    ).values():
        tensors = [*pytree.tree_leaves(layer.recurrence), layer.values, layer.output]
        assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))


def test_gradients_reach_the_weights_only_when_asked_for():
    model = tiny_models.model("mamba2")
    mixer = model.get_submodule("layers.0.mixer")
    kept = trace(model, tiny_models.inputs(), gradients=True)["layers.0.mixer"]
    dsf.scan(kept.recurrence, kept.values).square().sum().backward()
    assert float(mixer.A_log.grad.abs().sum()) > 0
    assert float(mixer.in_proj.weight.grad.abs().sum()) > 0


def test_the_tolerance_is_the_callers_to_set():
    model = tiny_models.model("mamba2", torch.float64)
    with pytest.raises(DsfFidelityError, match=r"within 1e-10, got a relative difference of"):
        trace(model, tiny_models.inputs(), precision="native")
    assert trace(model, tiny_models.inputs(), precision="native", tolerance=1e-5)
    with pytest.raises(DsfFidelityError, match="within 0"):
        trace(model, tiny_models.inputs(), tolerance=0.0)
    with pytest.raises(DsfValueError, match="precision: expected 'auto' or 'native'"):
        trace(model, tiny_models.inputs(), precision="float16")


# -- refusals ----------------------------------------------------------------------------------


def test_an_unknown_layer_is_refused_with_what_is_known_and_how_to_add_one():
    with pytest.raises(DsfUnsupportedError) as caught:
        from_layer(nn.Linear(3, 3), torch.zeros(1, 3))
    for text in ("torch.nn.modules.linear.Linear", "torch.nn.MultiheadAttention", "Mamba2",
                 "RecurrentGemma", "dsf.adapters.Adapter", "entry point"):  # fmt: skip
        assert text in str(caught.value)
    with pytest.raises(DsfUnsupportedError, match=r"Linear at 'up'"):
        trace(nn.ModuleDict({"up": nn.Linear(3, 3)}), torch.zeros(1, 3), ["up"])


class SilentMixer(modeling_mamba.MambaMixer):
    """A subclass whose forward goes around the scan."""

    def forward(self, hidden_states: Tensor, **_) -> Tensor:
        return hidden_states


def test_a_layer_that_never_calls_its_function_is_an_error():
    config = modeling_mamba.MambaConfig(hidden_size=8, num_hidden_layers=1)
    with pytest.raises(DsfUnsupportedError, match=r"SilentMixer: expected .* got no call"):
        from_layer(SilentMixer(config, layer_idx=0), torch.randn(1, 4, 8))


def test_asked_layers_that_do_not_run_are_an_error():
    model = nn.ModuleDict({"used": nn.LSTM(3, 3), "idle": nn.LSTM(3, 3)})
    model.forward = lambda x: model["used"](x)[0]
    x = torch.randn(4, 1, 3)
    assert list(trace(model, x)) == ["used.l0"]
    with pytest.raises(DsfValueError, match=r"got 'idle', which did not run"):
        trace(model, x, ["idle"])


def test_compiled_models_are_refused():
    model = tiny_models.model("mamba")
    with pytest.raises(DsfUnsupportedError, match=r"torch\.compile.*_orig_mod"):
        trace(torch.compile(model), tiny_models.inputs())
    model.layers[0].compile()
    with pytest.raises(DsfUnsupportedError, match=r"'layers\.0'"):
        trace(model, tiny_models.inputs())


def test_missing_arguments_are_named_with_the_form_that_supplies_them():
    layer = LlamaAttention(LlamaConfig(hidden_size=8, num_attention_heads=2,
                                       attn_implementation="eager"), layer_idx=0)  # fmt: skip
    x = torch.randn(1, 4, 8)
    with pytest.raises(DsfTypeError, match=r"position_embeddings.*layer=\"path\.to\.layer\""):
        from_layer(layer, x)
    with pytest.raises(DsfTypeError, match=r"key, value: expected by MultiheadAttention"):
        from_layer(nn.MultiheadAttention(8, 2), x)
    with pytest.raises(DsfTypeError, match=r"inputs=\{...\} when layer= is given"):
        from_layer(tiny_models.model("mamba"), x, layer="layers.0.mixer")


def test_unknown_keywords_of_the_attention_function_are_refused():
    config = BertConfig(hidden_size=24, num_attention_heads=3, attn_implementation="eager")
    layer, x = BertAttention(config), torch.randn(2, 5, 24)
    assert from_layer(layer, x, sliding_window=3).error <= ROUNDING  # known to be ignored
    with pytest.raises(DsfUnsupportedError, match=r"got \['head_wise_gate'\]"):
        from_layer(layer, x, head_wise_gate=torch.ones(3))


def test_caches_are_refused():
    model, inputs = tiny_models.model("llama"), tiny_models.inputs()
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(DsfUnsupportedError, match="past_key_values: expected no cache"):
        trace(model, {**inputs, "past_key_values": cache})
    with pytest.raises(DsfUnsupportedError, match="use_cache: expected False"):
        trace(model, {**inputs, "use_cache": True})


def test_coefficients_that_would_not_fit_are_refused_with_their_size(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"layers.0.mixer: decays and B: .* needs .*layers=\["):
        trace(tiny_models.model("mamba"), tiny_models.inputs())


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
def test_an_old_transformers_is_refused_for_recurrent_layers(name, monkeypatch):
    model = tiny_models.model(name)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.1")
    with pytest.raises(DsfUnsupportedError, match=r"expected transformers >= 5.15, got 5.14.1"):
        trace(model, tiny_models.inputs())


def test_a_missing_scan_function_is_named(monkeypatch):
    model = tiny_models.model("mamba2")
    monkeypatch.delattr(modeling_mamba2, "mamba2_chunk_scan")
    with pytest.raises(DsfUnsupportedError, match=r"function 'mamba2_chunk_scan', got none"):
        trace(model, tiny_models.inputs())


# -- lightness ---------------------------------------------------------------------------------


def test_recognising_a_layer_imports_no_optional_package():
    code = (
        "import sys, torch, dsf; from torch import nn; "
        "dsf.from_layer(nn.GRU(2, 2), torch.zeros(3, 1, 2)); "
        "assert not {'transformers', 'triton', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
