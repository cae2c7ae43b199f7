"""transformers' recurrent mixers: what a trace puts back, refuses, and which layers it covers."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from recurrent_models import KINDS, LAYERS
from torch import nn
from transformers.models.inkling import modeling_inkling
from transformers.models.minimax import modeling_minimax
from transformers.models.qwen3_next import modeling_qwen3_next

import dsf
from dsf.adapters import adapters
from dsf.errors import DsfFidelityError, DsfUnsupportedError
from dsf.tracing import from_layer, trace

DOUBLE = 1e-13
SINGLE = 1e-5


# -- float64, states, refusals -------------------------------------------------------------------


def test_minimax_tables_are_made_in_float64_for_the_pass_alone():
    model = tiny_models.model("minimax", torch.float64)
    mixer = model.get_submodule("layers.0.self_attn")
    before = dict(mixer.named_buffers())
    exact = trace(model, tiny_models.inputs(length=19))["layers.0.self_attn"]
    assert exact.error <= DOUBLE
    after = dict(mixer.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())
    with pytest.raises(DsfFidelityError, match="within 1e-10"):
        trace(model, tiny_models.inputs(length=19), ["layers.0.self_attn"], precision="native")
    native = trace(model, tiny_models.inputs(length=19), ["layers.0.self_attn"],
                   precision="native", tolerance=SINGLE)  # fmt: skip
    assert native["layers.0.self_attn"].attrs["float32_casts"] == "as shipped"


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_left_behind_also_after_an_exception(name):
    path = LAYERS[name][0]
    model = tiny_models.model(name, torch.float64)
    layer = model.get_submodule(path)
    adapter = next(a for a in adapters() if a.recognises(layer))

    def state() -> list:
        places = adapter.places(layer)
        return [[p.namespace.get(p.name) for p in places],
                [sorted(m.__dict__) for m in model.modules()],
                [id(b) for b in model.buffers()]]  # fmt: skip

    before = state()
    found = trace(model, tiny_models.inputs(), [path])[path]
    found.readout(dsf.scan(found.recurrence, found.values))
    assert state() == before

    def fail(*_) -> None:
        raise RuntimeError("inside the layer")

    hook = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the layer"):
        trace(model, tiny_models.inputs(), [path])
    hook.remove()
    assert state() == before


def test_gradients_reach_the_weights_of_the_decay():
    for name, weight in (("qwen3_next", "A_log"), ("kimi_linear", "forget_gate.A_log"),
                         ("rwkv", "time_decay"), ("xlstm", "fgate_preact.weight")):  # fmt: skip
        model, path = tiny_models.model(name), LAYERS[name][0]
        layer = trace(model, tiny_models.inputs(), [path], gradients=True)[path]
        dsf.scan(layer.recurrence, layer.values).square().sum().backward()
        grad = model.get_parameter(f"{path}.{weight}").grad
        assert grad is not None
        assert float(grad.abs().sum()) > 0


def test_a_part_that_calls_the_tapped_function_inside_another_layer_is_not_filed_there():
    """A function tap sees every caller of its file; only the asked layers' own calls count."""

    class Unasked(modeling_inkling.InklingShortConvolution):
        """Runs inside the asked layer, and calls the same function."""

    class Outer(modeling_inkling.InklingShortConvolution):
        """An asked layer with an asked part."""

        def forward(self, x: torch.Tensor, **_) -> torch.Tensor:
            return super().forward(self.inner(self.beside(x)))

    outer = Outer(6, 3, 0, 0)
    outer.beside, outer.inner = Unasked(6, 3, 0, 1), Unasked(6, 3, 0, 2)
    model = nn.ModuleDict({"outer": outer})
    model.forward = lambda x: model["outer"](x)
    x = torch.randn(2, 7, 6)
    inner = trace(model, x, ["outer.inner"])
    assert list(inner) == ["outer.inner"]
    assert inner["outer.inner"].error <= SINGLE
    with pytest.raises(DsfUnsupportedError, match="expected one call of causal_conv1d_fn, got 3"):
        trace(model, x, ["outer"])  # these calls are the layer's own, whatever part makes them


def test_packed_rows_are_refused(monkeypatch):
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    monkeypatch.setattr(  # an implementation that knows packed rows, as fla's does
        modeling_qwen3_next, "torch_chunk_gated_delta_rule",
        lambda *args, cu_seqlens=None, **kwargs: rule(*args, **kwargs),
    )  # fmt: skip
    model = tiny_models.model("qwen3_next")
    net = model.get_submodule("layers.0.linear_attn")
    with pytest.raises(DsfUnsupportedError, match="cu_seqlens: expected one sequence in each row"):
        from_layer(net, torch.randn(1, 6, 24), cu_seq_lens_q=torch.tensor([0, 3, 6]))


def test_rwkvs_state_is_refused():
    model = transformers.RwkvModel(transformers.RwkvConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=8, num_hidden_layers=2,
    )).eval()  # fmt: skip
    state = model(tiny_models.inputs()["input_ids"], use_cache=True).state
    with pytest.raises(DsfUnsupportedError, match="state: expected none, got one"):
        trace(model, {**tiny_models.inputs(), "state": state})


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv", "xlstm", "minimax", "lfm2"])
def test_an_old_transformers_is_refused(name, monkeypatch):
    model = tiny_models.model(name)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.1")
    with pytest.raises(DsfUnsupportedError, match=r"expected transformers >= 5.15, got 5.14.1"):
        trace(model, tiny_models.inputs(), [LAYERS[name][0]])


def test_a_part_that_a_release_has_renamed_is_named():
    mixer = tiny_models.model("minimax").get_submodule("layers.0.self_attn")
    assert isinstance(mixer, modeling_minimax.MiniMaxLightningAttention)
    del mixer.norm
    with pytest.raises(DsfUnsupportedError, match="MiniMaxLightningAttention to have 'norm'"):
        from_layer(mixer, torch.randn(1, 4, 24), None, None)


# -- coverage ------------------------------------------------------------------------------------

FULL_SEQUENCE = {
    "mamba_selective_scan", "mamba2_chunk_scan", "torch_chunk_gated_delta_rule",
    "chunk_kimi_delta_attention", "rwkv_linear_attention", "causal_conv1d_fn",
}  # fmt: skip
"""Functions of the release that run a recurrence over a whole sequence."""


def _callers(file: Path) -> set[str]:
    """Classes of a modelling file whose methods call one of its scan functions."""
    text = file.read_text(encoding="utf-8")
    if not any(f"def {name}(" in text for name in FULL_SEQUENCE):
        return set()
    return {
        node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)
        and any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                and n.func.id in FULL_SEQUENCE for n in ast.walk(node))
    }  # fmt: skip


def test_every_mixer_of_the_release_that_calls_a_scan_function_has_an_adapter():
    covered = {name for a in adapters() for name in a.classes}
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for file in sorted(folder.glob("*/modeling_*.py")):
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        found |= {f"{module}:{name}" for name in _callers(file)}
    assert len(found) >= 24
    assert found - covered == set()


def test_every_class_that_an_adapter_names_is_in_the_release():
    """A misspelt class would never be recognised, and nothing else would tell."""
    for adapter in adapters():
        for name in adapter.classes:
            module, _, cls = name.partition(":")
            if module.startswith("transformers."):
                assert hasattr(importlib.import_module(module), cls), name
