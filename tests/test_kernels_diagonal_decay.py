"""diagonal_decay_scan against its float64 loop: in Triton's interpreter (a child process), on the
GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

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
ABSOLUTE = 1e-5  # of numbers near 1 in float32
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def log_decay_families(length: int, state: int) -> dict[str, torch.Tensor]:
    """The decay families of the house rules that a positive decay can hold, as logs (L, N)."""
    step = torch.arange(length)[:, None].expand(length, state)
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(0, 2, (length, state), generator=generator).float()
    decays = {
        "one": torch.ones(length, state),
        "near one": torch.full((length, state), 1 - 1e-6),
        "half": torch.full((length, state), 0.5),
        "1e-30": torch.full((length, state), 1e-30),
        "zero": torch.zeros(length, state),
        "bits": bits,
        "one and 1e-20": torch.where(step % 2 == 0, 1.0, 1e-20),
        "drops": torch.where((step + torch.arange(state)) % 5 == 3, 1e-12, 0.99),
    }
    return {name: decay.log() for name, decay in decays.items()} | {
        "-100 a step": torch.full((length, state), -100.0),
        "-5 a step": torch.full((length, state), -5.0),
    }


def tensors(length, head=2, state=4, channel=4, dtype=torch.float32, decay=None, initial=True,
            batch=1, bonus=False):  # fmt: skip
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    wide = (batch, length, head, state)
    log_decay = -draw(*wide).abs() if decay is None else decay[None, :, None].expand(wide)
    return {
        "query": draw(*wide).to(dtype),
        "key": draw(*wide).to(dtype),
        "value": draw(batch, length, head, channel).to(dtype),
        "log_decay": log_decay,
        "initial_state": draw(batch, head, state, channel) if initial else None,
        "bonus": draw(head, state) if bonus else None,
    }


def cases(lengths, chunk, widths, **sizes):
    """{name: (tensors, type)}: lengths, decays (half of them with a bonus), widths, layouts."""
    found = {f"length {n}": (tensors(n, **sizes), torch.float32) for n in lengths}
    for i, (name, log_decay) in enumerate(log_decay_families(chunk + 3, 4).items()):
        arguments = tensors(chunk + 3, decay=log_decay, bonus=i % 2 == 0, **sizes)
        found[f"decay {name}"] = (arguments, torch.float32)
    for state, channel in widths:
        arguments = tensors(chunk + 1, 1, state, channel, bonus=state % 2 == 0)
        found[f"state {state} channel {channel}"] = (arguments, torch.float32)
    found["torch.bfloat16"] = (tensors(chunk + 1, dtype=torch.bfloat16, **sizes), torch.bfloat16)
    strided = tensors(chunk + 1)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["log_decay"] = strided["log_decay"][:, :, :, :1].expand(strided["key"].shape)
    strided["value"] = torch.randn(1, 2, 2 * chunk + 4, 9)[:, :, 1 : 2 * chunk + 3 : 2, 3:7]
    strided["value"] = strided["value"].transpose(1, 2)
    found["strided"] = (strided, torch.float32)
    return found


def measure(case, device="cpu"):
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan
    from dsf_kernels.reference import diagonal_decay_scan_reference, error_units

    arguments, dtype = case
    moved = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    return error_units(diagonal_decay_scan, diagonal_decay_scan_reference, moved, {"log_decay"},
                       unit=UNIT[dtype], scale=0.5)  # fmt: skip


INTERPRETED = cases((0, 1, 8, 9, 17), 8, [(1, 3), (20, 18)], head=1)
MIXED = torch.cat([v[:, :1] for v in log_decay_families(11, 4).values()], 1)
INTERPRETED = {k: v for k, v in INTERPRETED.items() if not k.startswith("decay")} | {
    f"every decay, each its own state, {'bonus' if bonus else 'plain'}": (
        tensors(11, 1, MIXED.shape[1], 4, decay=MIXED, bonus=bonus), torch.float32,
    )
    for bonus in (False, True)
}  # fmt: skip
ON_GPU = cases((0, 1, 2, 31, 32, 33, 257), 64, [(1, 3), (16, 16)]) | {
    f"torch.bfloat16 length {length}{' bonus' * bonus}": (
        tensors(length, 3, 128, 64, torch.bfloat16, batch=2, bonus=bonus), torch.bfloat16,
    )
    for length in (63, 64, 65, 128, 509)
    for bonus in (False, True)
} | {
    f"torch.bfloat16 decay {name}": (
        tensors(192, 2, 128, 128, torch.bfloat16, log), torch.bfloat16,
    )
    for name, log in log_decay_families(192, 128).items()
} | {
    f"torch.bfloat16 state {state} channel {channel}": (
        tensors(129, 2, state, channel, torch.bfloat16, bonus=True), torch.bfloat16,
    )
    for state, channel in ((1, 3), (16, 16), (60, 100), (64, 64), (100, 60))
}  # fmt: skip


def interpret():
    """Errors of every interpreted case, the split and the summary, in this process."""
    launch = importlib.import_module("dsf_kernels.diagonal_decay_launch")
    module = importlib.import_module("dsf_kernels.diagonal_decay_scan")
    launch.CHUNK[True] = 8
    launch.PAIR[True]["SLAB"] = launch.GRADIENT[True]["SLAB"] = 16
    launch.WALK[True]["SLAB"] = launch.GRADIENT[True]["PART"] = 16
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    found |= on_device_rules(module)
    for size in (1, 2):
        launch.PAIR[True]["HIGH"] = launch.GRADIENT[True]["HIGH"] = size
        found[f"{size} groups"] = measure(INTERPRETED["length 9"])
    arguments = tensors(11)
    arguments["key"] = arguments["key"][:, :, :1]
    output, final = module.diagonal_decay_scan(**arguments)
    parts = [
        {k: v if v is None or k == "initial_state" else v[:, rows] for k, v in arguments.items()}
        for rows in (slice(0, 8), slice(8, None))
    ]
    head, middle = module.diagonal_decay_scan(**parts[0])
    tail, end = module.diagonal_decay_scan(**parts[1] | {"initial_state": middle})
    found["split"] = bool(torch.equal(torch.cat([head, tail], 1), output) and (end == final).all())
    summarised = [arguments[name] for name in ("key", "value", "log_decay")]
    total, end = module.diagonal_decay_summary(*summarised)
    again = total.exp()[..., None] * arguments["initial_state"] + end
    found["summary"] = float((again - final).abs().max())
    found["no key"] = without_key("cpu")
    small = tensors(3)
    torch.library.opcheck(torch.ops.dsf.diagonal_decay_scan,
                          tuple(small[k] for k in OPERANDS) + (1.0,),
                          test_utils=("test_schema", "test_autograd_registration",
                                      "test_faketensor"))  # fmt: skip
    print(json.dumps(found))


def on_device_rules(module):
    """What holds on a GPU alone: other widths are filled up, what is not tested is refused."""
    module.INTERPRETED, module.MAX_WIDTH = False, 32
    filled = tensors(9, 1, 20, 5, torch.bfloat16, bonus=True)
    found = {"filled up": measure((filled, torch.bfloat16))}
    wrong = [tensors(3, 1, 17, 4), tensors(3, 1, 33, 4, torch.bfloat16),
             tensors(3, dtype=torch.float16)]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(NotImplementedError, match=r'Use dsf.scan\(backend="chunked"\)'):
            module.diagonal_decay_scan(**arguments)
    module.INTERPRETED, module.MAX_WIDTH = True, 128
    return found


def without_key(device):
    """Largest difference to the loop of outputs and the log decay's gradient, over the largest
    number: with B = 1 - a the gradient has terms of both signs, so units do not bound it."""
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan
    from dsf_kernels.reference import diagonal_decay_scan_reference

    arguments = {k: v if v is None else v.to(device) for k, v in tensors(11).items()}
    arguments["key"] = None
    results = []
    for function in (diagonal_decay_scan, diagonal_decay_scan_reference):
        leaf = arguments["log_decay"].double().requires_grad_()
        log_decay = leaf.float() if function is diagonal_decay_scan else leaf
        output, _ = function(**arguments | {"log_decay": log_decay})
        results.append([output.detach(), *torch.autograd.grad(output.double().sin().sum(), leaf)])
    pairs = zip(*results, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


OPERANDS = ("query", "key", "value", "log_decay", "initial_state")


def test_interpreted():
    """One child runs every case, a split on a tile's edge and the summary; all are judged."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(KERNELS)
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                         env=environment, timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("split")
    assert found.pop("summary") < ABSOLUTE
    assert found.pop("no key") < ABSOLUTE
    assert set(found) == set(INTERPRETED) | {"1 groups", "2 groups", "filled up"}
    wrong = {name: units for name, units in found.items() if max(units.values()) > LIMIT}
    assert not wrong, wrong


