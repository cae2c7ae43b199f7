"""What the tests of the Triton kernels share: decays, the interpreter's child, builds, laws.

Imports without a GPU, and without Triton: a test file asks for Triton itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

KERNELS = Path(__file__).parents[1] / "kernels"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
"""Those of opcheck that the interpreter can pass: the other one compiles."""
Arguments = dict[str, Tensor | None]
Scan = Callable[..., tuple[Tensor, Tensor]]


def on_gpu(test: Callable) -> Callable:
    """Mark a test that needs a CUDA device, and skip it where there is none."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(missing(test))


# -- arguments ---------------------------------------------------------------------------------


def decay_families(
    length: int, state: int = 1, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The decay families of the house rules that are not negative, each (length, state)."""
    shape = (length, state)
    step = torch.arange(length)[:, None].expand(shape)
    generator = generator or torch.Generator().manual_seed(7)
    return {
        "one": torch.ones(shape),
        "near one": torch.full(shape, 1 - 1e-6),
        "half": torch.full(shape, 0.5),
        "1e-30": torch.full(shape, 1e-30),
        "zero": torch.zeros(shape),
        "bits": torch.randint(0, 2, shape, generator=generator).float(),
        "one and 1e-20": torch.where(step % 2 == 0, 1.0, 1e-20),
        "drops": torch.where((step + torch.arange(state)) % 5 == 3, 1e-12, 0.99),
    }


def log_decay_families(length: int, state: int = 1) -> dict[str, Tensor]:
    """The same as logs, and -100 a step, which no decay in float32 can hold."""
    logs = {name: decay.log() for name, decay in decay_families(length, state).items()}
    return logs | {"-100 a step": torch.full((length, state), -100.0)}


def strided_values(length: int) -> Tensor:
    """Values (1, length, head 2, channel 4): every other row of a wider tensor, heads first."""
    wide = torch.randn(1, 2, 2 * length + 2, 9)
    return wide[:, :, 1 : 2 * length + 1 : 2, 3:7].transpose(1, 2)


def matrix_states(length, head=2, group=2, state=4, channel=4, dtype=torch.float32, decay="token",
                  initial=True, batch=1):  # fmt: skip
    """Arguments of a scan with a matrix state; decay: "token", "head", None or (time, head)."""
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    log_decay = None
    if isinstance(decay, torch.Tensor):
        log_decay = decay[None].expand(batch, length, head)
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


def matrix_state_cases(tensors, lengths, chunk, widths, families=None, **sizes):
    """{name: (tensors, type)}: lengths, decays, widths, groups, layouts; `tensors` makes each as
    `matrix_states`, families names the decays (all)."""
    found = {f"length {length}": (tensors(length, **sizes), torch.float32) for length in lengths}
    for name, log_decay in log_decay_families(chunk + 3).items():
        if families is not None and name not in families:
            continue
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
    strided["value"] = strided_values(chunk + 1)
    found["strided"] = (strided, torch.float32)
    return found


def moved(arguments: Arguments, device: str) -> Arguments:
    """The arguments on a device; None stays."""
    return {k: v if v is None else v.to(device) for k, v in arguments.items()}


# -- in the interpreter ------------------------------------------------------------------------


def run_interpreted(file: str) -> dict:
    """What a test file, run as a script in Triton's interpreter, prints last, read as JSON.

    A child process, as Triton reads the setting when it is imported.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(KERNELS)
    run = subprocess.run([sys.executable, file], capture_output=True, text=True,
                         env=environment, timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def scan_in_two(
    scan: Scan,
    arguments: Arguments,
    cut: int,
    whole: Iterable[str] = ("initial_state",),
    **options,
) -> tuple[Tensor, Tensor]:
    """Output and last state of two scans, cut after step `cut`, the state handed on.

    whole: the arguments that have no time.
    """
    head, tail = ({k: v if v is None or k in whole else v[:, rows] for k, v in arguments.items()}
                  for rows in (slice(0, cut), slice(cut, None)))  # fmt: skip
    early, middle = scan(**head, **options)
    late, end = scan(**tail | {"initial_state": middle}, **options)
    return torch.cat([early, late], 1), end


def all_within(found: dict[str, dict[str, float]], limit: float) -> None:
    """No case, {name: {tensor: units}}, is further than `limit` units from its loop."""
    wrong = {name: units for name, units in found.items() if max(units.values()) > limit}
    assert not wrong, wrong


def refuses(scan: Scan, arguments: Arguments, error: type, message: str, **wrong) -> None:
    """Tensors on the CPU, and then the wrong arguments, are refused in words."""
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        scan(**arguments)
    with pytest.raises(error, match=message):
        scan(**arguments | wrong)


# -- compiled ahead of time --------------------------------------------------------------------


def build(kernel, architecture: int, types: dict[str, str], fixed: dict, options: dict,
          record_property: Callable):  # fmt: skip
    """The kernel compiled for an NVIDIA architecture, its resources recorded with the test.

    types, fixed: of parameters by name, more than the kernel has if need be; those in neither
    are i32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    record_property("resources", resources(built))
    assert built.asm["cubin"]
    return built


def resources(built) -> str:
    """Registers, stack (spills) and shared memory of a compiled kernel, as its assembler says."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "not known: this Triton carries no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", run.stdout))


# -- on the GPU --------------------------------------------------------------------------------


def with_gradients(
    scan: Scan, shared: Iterable[str] = (), term: Callable = torch.clone, **options
) -> Callable[..., tuple[Tensor, ...]]:
    """The scan with, behind its two results, the gradients of the sum of their `term`s.

    shared: the arguments whose gradients are left out, as they have no batch.
    """

    def run(**arguments):
        leaves = {
            k: None if v is None else v.detach().requires_grad_() for k, v in arguments.items()
        }
        output, final = scan(**leaves, **options)
        losses = term(output.float()).sum(), term(final).sum()
        wanted = [v for k, v in leaves.items() if v is not None and k not in shared]
        return output, final, *torch.autograd.grad(losses, wanted)

    return run


def repeats_and_rows_stand_alone(
    run: Callable[..., tuple[Tensor, ...]], arguments: Arguments, repeats: int = 100,
    compared: int | None = None, shared: Iterable[str] = (),
) -> None:  # fmt: skip
    """Every run gives the same bits, and row 2 alone those that it has in the batch.

    compared: how many results of a repeat are looked at (all).
    shared: the arguments without a batch.
    """
    arguments = moved(arguments, "cuda")
    first = run(**arguments)
    for n in range(repeats):
        again = run(**arguments)
        for place, (found, expected) in enumerate(zip(again, first, strict=True)):
            if compared is None or place < compared:
                assert torch.equal(found, expected), f"repeat {n}: result {place} differs"
    row = {k: v if v is None or k in shared else v[2:3] for k, v in arguments.items()}
    for place, (alone, whole) in enumerate(zip(run(**row), first, strict=True)):
        assert torch.equal(alone[0], whole[2]), f"row alone: result {place} differs"
