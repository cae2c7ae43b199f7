"""The shape annotations of the whole package, the innermost modules too, against the laws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAWS = ("transitions", "recurrence", "scanning", "maps", "algebra", "wrappers", "factors",
        "softmax_rows")  # fmt: skip


@pytest.mark.slow
def test_every_annotation_holds_while_the_laws_run():
    """In a process of its own: torch.compile cannot trace a function that is checked."""
    here = Path(__file__).parent
    command = [
        sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", "-x",
        "--jaxtyping-packages=dsf,beartype.beartype",
        "-m", "not slow", "-k", "not compile and not derivatives and not differentiable",
        *(str(here / f"test_{name}.py") for name in LAWS),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=here.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "HYPOTHESIS_PROFILE": "few"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_annotations_are_checked_in_this_run():
    """The option in pyproject.toml is at work: a wrong shape is caught by the checker."""
    import torch
    from jaxtyping import TypeCheckError
    from structures import recurrence

    import dsf

    with pytest.raises(TypeCheckError):
        dsf.change_of_basis(recurrence("diagonal"), torch.ones(3, dtype=torch.int64))
