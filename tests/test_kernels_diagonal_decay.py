"""diagonal_decay_scan against its float64 loop: in Triton's interpreter (a child process), on the
GPU, and compiled ahead of time. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
ABSOLUTE = 1e-5  # of numbers near 1 in float32


def log_decay_families(length: int, state: int) -> dict[str, torch.Tensor]:
    """Those of every kernel, and -5 a step, as logs (L, N)."""
    slow = {"-5 a step": torch.full((length, state), -5.0)}
    return kernel_laws.log_decay_families(length, state) | slow


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
    strided["value"] = kernel_laws.strided_values(chunk + 1)
    found["strided"] = (strided, torch.float32)
    return found


def measure(case, device="cpu"):
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan
    from dsf_kernels.reference import diagonal_decay_scan_reference, error_units

    arguments, dtype = case
    moved = kernel_laws.moved(arguments, device)
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
    for state, channel in ((1, 3), (16, 16), (60, 100), (32, 128), (64, 64), (256, 64), (200, 256))
} | {
    f"{dtype} state {state} channel {channel}": (tensors(129, 2, state, channel, dtype), dtype)
    for dtype in (torch.float16, torch.float32)
    for state, channel in ((1, 3), (17, 20), (64, 64), (60, 100), (128, 128), (256, 256))
} | {
    f"torch.float16 decay {name}": (tensors(192, 2, 64, 64, torch.float16, log), torch.float16)
    for name, log in log_decay_families(192, 64).items()
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
    parts = kernel_laws.scan_in_two(module.diagonal_decay_scan, arguments, 8)
    found["split"] = all(map(torch.equal, parts, (output, final)))
    summarised = [arguments[name] for name in ("key", "value", "log_decay")]
    total, end = module.diagonal_decay_summary(*summarised)
    again = total.exp()[..., None] * arguments["initial_state"] + end
    found["summary"] = float((again - final).abs().max())
    found["no key"] = without_key("cpu")
    small = tensors(3)
    torch.library.opcheck(torch.ops.dsf.diagonal_decay_scan,
                          tuple(small[k] for k in OPERANDS) + (1.0,),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def on_device_rules(module):
    """Odd widths are filled up, on a GPU alone; wider ones are refused."""
    module.INTERPRETED = False
    filled = tensors(9, 1, 19, 5, torch.bfloat16, bonus=True)
    found = {"filled up": measure((filled, torch.bfloat16))}
    module.INTERPRETED = True
    with pytest.raises(NotImplementedError, match=r'Use dsf.scan\(backend="chunked"\)'):
        module.diagonal_decay_scan(**tensors(3, 1, 257, 4))
    return found


def without_key(device):
    """Largest difference to the loop of outputs and the log decay's gradient, over the largest
    number: with B = 1 - a the gradient has terms of both signs, so units do not bound it."""
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan
    from dsf_kernels.reference import diagonal_decay_scan_reference

    arguments = kernel_laws.moved(tensors(11), device)
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
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert found.pop("summary") < ABSOLUTE
    assert found.pop("no key") < ABSOLUTE
    assert set(found) == set(INTERPRETED) | {"1 groups", "2 groups", "filled up"}
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

    message = "scale: expected a finite nonzero number, got 0"
    kernel_laws.refuses(diagonal_decay_scan, tensors(3), ValueError, message, scale=0)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", ["pair_kernel", "walk_kernel", "gradient_kernel"])
def test_compiles_ahead_of_time(name, architecture, record_property):
    """The bf16 tiles of width 64."""
    launch = importlib.import_module("dsf_kernels.diagonal_decay_launch")
    kernel = getattr(launch, name)
    table = {"pair_kernel": launch.PAIR, "walk_kernel": launch.WALK}.get(name, launch.GRADIENT)
    tiles = dict(table[False])
    options = {"num_warps": tiles.pop("num_warps")}
    tiles["SLAB"] = min(tiles["SLAB"], 64)
    fixed = launch._shared(torch.empty(0, dtype=torch.bfloat16)) | tiles
    fixed |= {"WIDTH": 64, "CHANNELS": 64, "PART": 64, "ONES": tiles["SLAB"], "table": None}
    fixed |= dict.fromkeys(("PAIRED", "FULL", "HAS_INITIAL", "STORE", "SAVE", "FINAL"), True)
    fixed |= {"REVERSE": True} | dict.fromkeys(("w_p", "i_p", "v_p", "d_p"), 1)
    single = ("log_decay", "grad_decay", "total", "initial", "final")
    pointers = ("query", "key", "score", "q_out", "k_out", "value", "grad", "start", "end", "ones",
                "grad_query", "grad_key", "x", "y", "w", "out", "saved")  # fmt: skip
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(single, "*fp32") | {"scale": "fp32"}
    kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_without_key():
    assert without_key("cuda") < ABSOLUTE


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan

    arguments = tensors(1000, 3, 128, 64, torch.bfloat16, batch=4)
    run = kernel_laws.with_gradients(diagonal_decay_scan)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments)


@kernel_laws.on_gpu
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
