"""How fast are the scan kernels, beside the least time the memory and the matrix units allow?

Times each kernel forward and forward + backward, eager and replayed from a CUDA graph (medians of
`triton.testing.do_bench`), next to its floor, its error in units against the float64 loop, and
every peer that can be imported (fla-core, accelerated-scan; none is needed). Run on a machine
with a CUDA device:

    PYTHONPATH=kernels python analyses/kernel_speed.py --out kernel_speed

writes kernel_speed.json and the table kernel_speed.md, and prints the table.
"""

import argparse
import contextlib
import importlib
import json
import math
from datetime import date
from pathlib import Path

import torch
import triton
from dsf_kernels.diagonal_scan import diagonal_scan
from dsf_kernels.reference import (
    diagonal_scan_reference,
    error_units,
    scalar_decay_scan_reference,
)
from dsf_kernels.scalar_decay_scan import scalar_decay_scan
from triton.testing import do_bench

BANDWIDTH = {"NVIDIA H200": 4.3e12}  # bytes a second, read + write; measured when not listed
MATRIX_RATE = 790e12
CHUNK = 64


def diagonal_case(dtype, batch, length, width):
    """Inputs of h = a h + b, and floors in bytes and operations."""
    size = batch * length * width * torch.finfo(dtype).bits // 8
    shape = (batch, length, width)
    decay = torch.rand(shape, device="cuda").to(dtype)
    inputs = torch.randn(shape, device="cuda").to(dtype)
    peers = {}
    with contextlib.suppress(ImportError):
        scan = importlib.import_module("accelerated_scan.scalar").scan
        first = [t.mT.contiguous() for t in (decay, inputs)]
        peers["accelerated-scan, time last"] = (scan, first)
        peers["accelerated-scan, with transposes"] = (
            lambda a, b: scan(a.mT.contiguous(), b.mT.contiguous()).mT.contiguous(),
            [decay, inputs],
        )
    with contextlib.suppress(ImportError):
        hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn
        peers["fla chunk_hgrn"] = (
            lambda g, x: hgrn(x, g)[0],
            [decay.float().log().to(dtype), inputs],
        )
    ours = (lambda a, b: diagonal_scan(a, b)[0], [decay, inputs])
    return {"dsf diagonal_scan": ours} | peers, (3 * size, 0), (5 * size, 0)


def matrix_case(batch, length, head, group, state, channel, decay):
    """Inputs of the matrix state with a scalar decay in bf16, and floors in bytes, operations."""

    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    query, key = draw(batch, length, group, state), draw(batch, length, group, state)
    value = draw(batch, length, head, channel)
    token = batch * length
    q_bytes, v_bytes = 2 * token * group * state, 2 * token * head * channel
    least = (2 * q_bytes + 2 * v_bytes, 4 * q_bytes + 3 * v_bytes)
    pairs = 2 * CHUNK * (state + channel)
    work = token * head * (4 * state * channel + pairs)
    back = token * head * (10 * state * channel + 2 * CHUNK * (3 * state + 2 * channel))
    tensors, scale = [query, key, value], state**-0.5
    if decay == "token":
        tensors.append(-torch.rand(batch, length, head, device="cuda") * 0.1)
    elif decay == "head":
        fixed = -torch.linspace(0.01, 0.1, head, device="cuda")
    given = {"head": lambda: (fixed,), "token": tuple, None: tuple}[decay]()
    functions = {"dsf scalar_decay_scan": lambda *t: scalar_decay_scan(*t, *given, scale=scale)[0]}
    with contextlib.suppress(ImportError, KeyError):
        name = {"head": "retention", "token": "simple_gla", None: "linear_attn"}[decay]
        call = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
        if group == head:
            plain = {"normalize": False} if decay is None else {}
            functions[f"fla chunk_{name}"] = lambda *t: call(*t, scale=scale, **plain)[0]
    return {k: (f, tensors) for k, f in functions.items()}, (least[0], work), (least[1], back)


CASES = {
    "a fp32 8 x 8192 x 2048": lambda: diagonal_case(torch.float32, 8, 8192, 2048),
    "a bf16 8 x 8192 x 2048": lambda: diagonal_case(torch.bfloat16, 8, 8192, 2048),
    "a fp32 1 x 65536 x 2048": lambda: diagonal_case(torch.float32, 1, 65536, 2048),
    "a bf16 1 x 65536 x 2048": lambda: diagonal_case(torch.bfloat16, 1, 65536, 2048),
    "c no decay 8 x 4096 x 16, 128 x 128": lambda: matrix_case(8, 4096, 16, 16, 128, 128, None),
    "c fixed decay, same": lambda: matrix_case(8, 4096, 16, 16, 128, 128, "head"),
    "c decay a token with gradient, same": lambda: matrix_case(8, 4096, 16, 16, 128, 128, "token"),
    "c SSD 8 x 4096 x 64, N 128 P 64, one group": lambda: matrix_case(
        8, 4096, 64, 1, 128, 64, "token"
    ),
    "c no decay 1 x 1024 x 4, 64 x 64": lambda: matrix_case(1, 1024, 4, 4, 64, 64, None),
}


