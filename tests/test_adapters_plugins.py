"""Adapters of other packages come in by entry point; broken ones are named and skipped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsf
from dsf import adapters
from dsf.adapters import Adapter, Built, Visit
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer

ROUNDING = 1e-6


class Outside(nn.Module):
    """A layer of somebody else's: unnormalised linear attention with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT).tril()
        return self.out(weights @ self.v(x))


class OutsideAdapter(Adapter):
    """What a package with its own layers would ship."""

    name = "outside"
    covers = ("outside: Outside",)
    classes = frozenset({f"{__name__}:Outside"})
    needs_tap = False

    def build(self, visit: Visit) -> list[Built]:
        layer, x = visit.module, visit.args[0]
        recurrence = dsf.Recurrence(
            dsf.transitions.Identity(4), layer.k(x)[:, :, None, :, None],
            layer.q(x)[:, :, None, None], system="outside",
        )  # fmt: skip
        return [Built("outside", recurrence, layer.v(x)[:, :, None],
                      lambda y: layer.out(y[:, :, 0]), visit.output)]  # fmt: skip


@pytest.fixture
def entry_points(monkeypatch):
    """Entry points of the group dsf.adapters, as if packages that declare them were installed."""
    declared: list[importlib.metadata.EntryPoint] = []
    real = importlib.metadata.entry_points

    def listed(**wanted):
        return declared if wanted.get("group") == adapters.GROUP else real(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", listed)
    adapters.adapters.cache_clear()
    yield lambda name, value: declared.append(
        importlib.metadata.EntryPoint(name, value, adapters.GROUP)
    )
    adapters.adapters.cache_clear()


def test_an_outside_adapter_comes_in_by_entry_point(entry_points):
    x = torch.randn(2, 5, 4)
    with pytest.raises(DsfUnsupportedError):
        from_layer(Outside(), x)
    adapters.adapters.cache_clear()
    sys.modules.setdefault(__name__, sys.modules[Outside.__module__])
    entry_points("outside", f"{__name__}:OutsideAdapter")
    layer = from_layer(Outside(), x)
    assert layer.system == "outside"
    assert layer.error <= ROUNDING
    assert "outside: Outside" in adapters.supported()


@pytest.mark.parametrize(("value", "reason"), [
    ("no_such_package:Thing", "ModuleNotFoundError"),
    ("collections:OrderedDict", "expected a dsf.adapters.Adapter"),
    ("dsf.adapters:Adapter", "TypeError.*abstract method '?build"),
])  # fmt: skip
def test_a_broken_plugin_is_reported_by_name_and_skipped(entry_points, value, reason):
    entry_points("broken", value)
    with pytest.warns(UserWarning, match=rf"entry point 'broken'.*{reason}"):
        layer = from_layer(nn.GRU(3, 3), torch.randn(4, 1, 3))
    assert layer.error <= ROUNDING


# -- a package that is really installed --------------------------------------------------------

_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "outside-layers"
version = "1.0"

[project.entry-points."dsf.adapters"]
outside = "outside_layers:OutsideAdapter"

[tool.hatch.build.targets.wheel]
packages = ["outside_layers"]
"""

_PACKAGE = """
import torch
from torch import nn

import dsf
from dsf.adapters import Adapter, Built


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT).tril()
        return self.out(weights @ self.v(x))


class OutsideAdapter(Adapter):
    name = "outside"
    covers = ("outside_layers: Outside",)
    classes = frozenset({"outside_layers:Outside"})
    needs_tap = False

    def build(self, visit):
        layer, x = visit.module, visit.args[0]
        recurrence = dsf.Recurrence(
            dsf.transitions.Identity(4), layer.k(x)[:, :, None, :, None],
            layer.q(x)[:, :, None, None], system="outside",
        )
        return [Built("outside", recurrence, layer.v(x)[:, :, None],
                      lambda y: layer.out(y[:, :, 0]), visit.output)]
"""

_USE = """
import torch, outside_layers
import dsf
from dsf.adapters import supported

model = torch.nn.Sequential(torch.nn.Linear(4, 4), outside_layers.Outside())
found = dsf.trace(model, torch.randn(2, 5, 4))
assert "outside_layers: Outside" in supported()
print(*[(name, layer.system, layer.error < 1e-6) for name, layer in found.items()])
"""


def test_an_installed_package_adds_its_layer(tmp_path: Path) -> None:
    """Built and installed by pip, without the network, into a folder of its own."""
    for package in ("pip", "hatchling"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    source, target = tmp_path / "source", tmp_path / "site"
    (source / "outside_layers").mkdir(parents=True)
    (source / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (source / "outside_layers" / "__init__.py").write_text(_PACKAGE, encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet",
               "--no-build-isolation", "--target", str(target), str(source)]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    used = subprocess.run(
        [sys.executable, "-c", _USE], capture_output=True, text=True, timeout=300, check=False,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr[-2000:]
    assert used.stdout.strip() == "('1', 'outside', True)"
