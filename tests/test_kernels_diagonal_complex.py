"""complex_diagonal_scan against its loop in complex128: in Triton's interpreter (a child process),
on the GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors."""

import importlib
import json
import math

import kernel_laws
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units of 2^-24 times the scan of moduli
SMALL = {"T": 2, "S": 4, "C": 4}


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def tensors(length, width=5, batch=1, modulus=None, phase=None, initial=True):
    """Moduli from e^-1 to 1 and any phase, unless given as (length, 1)."""
    generator = torch.Generator().manual_seed(length + width)
    shape = (batch, length, width)
    log_modulus, angle = (torch.rand(shape, generator=generator) for _ in range(2))
    log_modulus = -log_modulus if modulus is None else modulus.log().expand(shape)
    angle = (2 * angle - 1) * math.pi if phase is None else phase.expand(shape)
    return {
        "log_modulus": log_modulus,
        "phase": angle,
        "inputs": draw(*shape, seed=length),
        "initial_state": draw(batch, width, seed=1) if initial else None,
    }


def cases(lengths, width, tile):
    """{name: arguments}: lengths, moduli and phases, layouts."""
    found = {f"length {length}": tensors(length, width) for length in lengths}
    found["whole tiles"] = tensors(2 * tile, 64 if width > 64 else 4)
    for name, modulus in kernel_laws.decay_families(tile + 1).items():
        found[f"modulus {name}"] = tensors(tile + 1, 2, modulus=modulus)
    ones = torch.ones(tile + 1, 1)
    for phase in (1e-3, math.pi / 4, -math.pi / 2, 100.0):
        found[f"unit circle {phase:.3g}"] = tensors(tile + 1, 2, modulus=ones, phase=phase * ones)
    found["no initial state"] = tensors(tile + 2, batch=2, initial=False)
    strided = tensors(tile + 1, batch=2)
    strided["inputs"] = strided["inputs"].mT.contiguous().mT.conj()
    strided["phase"] = torch.randn(2, 2 * tile + 9, 9)[:, 3 : 2 * tile + 4 : 2, 2:7]
    strided["log_modulus"] = -torch.rand(2, 5, tile + 1).mT
    strided["initial_state"] = draw(5, 2, seed=2).mT
    found["strided"] = strided
    found["constant decay"] = tensors(tile + 1) | {
        "log_modulus": -torch.rand(1, 1, 5), "phase": torch.randn(1, 1, 1),
    }  # fmt: skip
    return found


