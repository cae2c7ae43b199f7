"""After a trace, whatever happened in it, the model is as it was."""

from __future__ import annotations

import contextlib

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import dsf
from dsf import adapters
from dsf.tracing import trace

FAMILIES = ["bert", "llama", "mamba", "mamba2", "recurrent_gemma"]


def _snapshot(model: nn.Module) -> dict:
    """Everything that a trace touches on its way."""
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [(sorted(m.__dict__), id(m.__dict__.get("_rnn_scan")))
                       for m in model.modules()],
        "states": [(id(s), None if s is None else s.clone()) for m in model.modules()
                   for n in ("recurrent_states", "conv1d_state") for s in [m.__dict__.get(n)]],
        "implementation": [m.config._attn_implementation for m in model.modules()
                           if hasattr(m, "config")],
        "registry": (sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)),
        "functions": (modeling_mamba.mamba_selective_scan, modeling_mamba2.mamba2_chunk_scan),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "weights": [p.detach().clone() for p in model.parameters()],
        "grad": torch.is_grad_enabled(),
    }  # fmt: skip


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _assert_restored(model: nn.Module, before: dict) -> None:
    after = _snapshot(model)
    assert [k for k in before if not _same(before[k], after[k])] == []


def _with_states(name: str) -> nn.Module:
    model = tiny_models.model(name)
    if name == "recurrent_gemma":
        model(**tiny_models.inputs(), use_cache=True)  # fills the states its modules hold
        model.layers[0].temporal_block.rg_lru.recurrent_states.add_(1.0)
    model.train()
    model.get_submodule(next(iter(dict(model.named_children())))).eval()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_after_a_trace(name):
    model = _with_states(name)
    before = _snapshot(model)
    layers = trace(model, tiny_models.inputs())
    _assert_restored(model, before)
    for layer in layers.values():
        layer.readout(dsf.scan(layer.recurrence, layer.values))
    _assert_restored(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_an_exception_inside_the_pass(name):
    model = _with_states(name)

    def fail(*_) -> None:
        raise RuntimeError("inside the pass")

    list(model.modules())[-1].register_forward_hook(fail)
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match="inside the pass"):
        trace(model, tiny_models.inputs())
    _assert_restored(model, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_an_exception_inside_the_layer(name, monkeypatch):
    model = _with_states(name)
    path = next(iter(adapters_of(model)))
    inner = list(model.get_submodule(path).modules())[-1]
    monkeypatch.setattr(inner, "forward", lambda *a, **k: 1 / 0)
    before = _snapshot(model)
    with contextlib.suppress(ZeroDivisionError):
        trace(model, tiny_models.inputs())
    _assert_restored(model, before)


def adapters_of(model: nn.Module) -> dict[str, nn.Module]:
    return {p: m for p, m in model.named_modules() if adapters.adapter_for(m) is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_when_nested(name):
    """A trace inside a trace, of the same model: each sees its own pass, and nothing is left."""
    model = _with_states(name)
    inner: list[dict] = []

    def again(*_) -> None:
        if not inner:
            inner.append({})
            inner[0] = trace(model, tiny_models.inputs())

    path = next(iter(adapters_of(model)))
    hook = model.get_submodule(path).register_forward_hook(again)
    before = _snapshot(model)
    outer = trace(model, tiny_models.inputs())
    _assert_restored(model, before)
    hook.remove()
    plain = trace(model, tiny_models.inputs())
    for found in (outer, inner[0]):
        assert list(found) == list(plain)
        for layer, expected in zip(found.values(), plain.values(), strict=True):
            assert torch.equal(layer.output, expected.output)
            assert layer.error == expected.error
            assert layer.attrs["implementation"] == expected.attrs["implementation"]


def test_the_output_of_a_trace_survives_what_the_model_does_to_it():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.rnn(x)[0]
            out += 100.0
            x.zero_()
            return out

    layer = trace(InPlace(), torch.randn(1, 5, 3))["rnn.l0"]
    assert float(layer.output.abs().max()) <= 1
