"""What `dsf bench` is made of, as far as it goes without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dsf_kernels.bench import Case, Work, timing


def test_every_family_has_named_cases_and_one_for_any_shape():
    assert {"diagonal", "scalar_decay"} <= set(timing.families())
    assert len(timing.cases()) >= len(timing.families())
    assert set(timing.cases("a bf16")) == {"a bf16 8 x 8192 x 2048", "a bf16 1 x 65536 x 2048"}


def test_settings_are_numbers_types_and_words():
    with pytest.raises(ValueError, match=r"missing .'width'., unknown .'wdth'."):
        timing.case_of("diagonal", {"dtype": "bf16", "batch": "1", "length": "8", "wdth": "4"})
    with pytest.raises(ValueError, match=r"family: expected one of .*diagonal.*, got 'x'"):
        timing.case_of("x", {})
    made = timing.case_of("diagonal", dict(dtype="bf16", batch="1", length="8", width="4"))
    assert made.keywords == {"dtype": torch.bfloat16, "batch": 1, "length": 8, "width": 4}


def test_the_floor_is_the_slowest_of_the_three(monkeypatch):
    monkeypatch.setitem(timing.COPY_RATE, "here", 1e12)
    assert timing.floor(Work(1e9, 0), "here") == pytest.approx(1.0)
    assert timing.floor(Work(1e9, 7.9e12), "here") == pytest.approx(10.0)
    assert timing.floor(Work(0, 0, 4.2e12), "here") == pytest.approx(1000.0)


@pytest.mark.parametrize(("shift", "worst"), [(0.0, 0.0), (0.5, 2.0**23)])
def test_errors_are_in_units_of_the_sum_of_absolute_values(shift, worst):
    case = Case(lambda x: x + shift, (), Work(0, 0), Work(0, 0), lambda x: x, (torch.ones(3),), {})
    assert timing.worst_units(case) == pytest.approx(worst, abs=1.0)


def test_units_are_of_the_bound_where_the_loop_subtracts():
    def case(bound):
        return Case(lambda x: 0 * x + 2.0**-24, (), Work(0, 0), Work(0, 0), lambda x: x - x,
                    (torch.ones(3),), {}, bound=bound)  # fmt: skip

    assert timing.worst_units(case(None)) == float("inf")
    assert timing.worst_units(case(lambda x: x + x)) == pytest.approx(0.5)


def test_a_table_holds_times_their_multiples_and_failures():
    row = {
        "case": "x", "name": "dsf", "floor": {"forward": 1.0, "both": 2.0}, "units": 0.5,
        "forward": {"eager": 1.5, "graph": 1.25}, "both": {"eager": "RuntimeError", "graph": 3.0},
    }  # fmt: skip
    assert timing.table([row]).splitlines()[-1] == (
        "| x | **dsf** | 1.000 / 2.000 | 1.500 (1.50) | 1.250 (1.25) | RuntimeError "
        "| 3.000 (1.50) | 0.50 |"
    )
