"""The attention interface's less usual callers: packed images, chosen keys, other names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit_models
import pytest
import torch
import transformers
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashModel

import dsf
from dsf.adapters.transformers_attention import _INERT, _SHAPING
from dsf.tracing import trace
from dsf.wrappers import core

DOUBLE = 1e-13
SINGLE = 1e-6
GRID = torch.tensor([[1, 4, 4], [1, 2, 4]])
IMAGES = (slice(0, 16), slice(16, 24))
"""The patches of two images, end to end."""
MODELS = Path(transformers.__file__).parent / "models"


def _slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def _model(name: str, dtype: torch.dtype, attention: str):
    model = audit_models.model_of(name).to(dtype)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    return model


@pytest.mark.parametrize(("name", "attention"), [
    ("muse_spark_vision", "sdpa"), _slow("muse_spark_vision", "eager"),
    _slow("glm4v_vision", "eager"), _slow("glm4v_vision", "sdpa"),
    _slow("hunyuan_vl_vision", "sdpa"),
])  # fmt: skip
def test_images_that_lie_end_to_end_are_stretches_of_one_time(name, attention):
    """Each attended to by a call of its own: no token reads one of another image."""
    model = _model(name, torch.float64, attention)
    (found, *others) = _traced_images(model, GRID, slice(0, 24)).values()
    layers = [found, *others]
    assert max(layer.error for layer in layers) <= DOUBLE
    weights = dsf.materialise(found.recurrence)
    assert weights.shape[-2:] == (24, 24)
    assert not weights[..., IMAGES[0], IMAGES[1]].any()
    assert not weights[..., IMAGES[1], IMAGES[0]].any()
    for number, image in enumerate(IMAGES):
        alone = next(iter(_traced_images(model, GRID[number : number + 1], image).values()))
        assert core(alone.recurrence).n_head == core(found.recurrence).n_head
        own = dsf.materialise(alone.recurrence)
        assert float((weights[..., image, image] - own).abs().max()) <= DOUBLE


def _traced_images(model, grid: Tensor, patches: slice) -> dict:
    given = next(iter(_runs(model, audit_models.inputs_of(model))))
    main = next(n for n, x in given.items() if x.is_floating_point())
    name = next(n for n in given if n != main)
    return trace(model, {main: given[main][patches].double(), name: grid})


def _runs(model, candidates: list[dict]) -> Iterator[dict]:
    for given in candidates:
        as_double = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
        try:
            with torch.no_grad():
                model(**as_double)
        except RuntimeError:
            continue
        yield given


@pytest.mark.parametrize(("name", "attention"), [
    ("deepseek_v32", "eager"), ("deepseek_v32", "sdpa"), _slow("axk2", "sdpa"),
    _slow("mistral_large4_text", "sdpa"), _slow("hy_v4", "eager"),
])  # fmt: skip
def test_keys_that_a_layer_chooses_are_chosen_in_the_traced_pass_too(name, attention):
    """The layer builds the mask of its choice only under the names eager and sdpa."""
    model = _model(name, torch.float32, attention)
    model.config.index_topk = 3
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 3
    (inputs,) = audit_models.inputs_of(model)
    inputs["attention_mask"].fill_(1)
    outputs: list[Tensor] = []
    with torch.no_grad():
        plain = model(**inputs, use_cache=False)[0]
    hook = model.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    found = trace(model, inputs)
    hook.remove()
    assert torch.equal(outputs[0], plain)
    for layer in found.values():
        assert layer.error <= SINGLE
        read = (dsf.materialise(layer.recurrence) > 0).sum(-1)
        assert int(read.max()) == 3, layer.name


@pytest.mark.parametrize("name", [
    "parakeet_encoder", _slow("lfm3_vl_vision"), "kosmos-2.5", _slow("aria")])  # fmt: skip
def test_arguments_by_name_and_those_that_say_nothing(name):
    """q, k and v by name; a grid handed on; a class that asks for nothing; caches of parts."""
    row = audit_models.row_of(name)
    assert row.state == "traced", row.why
    assert row.error <= SINGLE


def test_layers_are_known_by_what_they_call_whatever_their_name():
    """LongcatFlashMLA, two in each decoder layer."""
    config = LongcatFlashConfig(
        vocab_size=40, hidden_size=24, num_layers=1, num_attention_heads=2, ffn_hidden_size=32,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
        head_dim=4, qk_head_dim=8, n_routed_experts=4, zero_expert_num=0, moe_topk=2,
        expert_ffn_hidden_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongcatFlashModel(config).eval()
    found = trace(model, {"input_ids": torch.arange(3, 12)[None]})
    assert len(found) == 2
    assert max(layer.error for layer in found.values()) <= SINGLE


# -- the sources of the installed release ---------------------------------------------------------

SAYS_NOTHING = {"kosmos2_5"}
"""Which name the interface without asking it: their own eager function runs."""


def _callers() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every method that names the interface, with "folder:Class.method"."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in text:
            continue
        for kind in ast.parse(text).body:
            for part in getattr(kind, "body", ()):
                names = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
                if isinstance(part, ast.FunctionDef) and "ALL_ATTENTION_FUNCTIONS" in names:
                    yield f"{file.parent.name}:{kind.name}.{part.name}", part  # type: ignore


@pytest.mark.slow
def test_every_caller_asks_in_its_forward_and_gives_known_keywords():
    known = _SHAPING | _INERT | {"attention_mask", "query", "key", "value", None}
    faults, callers = [], list(_callers())
    for name, method in callers:
        words = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(method)}
        asks = "get_interface" in words or "getattr" not in words
        if not (asks and name.endswith(".forward")):
            faults += [name] if name.partition(":")[0] not in SAYS_NOTHING else []
        for call in ast.walk(method):
            if isinstance(call, ast.Call) and "attention_interface" in ast.unparse(call.func):
                faults += [f"{name}: {k.arg}" for k in call.keywords if k.arg not in known]
    assert len(callers) > 400
    assert faults == []


@pytest.mark.slow
def test_no_architecture_of_the_release_is_refused():
    rows = list(audit_models.rows())
    assert [row for row in rows if row.state == "refused"] == []
    traced = [row for row in rows if row.state == "traced"]
    assert len(traced) > 300
    assert max(row.error for row in traced) <= SINGLE
    assert [row for row in traced if not row.moved <= SINGLE] == []
