"""scalar_decay_scan against its float64 loop: in Triton's interpreter (a child process), on the
GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
KERNELS = Path(__file__).parents[1] / "kernels"
LIMIT = 16.0  # units
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def log_decay_families(length: int) -> dict[str, torch.Tensor]:
    """The decay families of the house rules that a positive decay can hold, as logs (length,)."""
    step = torch.arange(length)
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(0, 2, (length,), generator=generator).float()
    decays = {
        "one": torch.ones(length),
        "near one": torch.full((length,), 1 - 1e-6),
        "half": torch.full((length,), 0.5),
        "1e-30": torch.full((length,), 1e-30),
        "zero": torch.zeros(length),
        "bits": bits,
        "one and 1e-20": torch.where(step % 2 == 0, 1.0, 1e-20),
        "drops": torch.where(step % 5 == 3, 1e-12, 0.99),
    }
    return {name: decay.log() for name, decay in decays.items()} | {
        "-100 a step": torch.full((length,), -100.0)
    }


def tensors(length, head=2, group=2, state=4, channel=4, dtype=torch.float32, decay="token",
            initial=True, batch=1):  # fmt: skip
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    log_decay = None
    if isinstance(decay, torch.Tensor):
        log_decay = decay[None, :, None].expand(batch, length, head)
    elif decay == "token":
        log_decay = -draw(batch, length, head).abs()
    elif decay == "head":
        log_decay = -draw(head).abs()
    return {
        "query": draw(batch, length, group, state).to(dtype),
        "key": draw(batch, length, group, state).to(dtype),
        "value": draw(batch, length, head, channel).to(dtype),
        "log_decay": log_decay,
        "initial_state": draw(batch, head, state, channel) if initial else None,
    }


def cases(lengths, chunk, widths, **sizes):
    """{name: (tensors, type)}: lengths, decays, widths, groups, layouts."""
    found = {f"length {length}": (tensors(length, **sizes), torch.float32) for length in lengths}
    for name, log_decay in log_decay_families(chunk + 3).items():
        found[f"decay {name}"] = (tensors(chunk + 3, decay=log_decay), torch.float32)
    for state, channel in widths:
        arguments = tensors(chunk + 1, 2, 1, state, channel)
        found[f"state {state} channel {channel}"] = (arguments, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"{dtype}"] = (tensors(chunk + 1, dtype=dtype, **sizes), dtype)
    found["no decay, no initial state"] = (
        tensors(chunk + 1, decay=None, initial=False), torch.float32,
    )  # fmt: skip
    found["decay of a head"] = (tensors(chunk + 1, decay="head"), torch.float32)
    strided = tensors(chunk + 1)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["value"] = torch.randn(1, 2, 2 * chunk + 4, 9)[:, :, 1 : 2 * chunk + 3 : 2, 3:7].mT.mT
    strided["value"] = strided["value"].transpose(1, 2)
    found["strided"] = (strided, torch.float32)
    return found


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
    moved = {k: v if v is None else v.to(device) for k, v in arguments.items()}
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
    for name, log in log_decay_families(193).items()
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
    parts = [{k: v if k == "initial_state" else v[:, rows] for k, v in arguments.items()}
             for rows in (slice(0, 16), slice(16, None))]  # fmt: skip
    head, middle = module.scalar_decay_scan(**parts[0])
    tail, end = module.scalar_decay_scan(**parts[1] | {"initial_state": middle})
    found["split"] = bool(torch.equal(torch.cat([head, tail], 1), output) and (end == final).all())
    summarised = [arguments[name] for name in ("key", "value", "log_decay")]
    total, end = module.scalar_decay_summary(*summarised)
    again = total.exp()[..., None, None] * arguments["initial_state"] + end
    found["summary"] = float((again - final).abs().max())
    torch.library.opcheck(torch.ops.dsf.scalar_decay_scan, (*tensors(3).values(), 1.0),
                          test_utils=("test_schema", "test_autograd_registration",
                                      "test_faketensor"))  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a tile's edge and the summary; all are judged."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(KERNELS)
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                         env=environment, timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("split")
    assert found.pop("summary") < 1e-5
    assert set(found) > set(INTERPRETED)
    wrong = {name: units for name, units in found.items() if max(units.values()) > LIMIT}
    assert not wrong, wrong


def test_messages():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    arguments = tensors(3)
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        scalar_decay_scan(**arguments)
    with pytest.raises(ValueError, match="scale: expected a finite nonzero number, got 0"):
        scalar_decay_scan(**arguments, scale=0)


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name, form):
    units = measure(ON_GPU[name], "cuda", form)
    assert max(units.values()) <= LIMIT, units


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in ON_GPU if "decay" in name])
def test_gpu_matches_loop_under_constant_decays(name, form):
    units = measure(ON_GPU[name], "cuda", form, constant=True)
    assert max(units.values()) <= LIMIT, units


@CUDA
@pytest.mark.gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, batch=4)
    arguments = {k: v.cuda() for k, v in arguments.items()}
    output, final = scalar_decay_scan(**arguments)
    for _ in range(100):
        assert torch.equal(scalar_decay_scan(**arguments)[0], output)
    alone, end = scalar_decay_scan(**{k: v[2:3] for k, v in arguments.items()})
    assert torch.equal(alone[0], output[2])
    assert torch.equal(end[0], final[2])


@CUDA
@pytest.mark.gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    rows = torch.randn(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    output, _ = scalar_decay_scan(rows, rows, rows, torch.full((1,), -0.01, device="cuda"))
    assert torch.isfinite(output).all()
    arguments = [v.cuda() for v in tensors(70, dtype=torch.bfloat16).values()]
    torch.library.opcheck(torch.ops.dsf.scalar_decay_scan, (*arguments, 1.0))


if __name__ == "__main__":
    interpret()
