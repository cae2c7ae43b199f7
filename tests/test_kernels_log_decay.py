"""Log decays above 0: refused where that can be seen without waiting for the device."""

import importlib

import kernel_laws
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
SHAPES = {  # of the log decay, for 3 tokens, 2 heads, 4 states
    "scalar_decay_scan": (1, 3, 2),
    "diagonal_decay_scan": (1, 3, 2, 4),
    "delta_scan": (1, 3, 2),
}


def arguments(name, device="cpu"):
    rows = torch.ones(1, 3, 2, 4, device=device)
    found = {"query": rows, "key": rows, "value": rows}
    found["log_decay"] = -torch.ones(SHAPES[name], device=device)
    if name == "delta_scan":
        found["write_strength"] = torch.ones(1, 3, 2, device=device)
    return found


def scan_of(name):
    return importlib.import_module(f"dsf_kernels.{name}")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("wrong", [0.25, float("nan"), float("inf")])
def test_seen_on_the_cpu(name, wrong, monkeypatch):
    module = scan_of(name)
    monkeypatch.setattr(module, "check_kind", lambda *_: None)  # as if on a GPU
    given = arguments(name)
    given["log_decay"][0, 1, 1] = wrong
    message = f"dsf_kernels.{name}: log_decay: expected at most 0, .*, got {wrong:.3g}"
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(**given)


def test_what_passes():
    """0, -inf, nothing, none; and, without the switch, what would have to be waited for."""
    from dsf_kernels.launch import check_decay

    check_decay("scan", torch.tensor([0.0, -torch.inf, -1.0]))
    check_decay("scan", torch.zeros(0))
    check_decay("scan", None)
    check_decay("scan", torch.ones(1, device="meta"))


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_looks_when_asked(name, monkeypatch):
    launch, scan = importlib.import_module("dsf_kernels.launch"), getattr(scan_of(name), name)
    given = arguments(name, "cuda")
    given["log_decay"][0, 1, 1] = 0.25
    scan(**given)  # the host does not look
    monkeypatch.setattr(launch, "CHECK", True)
    with pytest.raises(ValueError, match=r"expected at most 0, .*, got 0\.25"):
        scan(**given)
