"""The training script: both paths compute one function, it judges, and it says what ran."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import kernel_laws
import numpy as np
import pytest
import torch

from dsf import results

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"
FAMILIES = ("a", "a_gates", "b", "c", "d", "e", "f_zeros", "f_inline", "g_monarch",
            "g_hierarchical", "normalised", "mlstm")  # fmt: skip
CLOSE = 2e-5  # of the largest entry, float32 against the float64 loop
SMALL = ["--layers", "2", "--width", "32", "--head", "16", "--length", "40", "--steps", "3"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, which finds its mixers beside it."""
    sys.path.insert(0, str(ANALYSES))
    try:
        return importlib.import_module("train_through_kernels")
    finally:
        sys.path.remove(str(ANALYSES))


def test_all_families_are_tested(script: ModuleType) -> None:
    assert tuple(script.FAMILIES) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_path_is_what_the_kernel_is_defined_as(script: ModuleType, family: str) -> None:
    """Outputs and gradients of the mixer, its kernel replaced by the loop that defines it."""
    pytest.importorskip("triton")
    import dsf_kernels.reference as loops

    torch.manual_seed(0)
    mixer = script.FAMILIES[family](12, 2, script.Scans(False, torch.float32))
    loop = getattr(loops, f"{mixer.kernel_name}_reference")
    block = {"block": 4} if "block" in inspect.signature(loop).parameters else {}

    def run_loop(**arguments):
        found = loop(**arguments, **mixer.options(), **block)
        return found[0] if isinstance(found, tuple) else found

    mixer.run_kernel = run_loop
    x = torch.randn(2, 21, 12, requires_grad=True)

    def run(kernel: bool) -> list[torch.Tensor]:
        mixer.path.kernel = kernel
        y = mixer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]

    for found, true in zip(run(False), run(True), strict=True):
        scale = float(true.detach().abs().max())
        torch.testing.assert_close(found, true, rtol=0, atol=CLOSE * scale + 1e-12)


def test_the_script_writes_what_it_says(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    flags = [*SMALL, "--device", "cpu", "--dtype", "bfloat16", "--out", str(tmp_path),
             "--families", "c", "g_monarch"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_through_kernels.py", *flags])
    script.main()
    data = results.load(tmp_path / "train_through_kernels.nc")
    assert data.loss.sizes == {"family": 2, "run": 3, "step": 3}
    np.testing.assert_array_equal(data.loss.sel(run="kernel"), data.loss.sel(run="torch"))
    perturbed = data.loss.sel(run="perturbed") - data.loss.sel(run="torch")
    assert 0 < float(abs(perturbed).max()) < 0.1
    assert all("expected CUDA tensors" in str(ran) for ran in data.ran.values)
    assert float(data.seconds.min()) > 0
    page = (tmp_path / "train_through_kernels.md").read_text(encoding="utf-8")
    assert page.count("torch twice") == 2
    again = ["--read", str(tmp_path / "train_through_kernels.json"), "--out", str(tmp_path / "2")]
    monkeypatch.setattr(sys, "argv", ["train_through_kernels.py", *again])
    script.main()
    assert results.load(tmp_path / "2" / "train_through_kernels.nc").identical(data)
    for kind in ("pdf", "png"):
        assert (tmp_path / f"train_through_kernels.{kind}").stat().st_size > 1000


def test_training_lowers_the_loss(script: ModuleType) -> None:
    args = script.arguments([*SMALL, "--device", "cpu", "--steps", "25", "--rate", "3e-3"])
    text, _ = script.corpus(args)
    torch.manual_seed(0)
    model = script.LanguageModel("c", args, script.Scans(False, torch.float32))
    run = script.train(model, script.batches(text, True, args), args)
    assert run.losses[-1] < run.losses[0] - 1.0
    assert run.auto.startswith("chunked")


def test_a_curve_that_leaves_is_called_so(script: ModuleType) -> None:
    true = np.linspace(5.0, 2.0, 60)
    ripple = 1e-3 * np.random.default_rng(0).standard_normal(60)

    def judged(kernel: np.ndarray) -> str:
        curves = {"kernel": kernel, "torch": true, "perturbed": true + ripple}
        runs = {name: script.Run(c, 1.0, "chunked") for name, c in curves.items()}
        return script.row_of("c", runs, "triton")["matches"]

    assert judged(true - ripple) == "yes"
    assert judged(true + 0.01 * np.linspace(0, 5, 60)) == "NO"
    assert judged(np.where(np.arange(60) == 30, np.nan, true)) == "NO"


def test_only_masked_bytes_are_asked_for(script: ModuleType) -> None:
    args = script.arguments([*SMALL, "--device", "cpu"])
    text, _ = script.corpus(args)
    x, y = script.batches(text, False, args)
    assert bool(((x == script.MASK) == (y >= 0)).all())
    assert 0.05 < float((y >= 0).float().mean()) < 0.3
    x, y = script.batches(text, True, args)
    assert torch.equal(x[..., 1:], y[..., :-1])


@kernel_laws.on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_trains_as_torch_does(script: ModuleType, family: str, dtype: str) -> None:
    flags = ["--layers", "2", "--width", "128", "--length", "130", "--steps", "40"]
    args = script.arguments([*flags, "--dtype", dtype, "--rate", "1e-3"])
    text, _ = script.corpus(args)
    runs, ran = script.train_all(family, text, args)
    row = script.row_of(family, runs, ran)
    assert ran == "triton"
    assert row["matches"] == "yes", row
