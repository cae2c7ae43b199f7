"""Traced weights against the checkpoint they came from."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from dsf.errors import DsfTypeError, DsfValueError
from dsf.tracing import from_layer, trace

PATH = "layers.0.mixer"


@pytest.fixture
def saved(tmp_path):
    """A tiny Mamba-2 and its weights on disk, under the names of a model with a head."""
    model = tiny_models.model("mamba2")
    weights = {f"backbone.{n}": w.clone() for n, w in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    return model, weights, tmp_path / "model.safetensors"


def test_the_checkpoints_own_weights_pass_in_every_form(saved):
    model, weights, file = saved
    for checkpoint in (weights, file, str(file), file.parent):
        assert len(trace(model, tiny_models.inputs(), checkpoint=checkpoint)) == 2
        layer = from_layer(
            model, layer=PATH, inputs=tiny_models.inputs(), checkpoint=checkpoint)  # fmt: skip
        assert layer.name == PATH


def test_weights_made_anew_after_loading_are_named_with_the_largest_difference(saved):
    model, weights, file = saved
    mixer = model.get_submodule(PATH)
    with torch.no_grad():
        mixer.A_log[1] += 0.5
        mixer.dt_bias[0] -= 2.0
    for checkpoint in (weights, file):
        with pytest.raises(DsfValueError) as caught:
            trace(model, tiny_models.inputs(), checkpoint=checkpoint)
        for text in (f"'{PATH}.A_log (0.5)'", f"'{PATH}.dt_bias (2)'", "got 2 that",
                     "the largest difference is 2."):  # fmt: skip
            assert text in str(caught.value)
    other = trace(model, tiny_models.inputs(), ["layers.1.mixer"], checkpoint=file)
    assert list(other) == ["layers.1.mixer"]  # the weights of the traced layers alone count


def test_one_bit_and_one_nan_are_differences(saved):
    model, weights, _ = saved
    name = f"backbone.{PATH}.D"
    whole = weights[name]
    for value, shown in ((torch.nextafter(whole[0], whole[0] + 1), "e-0"), (torch.nan, "(inf)")):
        changed = {**weights, name: torch.cat([torch.as_tensor(value)[None], whole[1:]])}
        with pytest.raises(DsfValueError, match=r"layers\.0\.mixer\.D") as caught:
            trace(model, tiny_models.inputs(), checkpoint=changed)
        assert shown in str(caught.value)


def test_missing_and_misshapen_tensors_are_differences(saved):
    model, weights, _ = saved
    changed = {n: w for n, w in weights.items() if n != f"backbone.{PATH}.A_log"}
    changed[f"backbone.{PATH}.D"] = torch.zeros(7)
    with pytest.raises(DsfValueError, match=r"A_log \(not in the checkpoint\)") as caught:
        trace(model, tiny_models.inputs(), checkpoint=changed)
    assert "D ((4,), saved (7,))" in str(caught.value)


def test_a_model_in_another_precision_is_compared_in_its_own(saved):
    _, weights, _ = saved
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_models.model("mamba2").to(dtype)
        assert trace(model, tiny_models.inputs(), checkpoint=weights)


def test_a_layer_alone_is_compared_with_its_own_weights_and_never_with_a_guess(saved):
    model, weights, _ = saved
    mixer, x = model.get_submodule(PATH), torch.randn(1, 5, 16)
    assert from_layer(mixer, x, checkpoint=dict(mixer.state_dict())).error < 1e-6
    with pytest.raises(DsfValueError, match=r"expected one tensor for 'dt_bias'.*whole model"):
        from_layer(mixer, x, checkpoint=weights)


def test_what_is_no_checkpoint_is_refused(saved, tmp_path, unchecked):
    model, _, _ = saved
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (pickled, empty, tmp_path / "absent.safetensors"):
        with pytest.raises(DsfValueError, match="expected a safetensors file or a folder"):
            trace(model, tiny_models.inputs(), checkpoint=path)
    with pytest.raises(DsfTypeError, match="expected a mapping of tensors or a path, got int"):
        trace(model, tiny_models.inputs(), checkpoint=3)  # type: ignore[arg-type]
    with pytest.raises(DsfTypeError, match="expected tensors, got float"):
        trace(model, tiny_models.inputs(), checkpoint={"D": 1.0})  # type: ignore[dict-item]
