"""delta_scan against its float64 loop: in Triton's interpreter (a child process), on the GPU, and
compiled ahead of time. Run as a script it prints the interpreter's errors as JSON.

Errors are in units of round-off times the size of a row, over the condition of the solve."""

import importlib
import json
import re

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 64.0  # units, times the condition of the solve


def tensors(length, head=2, group=2, state=4, channel=4, dtype=torch.float32, decay="token",
            initial=True, batch=1, strength=None, unit=True):  # fmt: skip
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    key = draw(batch, length, group, state)
    if unit:
        key = torch.nn.functional.normalize(key, dim=-1)
    log_decay = None
    if isinstance(decay, torch.Tensor):
        log_decay = decay[None].expand(batch, length, head)
    elif decay == "token":
        log_decay = -0.3 * draw(batch, length, head).abs()
    write = torch.rand(batch, length, head, generator=generator)
    if strength is not None:
        write = torch.full_like(write, strength)
    return {
        "query": draw(batch, length, group, state).to(dtype),
        "key": key.to(dtype),
        "value": draw(batch, length, head, channel).to(dtype),
        "write_strength": write,
        "log_decay": log_decay,
        "initial_state": draw(batch, head, state, channel) if initial else None,
    }


def cases(lengths, chunk, widths, **sizes):
    """{name: (tensors, type)}: lengths, decays, widths, groups, strengths, layouts."""
    found = {f"length {length}": (tensors(length, **sizes), torch.float32) for length in lengths}
    for name, log_decay in kernel_laws.log_decay_families(chunk + 3).items():
        found[f"decay {name}"] = (tensors(chunk + 3, 1, 1, decay=log_decay), torch.float32)
    for state, channel in widths:
        arguments = tensors(chunk + 1, 2, 1, state, channel)
        found[f"state {state} channel {channel}"] = (arguments, torch.float32)
    for strength in (0.0, 1.0, 2.0):
        arguments = tensors(chunk + 2, 1, 1, strength=strength, decay=None)
        found[f"strength {strength}"] = (arguments, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"{dtype}"] = (tensors(chunk + 1, dtype=dtype, **sizes), dtype)
    found["no decay, no initial state"] = (
        tensors(chunk + 1, decay=None, initial=False), torch.float32,
    )  # fmt: skip
    found["keys of any length"] = (tensors(7, unit=False), torch.float32)
    strided = tensors(chunk + 1)
    strided["query"] = strided["query"].mT.contiguous().mT
    strided["value"] = kernel_laws.strided_values(chunk + 1)
    strided["write_strength"] = strided["write_strength"].mT.contiguous().mT
    found["strided"] = (strided, torch.float32)
    return found


def measure(case, device="cpu"):
    """Units over the condition of the solve."""
    from dsf_kernels.delta_launch import products
    from dsf_kernels.delta_scan import delta_scan
    from dsf_kernels.reference import delta_scan_reference, row_units, solve_condition

    arguments, dtype = case
    widths = arguments["key"].shape[3], arguments["value"].shape[3]
    chunk = products(dtype, *widths)["CHUNK"]
    moved = kernel_laws.moved(arguments, device)
    solved = (moved[name] for name in ("key", "write_strength", "log_decay"))
    condition = solve_condition(*solved, chunk)
    units = row_units(delta_scan, delta_scan_reference, moved, unit=UNIT[dtype], scale=0.5)
    return {name: value / condition for name, value in units.items()}


