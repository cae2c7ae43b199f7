"""The judge of the kernels: what counts as an error, and that nothing undefined passes."""

import math

import pytest
import torch
from dsf_kernels.reference import error_units, row_units

LEAST = 2.0**-24  # the least number of fp16


def scan(error=0.0, factor=1.0):
    """x -> (factor x + error, 0) in the type of x."""

    def run(x):
        return (factor * x.double() + error).to(x.dtype), 0 * x

    return run


@pytest.mark.parametrize("judge", [error_units, row_units])
@pytest.mark.parametrize(
    ("dtype", "factor", "error", "passes"),
    [
        (torch.float16, 1e-9, 0.0, True),  # rounds to 0, and can only
        (torch.float16, 1.0, LEAST * 4, True),  # less than half an ulp of 1
        (torch.float16, 1e-5, LEAST, False),  # a whole step of the subnormals
        (torch.float16, 1.0, 2.0**-9, False),
        (torch.bfloat16, 1e-9, 0.0, True),
        (torch.float32, 1e-9, 1e-12, False),
    ],
)
def test_half_an_ulp_is_that_of_subnormals_too(judge, dtype, factor, error, passes):
    given = {"x": torch.ones(3, dtype=dtype)}
    found = judge(scan(error, factor), scan(0.0, factor), given, unit=2.0**-24)
    assert (found["output"] == 0.0) is passes


@pytest.mark.parametrize("judge", [error_units, row_units])
@pytest.mark.parametrize("kernel", [0.0, math.nan])
@pytest.mark.parametrize("reference", [math.nan, math.inf])
def test_what_is_not_finite_fails(judge, kernel, reference):
    found = judge(scan(kernel), scan(reference), {"x": torch.ones(3)})
    assert found["output"] == math.inf