def worst_units(name: str) -> float:
    """The largest error of outputs and gradients on a short input of the case's kind."""
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    torch.manual_seed(0)
    if name.startswith("a "):
        draw = {"decay": torch.rand(2, 701, 64), "inputs": torch.randn(2, 701, 64)}
        draw = {k: v.to("cuda", dtype) for k, v in draw.items()} | {"initial_state": None}
        found = error_units(diagonal_scan, diagonal_scan_reference, draw, unit=unit)
    else:
        width = 64 if "64 x 64" in name else 128
        shapes = {"query": width, "key": width, "value": 64 if "SSD" in name else width}
        draw = {k: torch.randn(2, 257, 2, n).to("cuda", dtype) for k, n in shapes.items()}
        token = -torch.rand(2, 257, 2, device="cuda") * 0.1
        draw |= {"log_decay": None if "no decay" in name else token, "initial_state": None}
        found = error_units(scalar_decay_scan, scalar_decay_scan_reference, draw, {"log_decay"},
                            unit=unit)  # fmt: skip
    return max(found.values())


def replayed(function):
    """The function captured in a CUDA graph, or None where it cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def milliseconds(function) -> dict[str, float | str]:
    """Median times eager and replayed, or the name of the error."""
    times: dict[str, float | str] = {}
    for mode, prepare in (("eager", lambda f: f), ("graph", replayed)):
        try:
            prepared = prepare(function)
            times[mode] = do_bench(prepared, warmup=25, rep=100, return_mode="median")
        except Exception as error:
            times[mode] = type(error).__name__
    return times


def time_case(function, tensors) -> dict[str, dict]:
    """Forward without a graph of gradients, and forward + backward to every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        upstream = torch.randn_like(function(*tensors))

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    return {"forward": milliseconds(forward), "both": milliseconds(both)}


def copy_rate() -> float:
    """Bytes a second, read + write, of a 2 GiB copy."""
    source = torch.empty(2**29, device="cuda")
    target = torch.empty_like(source)
    ms = do_bench(lambda: target.copy_(source), warmup=25, rep=100, return_mode="median")
    return 2 * source.nbytes / ms * 1e3


def cell(time, floor) -> str:
    return f"{time:.3f} ({time / floor:.2f})" if isinstance(time, float) else str(time)


def table(rows: list[dict]) -> str:
    head = (
        "| case | implementation | floor ms, fwd / fwd+bwd | fwd ms (x floor), eager | graph | "
        "fwd+bwd ms (x floor), eager | graph | worst error, units |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    lines = []
    for row in rows:
        floors = row["floor"]
        cells = [cell(row[k][m], f) for k, f in zip(("forward", "both"), floors, strict=True)
                 for m in ("eager", "graph")]  # fmt: skip
        units = "" if math.isnan(row["units"]) else f"{row['units']:.2f}"
        lines.append(f"| {row['case']} | {row['name']} | {floors[0]:.3f} / {floors[1]:.3f} | "
                     + " | ".join(cells) + f" | {units} |")  # fmt: skip
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="kernel_speed", help="path of the results, no suffix")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    flags = parser.parse_args()
    device, start = torch.cuda.get_device_name(), copy_rate()
    rate = BANDWIDTH.get(device, start)
    rows = []
    for case in [name for name in CASES if flags.only in name]:
        made, *work = CASES[case]()
        single = [max(moved / rate, flops / MATRIX_RATE) * 1e3 for moved, flops in work]
        for name, (function, tensors) in made.items():
            units = worst_units(case) if name.startswith("dsf") else math.nan
            try:
                times = time_case(function, tensors)
            except Exception as error:
                times = dict.fromkeys(("forward", "both"), dict.fromkeys(("eager", "graph"), ""))
                times["forward"] = dict.fromkeys(("eager", "graph"), type(error).__name__)
            floor = (single[0], sum(single))
            rows.append({"case": case, "name": name, "floor": floor, "units": units, **times})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        del made
    about = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "date": str(date.today()),
        "copy TB/s at start, end": [start / 1e12, copy_rate() / 1e12],
    }  # fmt: skip
    Path(flags.out + ".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    Path(flags.out + ".md").write_text(json.dumps(about) + "\n\n" + table(rows))
    print(json.dumps(about), "\n", table(rows))


if __name__ == "__main__":
    main()
