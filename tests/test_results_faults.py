"""Result files when writers die or crowd: kills, orphans, threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dsf import results
from dsf.result_files import temporary_name

pytest.importorskip("h5py", reason="the io extra")

N_KILLS = 20


WRITER = """
import sys, pathlib
import numpy as np, xarray as xr
from dsf import results
folder = pathlib.Path(sys.argv[1])
results.save(xr.Dataset(), folder / "warm.nc", overwrite=True)
for cell in range(10_000):
    path = folder / f"{cell}.nc"
    if results.completed(path):
        continue
    results.save(xr.Dataset({"x": ("key", np.full(20_000, cell))}), path, overwrite=True)
    with open(sys.argv[2], "a") as log:
        log.write(f"{cell}\\n")
"""


@pytest.mark.parametrize("kills", [N_KILLS, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing(tmp_path: Path, kills: int) -> None:
    """Kill at random times, restart, resume: what was acknowledged is there, whole, once."""
    folder, log = tmp_path / "cells", tmp_path / "log"
    folder.mkdir()
    log.touch()
    rng = np.random.default_rng(2)
    # one importing process forks the writers: starting Python anew would take all the time
    driver = f"""
import os, signal, sys, time
sys.argv = ["writer", {str(folder)!r}, {str(log)!r}]
code = compile({WRITER!r}, "writer", "exec")
import dsf.results, h5netcdf, h5py, xarray.backends.h5netcdf_
for wait in {rng.uniform(0.05, 0.25, kills).tolist()}:
    child = os.fork()
    if child == 0:
        exec(code, {{"__name__": "writer"}})
        os._exit(0)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-c", driver], check=True, timeout=600)
    acknowledged = [int(line) for line in log.read_text().split()]
    assert len(acknowledged) >= kills // 2
    assert len(set(acknowledged)) == len(acknowledged), "an acknowledged cell was computed again"
    assert all(results.completed(folder / f"{cell}.nc") for cell in acknowledged)
    for cell in acknowledged[::8]:
        assert (results.load(folder / f"{cell}.nc")["x"].values == cell).all()
    whole = [p for p in folder.iterdir() if p.suffix == ".nc"]
    assert all(results.completed(p) for p in whole)
    results.sweep_orphans(folder)
    assert {p.suffix for p in folder.iterdir()} == {".nc"}


def test_orphans_of_the_dead_are_swept_and_the_living_spared(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mine = temporary_name("a.nc")
    theirs = mine.replace(f"-{os.getpid()}-", f"-{child.pid}-")
    foreign = mine.replace(mine.split(".dsf-")[1][:8], "00000000").replace(
        f"-{os.getpid()}-", "-1-")  # fmt: skip
    for name in (mine, theirs, foreign, "note.tmp"):
        (tmp_path / name).touch()
    assert results.sweep_orphans(tmp_path) == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.name for p in results.sweep_orphans(tmp_path)] == [theirs]
    (tmp_path / theirs).touch()
    results.save(xr.Dataset({"x": 1}), tmp_path / "first.nc")
    assert not (tmp_path / theirs).exists()
    assert (tmp_path / mine).exists()
    assert (tmp_path / foreign).exists()


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(
            lambda i: results.save(xr.Dataset({"x": ("key", [i])}), tmp_path / f"{i}.nc"),
            range(24)))  # fmt: skip
    start = time.monotonic()
    assert [int(results.load(p)["x"][0]) for p in paths] == list(range(24))
    assert time.monotonic() - start < 60
