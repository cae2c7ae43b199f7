"""Which ptxas the kernels are compiled with: chosen, asked, and refused where it is too old."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dsf_kernels import compiler, launch
from triton import knobs

SOURCE = Path(compiler.__file__).parents[1]


def ptxas(folder: Path, version: str) -> Path:
    """A program that says what a ptxas of this version says."""
    tool = folder / "ptxas"
    tool.parent.mkdir(parents=True, exist_ok=True)
    release = ".".join(version.split(".")[:2])
    tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{version}'\n")
    tool.chmod(0o755)
    return tool


@pytest.fixture
def torch_carries(monkeypatch, tmp_path):
    """Make torch carry a ptxas of this version, the variable unset; gives its path."""

    def carry(version: str) -> Path:
        monkeypatch.setenv(compiler.VARIABLE, "x")  # so that it is taken back in the end
        monkeypatch.delenv(compiler.VARIABLE)
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
        return ptxas(tmp_path / "torch" / "bin", version)

    return carry


def test_the_newer_of_the_two_is_chosen(torch_carries):
    tool = torch_carries("99.1.2")
    compiler.choose()
    assert os.environ[compiler.VARIABLE] == str(tool)
    assert knobs.nvidia.ptxas.path == str(tool)


@pytest.mark.parametrize("version", ["1.9.88", "not a version"])
def test_an_older_one_is_left(torch_carries, version):
    torch_carries(version)
    compiler.choose()
    assert compiler.VARIABLE not in os.environ


def test_what_cannot_run_is_left(torch_carries):
    torch_carries("99.1.2").chmod(0o644)
    compiler.choose()
    assert compiler.VARIABLE not in os.environ


def test_the_choice_of_the_caller_stands(torch_carries, monkeypatch, tmp_path):
    torch_carries("99.1.2")
    own = ptxas(tmp_path / "own", "12.8.93")
    monkeypatch.setenv(compiler.VARIABLE, str(own))
    compiler.choose()
    assert os.environ[compiler.VARIABLE] == str(own)


def test_triton_asks_again_for_the_version_in_its_cache_keys(torch_carries):
    """A cubin of the new tool may not be kept under the name of the old."""
    backend = pytest.importorskip("triton.backends.nvidia.compiler")
    backend.get_ptxas_version.cache_clear()
    before = backend.get_ptxas_version(80)
    torch_carries("99.1.2")
    compiler.choose()
    try:
        after = backend.get_ptxas_version(80)
        assert "V99.1.2" in after
        assert "V99.1.2" not in before
    finally:
        backend.get_ptxas_version.cache_clear()


def test_importing_chooses(tmp_path):
    """In a new process, with Triton imported before; the version follows the variable."""
    code = (
        "import os, sys, torch, triton; torch.__file__ = sys.argv[1] + '/__init__.py'\n"
        "from dsf_kernels import launch, compiler\n"
        "used = triton.knobs.nvidia.ptxas.path\n"
        "print(os.environ['TRITON_PTXAS_PATH'], compiler.version_of(used))"
    )
    tool = ptxas(tmp_path / "bin", "99.1.2")
    environment = {k: v for k, v in os.environ.items() if k != compiler.VARIABLE}
    environment["PYTHONPATH"] = str(SOURCE)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                         text=True, env=environment, timeout=120)  # fmt: skip
    assert run.stdout.split() == [str(tool), "99.1.2"], run.stderr


@pytest.mark.parametrize(
    ("version", "sound"),
    [("12.8.93", False), ("12.9.86", True), ("12.10", True), ("13.0.88", True), ("", False)],
)
def test_sound_from_12_9(monkeypatch, version, sound):
    monkeypatch.setattr(compiler, "ptxas_version", lambda: version)
    assert compiler.sound() is sound


def test_the_version_is_that_of_the_tool_that_triton_takes(monkeypatch, tmp_path):
    backend = pytest.importorskip("triton.backends.nvidia.compiler")
    tool = str(ptxas(tmp_path, "12.8.93"))
    monkeypatch.setattr(
        backend, "get_ptxas", lambda arch: knobs.NvidiaTool(os.environ[compiler.VARIABLE], "1.1")
    )
    for path, version in {tool: "12.8.93", "/no/where": ""}.items():
        monkeypatch.setenv(compiler.VARIABLE, path)
        assert compiler.ptxas_version() == version
    compiler._version_under.cache_clear()


def test_an_old_compiler_is_refused_with_the_way_out(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    tensor = torch.zeros(2, 3, dtype=torch.bfloat16).as_subclass(OnGpu)
    monkeypatch.setattr(compiler, "ptxas_version", lambda: "12.8.93")
    launch.refuse_miscompiled("scan", tensor, affected=False)
    launch.refuse_miscompiled("scan", torch.zeros(2), affected=True)
    with pytest.raises(NotImplementedError, match=r"ptxas 12\.9 or newer, got 12\.8\.93.*Set TRI"):
        launch.refuse_miscompiled("scan", tensor, affected=True)
    monkeypatch.setattr(compiler, "ptxas_version", lambda: "13.0.88")
    launch.refuse_miscompiled("scan", tensor, affected=True)


def test_under_torch_compile_it_is_asked_when_tracing(monkeypatch):
    monkeypatch.setattr(compiler, "ptxas_version", lambda: "13.0.88")

    def double(x):
        return 2 * x if compiler.sound() else x

    run = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