def test_messages():
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

    arguments = tensors(3)
    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        diagonal_decay_scan(**arguments)
    with pytest.raises(ValueError, match="scale: expected a finite nonzero number, got 0"):
        diagonal_decay_scan(**arguments, scale=0)


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


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", ["pair_kernel", "walk_kernel", "gradient_kernel"])
def test_compiles_ahead_of_time(name, architecture, record_property):
    """The bf16 tiles of width 64."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = importlib.import_module("dsf_kernels.diagonal_decay_launch")
    kernel = getattr(launch, name)
    table = {"pair_kernel": launch.PAIR, "walk_kernel": launch.WALK}.get(name, launch.GRADIENT)
    tiles = dict(table[False])
    options = {"num_warps": tiles.pop("num_warps")}
    tiles["SLAB"] = min(tiles["SLAB"], 64)
    fixed = launch._shared(torch.empty(0, dtype=torch.bfloat16)) | tiles
    fixed |= {"WIDTH": 64, "CHANNELS": 64, "PART": 64, "ONES": tiles["SLAB"]}
    fixed |= dict.fromkeys(("PAIRED", "FULL", "HAS_INITIAL", "STORE", "SAVE", "FINAL"), True)
    fixed |= {"REVERSE": True} | dict.fromkeys(("w_p", "i_p", "v_p", "d_p"), 1)
    fixed = {k: v for k, v in fixed.items() if k in kernel.arg_names}
    single = ("log_decay", "grad_decay", "total", "initial", "final")
    pointers = ("query", "key", "score", "q_out", "k_out", "value", "grad", "start", "end", "ones",
                "grad_query", "grad_key", "x", "y", "w", "out", "saved")  # fmt: skip
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(single, "*fp32") | {"scale": "fp32"}
    signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
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
def test_gpu_without_key():
    assert without_key("cuda") < ABSOLUTE


@CUDA
@pytest.mark.gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

    arguments = tensors(1000, 3, 128, 64, torch.bfloat16, batch=4)
    arguments = {k: v if v is None else v.cuda() for k, v in arguments.items()}
    leaves = [v.requires_grad_() for v in arguments.values() if v is not None]

    def run(given):
        output, final = diagonal_decay_scan(**given)
        rows = [v for v in given.values() if v is not None]
        return output, final, *torch.autograd.grad((output.float().sum(), final.sum()), rows)

    first = run(arguments)
    assert len(first) == len(leaves) + 2
    for _ in range(100):
        assert all(map(torch.equal, run(arguments), first))
    alone = {k: v if v is None else v[2:3].detach().requires_grad_() for k, v in arguments.items()}
    for found, whole in zip(run(alone), first, strict=True):
        assert torch.equal(found[0], whole[2])


@CUDA
@pytest.mark.gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

    rows = torch.randn(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    logs = torch.full_like(rows, -0.01).requires_grad_()
    output, _ = diagonal_decay_scan(rows, rows, rows, logs)
    (found,) = torch.autograd.grad(output.float().sum(), logs)
    assert torch.isfinite(output).all()
    assert torch.isfinite(found).all()
    small = tensors(70, dtype=torch.bfloat16)
    operands = tuple(small[k].cuda() for k in OPERANDS)
    torch.library.opcheck(torch.ops.dsf.diagonal_decay_scan, (*operands, 1.0))


if __name__ == "__main__":
    interpret()