INTERPRETED = cases((0, 1, 2, 16, 33), 16, [(1, 3), (17, 20)], head=1, group=1)
ON_GPU = cases((0, 1, 2, 15, 16, 17, 257), 16, [(1, 3), (16, 100), (128, 60), (128, 128)]) | {
    f"{dtype} length {length} decay {decay}": (
        tensors(length, 4, 2, 128, 64, dtype, decay, batch=2), dtype,
    )
    for dtype in (torch.bfloat16, torch.float16)
    for length in (63, 64, 65, 509)
    for decay in ("token", None)
} | {
    f"torch.bfloat16 decay {name}": (
        tensors(193, 2, 1, 64, 128, torch.bfloat16, log), torch.bfloat16,
    )
    for name, log in kernel_laws.log_decay_families(193).items()
} | {
    f"torch.bfloat16 strength {strength}": (
        tensors(192, 2, 2, 128, 128, torch.bfloat16, None, strength=strength), torch.bfloat16,
    )
    for strength in (0.0, 1.0, 2.0)
} | {
    f"{dtype} state {state} channel {channel}": (tensors(129, 2, 1, state, channel, dtype), dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for state, channel in ((256, 64), (64, 256), (200, 256))
}  # fmt: skip


def interpret():
    """Errors of every interpreted case, the split and the summary, in this process."""
    module = importlib.import_module("dsf_kernels.delta_scan")
    launch = importlib.import_module("dsf_kernels.delta_launch")
    found = {name: measure(case) for name, case in INTERPRETED.items()}
    arguments = tensors(21)
    output, final = module.delta_scan(**arguments)
    parts = kernel_laws.scan_in_two(module.delta_scan, arguments, 16)
    found["split"] = all(map(torch.equal, parts, (output, final)))
    names = ("key", "value", "write_strength", "log_decay")
    total, end = module.delta_summary(*(arguments[name] for name in names))
    again = total @ arguments["initial_state"] + end
    found["summary"] = float((again - final).abs().max())
    still = arguments | {"write_strength": torch.zeros_like(arguments["write_strength"])}
    decayed = arguments["log_decay"].sum(1).exp()[..., None, None] * arguments["initial_state"]
    found["writes nothing"] = float((module.delta_scan(**still)[1] - decayed).abs().max())
    plain = module.delta_scan(**arguments | {"log_decay": None})[0]
    without = torch.zeros_like(arguments["log_decay"])
    gated = module.delta_scan(**arguments | {"log_decay": without})[0]
    found["no decay is decay one"] = float((gated - plain).abs().max())
    for chunk in (32, 64):  # the forward substitution over blocks
        launch.EXACT_CHUNK = chunk
        found[f"chunk {chunk}"] = measure((tensors(chunk + 1, 1, 1), torch.float32))
    torch.library.opcheck(torch.ops.dsf.delta_scan, (*tensors(3).values(), 1.0),
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case, a split on a chunk's edge and the identities; all are judged."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.pop("split")
    assert found.pop("summary") < 1e-5
    assert found.pop("writes nothing") < 1e-6
    assert found.pop("no decay is decay one") == 0
    assert set(found) == set(INTERPRETED) | {"chunk 32", "chunk 64"}
    kernel_laws.all_within(found, LIMIT)


def test_messages():
    from dsf_kernels.delta_scan import delta_scan

    message = "scale: expected a finite nonzero number, got 0"
    kernel_laws.refuses(delta_scan, tensors(3), ValueError, message, scale=0)


def test_refuses_wider_states(monkeypatch):
    module = importlib.import_module("dsf_kernels.delta_scan")
    monkeypatch.setattr(module, "check_kind", lambda *_: None)  # as if on a GPU
    with pytest.raises(
        ValueError, match="expected state and channel from 1 to 256, got state=257"
    ):
        module.delta_scan(**tensors(3, state=257))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("solve", 90), ("forward", 80), ("forward", 90), ("reverse", 90), ("gradient", 90)],
)
def test_compiles_ahead_of_time(name, architecture, record_property):
    launch = importlib.import_module("dsf_kernels.delta_launch")
    kernel = getattr(launch, f"{name}_kernel")
    settings = launch.products(torch.bfloat16, 64, 64) | {"CHUNK": 32}  # quicker than 64
    fixed = settings | {"WIDTH": 64, "CHANNELS": 64, "SLAB": 32, "STEP": 32, "STAGES": 2}
    fixed |= dict.fromkeys(("Q_SHARE", "K_SHARE", "SHARE", "q_w", "k_w", "v_w", "y_w", "i_p"), 1)
    fixed |= dict.fromkeys(("HAS_DECAY", "HAS_INITIAL", "DECAY_GRAD", "FINAL", "FULL"), True)
    fixed |= {"SOLVE": "tf32x3", "STORE": True, "SAVE": False, "table": None}
    floats = ("strength", "high", "low", "initial", "final", "grad_strength", "grad_decay")
    tensor = re.compile(
        "query|key|value|upstream|out|solved|states|adjoints|written|pulled|residual|grad"
    )
    types = {name: "*bf16" for name in kernel.arg_names if tensor.match(name)}
    types |= dict.fromkeys(floats, "*fp32") | {"scale": "fp32"}
    options = {"num_warps": 1 if name == "solve" else 4}
    kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_matches_loop(name):
    units = measure(ON_GPU[name], "cuda")
    assert max(units.values()) <= LIMIT, units


@kernel_laws.on_gpu
def test_gpu_repeats_and_is_independent_of_batch():
    """Bitwise, with the gradients."""
    from dsf_kernels.delta_scan import delta_scan

    arguments = tensors(1000, 3, 1, 128, 64, torch.bfloat16, batch=4)
    run = kernel_laws.with_gradients(delta_scan, term=torch.square)
    kernel_laws.repeats_and_rows_stand_alone(run, arguments, repeats=20)


@kernel_laws.on_gpu
def test_gpu_long_and_opcheck():
    from dsf_kernels.delta_scan import delta_scan

    rows = torch.randn(1, 1_048_576, 1, 16, device="cuda", dtype=torch.bfloat16)
    key = torch.nn.functional.normalize(rows.float(), dim=-1).bfloat16()
    write = torch.rand(1, 1_048_576, 1, device="cuda")
    output, _ = delta_scan(rows, key, rows, write)
    assert torch.isfinite(output).all()
    arguments = [v.cuda() for v in tensors(70, dtype=torch.bfloat16).values()]
    torch.library.opcheck(torch.ops.dsf.delta_scan, (*arguments, 1.0))


if __name__ == "__main__":
    interpret()
