"""Released numbers that belong to no model of their own, and that no file of them lies unused."""

from pathlib import Path

import pytest
import torch
from golden_vectors import assert_golden, golden

import dsf
from dsf.models.mamba2 import ssd_recurrence
from dsf.transitions import Diagonal

HERE = Path(__file__).parent
BACKENDS = ("reference", "auto")


def test_every_file_is_read_by_a_test():
    text = "\n".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    files = sorted(path.stem for path in (HERE / "golden").glob("*.npz"))
    assert len(files) > 40
    assert [name for name in files if f'"{name}"' not in text] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_first_order_scan(backend):
    """accelerated_scan: x_t = a_t x_(t-1) + b_t, forwards and backwards."""
    case = golden("accelerated_scan")
    gates, tokens = (case[f"in.{name}"].mT[..., None] for name in ("gates", "tokens"))
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    r = dsf.Recurrence(Diagonal(gates.abs().log(), gates.sign()), one, one)
    assert_golden(dsf.scan(r, tokens, backend)[..., 0].mT, case["out.x"])
    back = dsf.scan(dsf.anticausal(r), tokens, backend)
    assert_golden(back[..., 0].mT, case["out.x_reverse"])


@pytest.mark.parametrize("end", ["", "_with_initial_state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_scalar_gated_linear_attention(end, backend):
    """fla_simple_gla is Mamba-2's system with keys for B, scaled queries for C, decays given."""
    case = golden("fla_simple_gla")
    q, k, v, log_decay = (case[f"in.{name}"] for name in ("q", "k", "v", "g"))
    start = case["in.initial_state"] if end else None
    r = ssd_recurrence(log_decay, k, q * q.shape[-1] ** -0.5, initial_state=start)
    y, state = dsf.scan(r, v, backend, return_state=True)
    assert_golden(y, case["out.o" + end])
    assert_golden(state, case["out.final_state" + end])
    if not end:
        assert_golden(dsf.materialise(r), case["weights"])
