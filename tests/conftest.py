"""What every test starts from: fixed seeds, one thread, no window, the same examples each time."""

from __future__ import annotations

import os

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

mpl.use("Agg")

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100, database=None)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.register_profile("few", parent=settings.get_profile("ci"), max_examples=8)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """Without the run-time shape checks: for wrong arguments on purpose, and for torch.compile.

    The checks would answer before dsf's own messages, and torch.compile cannot trace them.
    """
    try:
        from jaxtyping import config
    except ImportError:
        yield
        return
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)
