"""The script on long rows at a small length: its data set, table and figure."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dsf import results

SCRIPT = Path(__file__).resolve().parent.parent / "analyses" / "long_rows.py"
LENGTH = 96


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[xr.Dataset, list]:
    """The data set and the table of a short run."""
    spec = importlib.util.spec_from_file_location("long_rows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = ["--length", str(LENGTH), "--heads", "3", "--width", "12", "--rows", "8",
             "--threads", "1", "--out", str(tmp_path), *more]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["long_rows.py", *flags])
    script.main()
    for kind in ("pdf", "png"):
        assert (tmp_path / f"long_rows.{kind}").stat().st_size > 1000
    with (tmp_path / "long_rows.csv").open() as file:
        return results.load(tmp_path / "long_rows.nc"), list(csv.DictReader(file))


def test_the_script_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, table = run(tmp_path, monkeypatch)
    assert data["radial_row_sum"].sizes == {"head": 3, "query": LENGTH}
    assert float(abs(data["radial_row_sum"]).max()) <= 1e-14
    np.testing.assert_allclose(data["linear_row_sum"], 1, rtol=1e-12)
    np.testing.assert_allclose(data["radial_negative_mass"][:, 1:], 0.5, rtol=1e-10)
    assert bool((data["radial_l1_mass"] <= data["radial_mass_bound"] + 1e-12).all())
    assert data["full_l1_mass"].dims == ("head", "row")
    assert data.attrs["peak_bytes"] > 0
    sampled = [row for row in table if int(row["rows"]) < LENGTH]
    assert {row["system"] for row in sampled} == {"full", "softmax"}
    assert all(float(row["standard_error"]) >= 0 for row in table)
    assert any(float(row["standard_error"]) > 0 for row in sampled)


def test_every_row_of_the_full_map_and_of_softmax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--exact: the sampled numbers among those of all rows, nothing estimated."""
    (tmp_path / "some").mkdir()
    some, _ = run(tmp_path / "some", monkeypatch)
    data, table = run(tmp_path, monkeypatch, "--exact")
    assert all(int(row["rows"]) == LENGTH for row in table)
    for name in ("full_l1_mass", "full_negative_count_share", "softmax_entropy",
                 "softmax_scaled_spread"):  # fmt: skip
        every = data[name].values[:, some["row"].values]
        np.testing.assert_allclose(every[:, 1:], some[name].values[:, 1:], rtol=0, atol=1e-10)
    assert bool((data["full_l1_mass"] <= data["radial_mass_bound"] + 1e-12).all())