def run(scan, arguments, grads):
    """Outputs and gradients by name."""
    leaves = {
        k: v.detach().clone().requires_grad_() for k, v in arguments.items() if v is not None
    }
    outputs = scan(**arguments | leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    gradients = {
        f"grad {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {"states": outputs[0].detach(), "final": outputs[1].detach()} | gradients


def measure(arguments: dict, device="cpu"):
    """Largest |error| / (2^-24 M) of outputs and gradients; M: the same loop on moduli."""
    from dsf_kernels.diagonal_complex import complex_diagonal_scan
    from dsf_kernels.reference import complex_diagonal_scan_reference

    arguments = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    batch, length, width = arguments["inputs"].shape
    grads = [draw(batch, length, width, seed=3), draw(batch, width, seed=4)]
    grads = [g.to(device) for g in grads]
    found = run(complex_diagonal_scan, arguments, grads)
    exact: dict = {
        k: v if v is None or not v.is_complex() else v.to(torch.complex128)
        for k, v in arguments.items()
    }
    truth = run(complex_diagonal_scan_reference, exact, [g.to(torch.complex128) for g in grads])
    moduli = {k: v if v is None or not v.is_complex() else v.abs() + 0j for k, v in exact.items()}
    sizes = [g.to(torch.complex128).abs() + 0j for g in grads]
    most = run(complex_diagonal_scan_reference,
               moduli | {"phase": torch.zeros_like(exact["phase"])}, sizes)  # fmt: skip
    most["grad phase"] = most["grad log_modulus"]
    if most["grad phase"].shape != truth["grad phase"].shape:
        most["grad phase"] = most["grad log_modulus"].sum()
    units = {}
    for name, value in found.items():
        error = (value - truth[name]).abs().double() - 2.0**-120
        ratio = torch.where(error > 0, error / (2.0**-24 * most[name].abs()), 0.0)
        ratio = torch.where(torch.isfinite(value.abs()), ratio, math.inf)
        units[name] = float(ratio.max()) if ratio.numel() else 0.0
    return units


INTERPRETED = cases((0, 1, 2, 7, 8, 9), 5, 8)
for slow in ("modulus near one", "modulus half", "modulus 1e-30"):
    del INTERPRETED[slow]
ON_GPU = cases((0, 1, 2, 63, 64, 65, 127, 128, 129, 509), 67, 128)


def interpret():
    """Errors of every interpreted case, and the split, in this process."""
    module = importlib.import_module("dsf_kernels.diagonal_complex")
    for tile in (module.FORWARD, module.ADJOINT):
        tile.clear()
        tile.update(SMALL)
    found: dict = {name: measure(case) for name, case in INTERPRETED.items()}
    arguments = tensors(11)
    whole = module.complex_diagonal_scan(**arguments)
    parts = kernel_laws.scan_in_two(module.complex_diagonal_scan, arguments, 8)
    found["split"] = all(map(torch.equal, parts, whole))
    torch.library.opcheck(torch.ops.dsf.complex_diagonal_scan, tuple(tensors(3).values()),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case and a split on a tile's edge; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert set(found) == set(INTERPRETED)
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.diagonal_complex import complex_diagonal_scan

    arguments = tensors(3)
    message = "inputs: expected torch.complex64, got torch.complex128"
    kernel_laws.refuses(complex_diagonal_scan, arguments, TypeError, message,
                        inputs=arguments["inputs"].to(torch.complex128))  # fmt: skip


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("kernel", ["_scan_kernel", "_adjoint_kernel"])
def test_compiles_ahead_of_time(kernel, architecture, record_property):
    module = importlib.import_module("dsf_kernels.diagonal_complex")
    tile = dict(module.FORWARD if kernel == "_scan_kernel" else module.ADJOINT)
    options = {k: tile.pop(k) for k in ("num_warps", "maxnreg") if k in tile}
    tile |= {"FULL": True, "table": None}
    built = compiled(getattr(module, kernel), tile, options, architecture, record_property)
    assert built.metadata.shared <= 227 * 1024


def compiled(kernel, fixed, options, architecture, record_property):
    pointers = {"carry": "*i32", "ticket": "*i32"}
    floats = (
        "log_modulus", "phase", "inputs", "initial", "states", "final", "grads", "grad_final",
        "grad_modulus", "grad_phase", "grad_inputs", "grad_initial",
    )  # fmt: skip
    pointers |= dict.fromkeys(floats, "*fp32")
    return kernel_laws.build(kernel, architecture, pointers, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.diagonal_complex import complex_diagonal_scan

    scan = kernel_laws.with_gradients(complex_diagonal_scan, term=torch.abs)
    kernel_laws.repeats_and_rows_stand_alone(scan, tensors(3000, 320, 4))


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.diagonal_complex import complex_diagonal_scan

    log_modulus = torch.zeros(1, 1_048_576, 8, device="cuda")
    inputs = torch.ones_like(log_modulus) + 0j
    states, final = complex_diagonal_scan(log_modulus, torch.ones_like(log_modulus), inputs)
    assert torch.isfinite(states.abs()).all()
    torch.testing.assert_close(states[:, -1], final)  # rounded in another order
    arguments = tuple(v.cuda() for v in tensors(300, 64).values())
    torch.library.opcheck(torch.ops.dsf.complex_diagonal_scan, arguments)


if __name__ == "__main__":
    interpret()
