"""The page on how to add a model, followed word for word in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("dsf", "pyproject.toml", "README.md", "tests/model_laws.py", "tests/test_models.py",
          "analyses/systems_table.py")  # fmt: skip
BLOCK = re.compile(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```|```sh\n(.*?)```", re.DOTALL)
"""A Python block after the name of its file, or commands."""


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One line of a block of commands, on the copy rather than on the installed package."""
    program, *rest = command.split()
    assert program == "python", command
    return subprocess.run(
        [sys.executable, *rest], cwd=folder, capture_output=True, text=True, check=False,
        timeout=300, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_the_page_works_word_for_word(tmp_path: Path) -> None:
    for name in COPIED:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    page = (ROOT / "docs" / "howto" / "model.md").read_text(encoding="utf-8")
    written, commands = [], []
    for path, code, lines in BLOCK.findall(page):
        if path:
            assert not (tmp_path / path).exists(), "one new file, and no edit elsewhere"
            (tmp_path / path).write_text(code, encoding="utf-8")
            written.append(path)
        for command in filter(None, lines.splitlines()):
            done = run(command, tmp_path)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            commands.append((command, done.stdout))
    assert written == ["dsf/models/leaky_sum.py", "tests/test_leaky_sum.py"]
    assert len(commands) == page.count("\npython ") == 2
    laws = commands[0][1]
    assert "passed" in laws
    assert "failed" not in laws
    row = "| `leaky_sum` | diag a | 1 | 1 | 0 | diagonal | 1 × 1 | none | yes | an example |"
    assert row in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert row not in (ROOT / "README.md").read_text(encoding="utf-8")
