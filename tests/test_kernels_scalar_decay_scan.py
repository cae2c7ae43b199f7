"""scalar_decay_scan against its float64 loop: in Triton's interpreter (a child process), on the
GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import functools
import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units


tensors = kernel_laws.matrix_states
cases = functools.partial(kernel_laws.matrix_state_cases, tensors)


FORMS = {  # what the launch module's constants are in each form
    "walk": {"SHORT": 0, "FEW": 0},
    "short": {"SHORT": 1024, "FEW": 0},
    "split": {"SHORT": 0, "FEW": 8, "SEGMENT": 1},
}


def measure(case, device="cpu", form="walk", constant=False):
    """Errors in units, with the rows walked in time, side by side, or split in segments.

    constant: the log decay needs no gradient, which has kernels of its own.
    """
    from dsf_kernels.reference import error_units, scalar_decay_scan_reference
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    arguments, dtype = case
    moved = kernel_laws.moved(arguments, device)
    functions = [scalar_decay_scan, scalar_decay_scan_reference]
    if constant:
        decay = moved.pop("log_decay")
        functions = [functools.partial(function, log_decay=decay) for function in functions]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FORMS[form].items():
            patch.setattr(launch, name, value)
        return error_units(*functions, moved, {"log_decay"}, unit=UNIT[dtype], scale=0.5)


INTERPRETED = cases((0, 1, 2, 16, 17, 33), 16, [(1, 3), (17, 1), (3, 20)])
ON_GPU = cases((0, 1, 2, 31, 32, 33, 257), 64, [(1, 3), (16, 100), (128, 60), (256, 256)]) | {
    f"{dtype} length {length} decay {decay}": (
        tensors(length, 4, 2, 128, 64, dtype, decay, batch=2), dtype,
    )
    for dtype in (torch.bfloat16, torch.float16)
    for length in (63, 64, 65, 509)
    for decay in ("token", "head", None)
} | {
    f"torch.bfloat16 decay {name}": (
        tensors(193, 2, 1, 64, 128, torch.bfloat16, log), torch.bfloat16,
    )
    for name, log in kernel_laws.log_decay_families(193).items()
}  # fmt: skip


AGAIN = ("length 33", "decay -100 a step", "strided")
CONSTANT = ("decay of a head",)


def interpret():
    """Errors of every interpreted case, the split and the summary, in this process."""
    module = importlib.import_module("dsf_kernels.scalar_decay_scan")
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    launch.CHUNK, launch.SLAB = 32, 16  # 16 steps a chunk, as products are exact here
    found = {f"{name}, serial": measure(INTERPRETED[name]) for name in AGAIN}
    module.PARALLEL = (torch.float32, torch.float16, torch.bfloat16)
    found |= {name: measure(case) for name, case in INTERPRETED.items()}
    found["constant"] = measure(INTERPRETED["decay bits"], constant=True)
    for form in ("short", "split"):
        found |= {f"{name}, {form}": measure(INTERPRETED[name], form=form) for name in AGAIN}
        found |= {f"{name}, {form}, constant": measure(INTERPRETED[name], form=form, constant=True)
                  for name in CONSTANT}  # fmt: skip
    launch.SHORT = 0
    arguments = tensors(21)
    output, final = module.scalar_decay_scan(**arguments)
    parts = kernel_laws.scan_in_two(module.scalar_decay_scan, arguments, 16)
    found["split"] = all(map(torch.equal, parts, (output, final)))
    summarised = [arguments[name] for name in ("key", "value", "log_decay")]
    total, end = module.scalar_decay_summary(*summarised)
    again = total.exp()[..., None, None] * arguments["initial_state"] + end
    found["summary"] = float((again - final).abs().max())
    torch.library.opcheck(torch.ops.dsf.scalar_decay_scan, (*tensors(3).values(), 1.0),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a tile's edge and the summary; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert found.pop("summary") < 1e-5
    assert set(found) > set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    message = "scale: expected a finite nonzero number, got 0"
    kernel_laws.refuses(scalar_decay_scan, tensors(3), ValueError, message, scale=0)


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name, form):
    units = measure(ON_GPU[name], "cuda", form)
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in ON_GPU if "decay" in name])
def test_gpu_matches_loop_under_constant_decays(name, form):
    units = measure(ON_GPU[name], "cuda", form, constant=True)
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, batch=4)
    kernel_laws.repeats_and_rows_stand_alone(scalar_decay_scan, arguments, compared=1)


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    rows = torch.randn(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    output, _ = scalar_decay_scan(rows, rows, rows, torch.full((1,), -0.01, device="cuda"))
    assert torch.isfinite(output).all()
    arguments = [v.cuda() for v in tensors(70, dtype=torch.bfloat16).values()]
    torch.library.opcheck(torch.ops.dsf.scalar_decay_scan, (*arguments, 1.0))


if __name__ == "__main__":
    interpret()
