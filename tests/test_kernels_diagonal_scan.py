"""diagonal_scan against its float64 loop: in Triton's interpreter (a child process), on the GPU,
and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
KERNELS = Path(__file__).parents[1] / "kernels"
LIMIT = 16.0  # units
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL = {"T": 4, "S": 2, "C": 4}


def decay_families(length: int) -> dict[str, torch.Tensor]:
    """The ten real decay families of the house rules, each (length,)."""
    step = torch.arange(length)
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(0, 2, (length,), generator=generator).float()
    return {
        "one": torch.ones(length),
        "near one": torch.full((length,), 1 - 1e-6),
        "half": torch.full((length,), 0.5),
        "1e-30": torch.full((length,), 1e-30),
        "zero": torch.zeros(length),
        "bits": bits,
        "one and 1e-20": torch.where(step % 2 == 0, 1.0, 1e-20),
        "drops": torch.where(step % 5 == 3, 1e-12, 0.99),
        "negative": torch.full((length,), -0.9),
        "alternating sign": torch.where(step % 2 == 0, 0.95, -0.95),
    }


def tensors(length, width=5, dtype=torch.float32, decay=None, initial=True, batch=1):
    generator = torch.Generator().manual_seed(length + width)
    shape = (batch, length, width)
    if decay is None:
        decay = torch.rand(shape, generator=generator) * 2 - 1
    else:
        decay = decay[None, :, None].expand(shape)
    return {
        "decay": decay.to(dtype),
        "inputs": torch.randn(shape, generator=generator).to(dtype),
        "initial_state": torch.randn(batch, width, generator=generator) if initial else None,
    }


def cases(lengths, width, tile):
    """{name: (tensors, unit, options)}: lengths, decays, types, layouts."""
    found = {}
    for length in lengths:
        found[f"length {length}"] = (tensors(length, width), torch.float32, {})
    for name, decay in decay_families(tile + 1).items():
        found[f"decay {name}"] = (tensors(tile + 1, 1, decay=decay, batch=1), torch.float32, {})
    for dtype in (torch.bfloat16, torch.float16):
        for size in (width, 2 * SMALL["C"]):
            arguments = tensors(tile + 1, size, dtype, batch=1)
            found[f"{dtype} width {size}"] = (arguments, dtype, {})
    found["no initial state"] = (tensors(tile + 2, initial=False, batch=2), torch.float32, {})
    logs = tensors(tile + 1)
    logs["decay"] = -torch.rand(logs["decay"].shape) * 3
    logs["decay"][:, 2] = -torch.inf
    found["log"] = (logs, torch.float32, {"log": True})
    strided = tensors(tile + 1, batch=2)
    strided["inputs"] = strided["inputs"].mT.contiguous().mT
    strided["decay"] = torch.randn(2, 2 * tile + 9, 9)[:, 3 : 2 * tile + 4 : 2, 2:7]
    found["strided"] = (strided, torch.float32, {})
    shared = tensors(tile + 1)
    shared["decay"] = shared["decay"][:, :1, :1]
    found["decay of size 1"] = (shared, torch.float32, {})
    return found


def measure(case, device="cpu"):
    from dsf_kernels.diagonal_scan import diagonal_scan
    from dsf_kernels.reference import diagonal_scan_reference, error_units

    arguments, dtype, options = case
    moved = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    logs = {"decay"} if options.get("log") else set()
    return error_units(diagonal_scan, diagonal_scan_reference, moved, logs, unit=UNIT[dtype],
                       **options)  # fmt: skip


INTERPRETED = cases((0, 1, 2, 7, 8, 9, 17), 5, 8)
ON_GPU = cases((0, 1, 2, 127, 128, 129, 511, 1021), 67, 256)


def interpret():
    """Errors of every interpreted case, the split and the summary, in this process."""
    module = importlib.import_module("dsf_kernels.diagonal_scan")
    for tile in (module.FORWARD, module.ADJOINT, module.FORWARD_16, module.ADJOINT_16):
        tile.clear()
        tile.update(SMALL)
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    arguments = tensors(20)
    states, final = module.diagonal_scan(**arguments)
    head, middle = module.diagonal_scan(
        arguments["decay"][:, :8], arguments["inputs"][:, :8], arguments["initial_state"]
    )
    tail, end = module.diagonal_scan(arguments["decay"][:, 8:], arguments["inputs"][:, 8:], middle)
    found["split"] = bool(torch.equal(torch.cat([head, tail], 1), states) and (end == final).all())
    total, end = module.diagonal_summary(arguments["decay"], arguments["inputs"])
    found["summary"] = float((total * arguments["initial_state"] + end - final).abs().max())
    torch.library.opcheck(torch.ops.dsf.diagonal_scan, (*tensors(3).values(), False),
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
    assert set(found) == set(INTERPRETED)
    wrong = {name: units for name, units in found.items() if max(units.values()) > LIMIT}
    assert not wrong, wrong


def test_messages():
    from dsf_kernels.diagonal_scan import diagonal_scan

    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        diagonal_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    with pytest.raises(TypeError, match="decay: expected float32, bfloat16 or float16"):
        diagonal_scan(torch.ones(1, 2, 3).double(), torch.ones(1, 2, 3))


def resources(built) -> str:
    """Registers, stack (spills) and shared memory of a compiled kernel, as its assembler says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "not known: this Triton carries no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", run.stdout))


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["_scan_kernel", "_adjoint_kernel"])
def test_compiles_ahead_of_time(kernel, architecture, record_property):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module("dsf_kernels.diagonal_scan")
    tile = dict(module.FORWARD if kernel == "_scan_kernel" else module.ADJOINT)
    options = {k: tile.pop(k) for k in ("num_warps", "maxnreg") if k in tile}
    fixed = tile | {"V": 1, "FULL": True, "LOG": False, "STORE": True}
    kernel = getattr(module, kernel)
    pointers = {"carry": "*i32", "ticket": "*i32"}
    floats = ("decay", "inputs", "initial", "states", "final", "grads", "grad_final",
              "grad_decay", "grad_inputs", "grad_initial")  # fmt: skip
    pointers |= dict.fromkeys(floats, "*fp32")
    signature = {
        name: "constexpr" if name in fixed else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    fixed = {name: value for name, value in fixed.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    record_property("resources", resources(built))
    assert built.asm["cubin"]


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@CUDA
@pytest.mark.gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.diagonal_scan import diagonal_scan

    arguments = {k: v.cuda() for k, v in tensors(3000, 320, torch.bfloat16, batch=4).items()}
    states, final = diagonal_scan(**arguments)
    for _ in range(100):
        again, _ = diagonal_scan(**arguments)
        assert torch.equal(again, states)
    alone, end = diagonal_scan(**{k: v[2:3] for k, v in arguments.items()})
    assert torch.equal(alone[0], states[2])
    assert torch.equal(end[0], final[2])


@CUDA
@pytest.mark.gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.diagonal_scan import diagonal_scan

    decay = torch.rand(1, 1_048_576, 8, device="cuda")
    states, final = diagonal_scan(decay, torch.ones_like(decay))
    assert torch.isfinite(states).all()
    assert torch.equal(states[:, -1], final)
    arguments = [v.cuda() for v in tensors(300, 64).values()]
    torch.library.opcheck(torch.ops.dsf.diagonal_scan, (*arguments, False))


if __name__ == "__main__":
    interpret()
