"""diagonal_scan against its float64 loop: in Triton's interpreter (a child process), on the GPU,
and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
SMALL = {"T": 4, "S": 2, "C": 4}


def decay_families(length: int) -> dict[str, torch.Tensor]:
    """The ten real decay families of the house rules, each (length, 1)."""
    step = torch.arange(length)[:, None]
    return kernel_laws.decay_families(length) | {
        "negative": torch.full((length, 1), -0.9),
        "alternating sign": torch.where(step % 2 == 0, 0.95, -0.95),
    }


def tensors(length, width=5, dtype=torch.float32, decay=None, initial=True, batch=1):
    generator = torch.Generator().manual_seed(length + width)
    shape = (batch, length, width)
    if decay is None:
        decay = torch.rand(shape, generator=generator) * 2 - 1
    else:
        decay = decay[None].expand(shape)
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
    logs = {"decay"} if options.get("log") else set()
    moved = kernel_laws.moved(arguments, device)
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
    parts = kernel_laws.scan_in_two(module.diagonal_scan, arguments, 8)
    found["split"] = all(map(torch.equal, parts, (states, final)))
    total, end = module.diagonal_summary(arguments["decay"], arguments["inputs"])
    found["summary"] = float((total * arguments["initial_state"] + end - final).abs().max())
    torch.library.opcheck(torch.ops.dsf.diagonal_scan, (*tensors(3).values(), False),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a tile's edge and the summary; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert found.pop("summary") < 1e-5
    assert set(found) == set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.diagonal_scan import diagonal_scan

    ones = torch.ones(1, 2, 3)
    message = "decay: expected float32, bfloat16 or float16"
    kernel_laws.refuses(diagonal_scan, {"decay": ones, "inputs": ones}, TypeError, message,
                        decay=ones.double())  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["scan_kernel", "adjoint_kernel"])
def test_compiles_ahead_of_time(kernel, architecture, record_property):
    module = importlib.import_module("dsf_kernels.diagonal_scan")
    tile = dict(module.FORWARD if kernel == "scan_kernel" else module.ADJOINT)
    options = {k: tile.pop(k) for k in ("num_warps", "maxnreg") if k in tile}
    fixed = tile | {"V": 1, "FULL": True, "LOG": False, "STORE": True, "table": None}
    kernel = getattr(module, kernel)
    pointers = {"carry": "*i32", "ticket": "*i32"}
    floats = ("decay", "inputs", "initial", "states", "final", "grads", "grad_final",
              "grad_decay", "grad_inputs", "grad_initial")  # fmt: skip
    pointers |= dict.fromkeys(floats, "*fp32")
    kernel_laws.build(kernel, architecture, pointers, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.diagonal_scan import diagonal_scan

    arguments = tensors(3000, 320, torch.bfloat16, batch=4)
    kernel_laws.repeats_and_rows_stand_alone(diagonal_scan, arguments, compared=1)


@kernel_laws.on_gpu
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
