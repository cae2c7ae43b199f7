"""How a case is timed and judged: medians, eager and replayed from a CUDA graph, and floors."""

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

import dsf_kernels.bench
from dsf_kernels import compiler
from dsf_kernels.bench import Case, Work

COPY_RATE = {"NVIDIA H200": 4.3e12}  # bytes a second, read + write; measured where not listed
MATRIX_RATE = 790e12  # operations a second of the matrix units in bf16, the best seen on Hopper
EXPONENTIAL_RATE = 4.2e12  # 16 a clock and multiprocessor
DIRECTIONS = ("forward", "both")
MODES = ("eager", "graph")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def cases(only: str = "") -> dict[str, Callable[[], Case]]:
    """Every case of every family whose name contains `only`."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(dsf_kernels.bench.__path__)):
        family = importlib.import_module(f"dsf_kernels.bench.{module}")
        found |= {k: v for k, v in getattr(family, "CASES", {}).items() if only in k}
    return found


def families() -> dict[str, Callable[..., Case]]:
    """{family: its `case` function}, whose arguments are the sizes that a user may choose."""
    names = (m.name for m in pkgutil.iter_modules(dsf_kernels.bench.__path__))
    found = {n: importlib.import_module(f"dsf_kernels.bench.{n}") for n in sorted(names)}
    return {name: module.case for name, module in found.items() if hasattr(module, "case")}


def case_of(family: str, settings: dict[str, str]) -> Callable[[], Case]:
    """A case on the caller's own shape: numbers, types and words as text, such as batch=8.

    Raises ValueError for an unknown family or setting, or a missing one.
    """
    known = families()
    if family not in known:
        raise ValueError(f"family: expected one of {', '.join(known)}, got {family!r}.")
    wanted = inspect.signature(known[family]).parameters
    missing = [n for n, p in wanted.items() if p.default is p.empty and n not in settings]
    unknown = [n for n in settings if n not in wanted]
    if missing or unknown:
        raise ValueError(
            f"{family}: expected {' '.join(f'{n}=...' for n in wanted)}; missing "
            f"{missing or 'none'}, unknown {unknown or 'none'}."
        )
    return functools.partial(known[family], **{n: _setting(v) for n, v in settings.items()})


def _setting(text: str) -> object:
    words = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return int(text) if text.isdigit() else words.get(text, text)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes a second, read + write: the figure on record, or a 2 GiB copy."""
    return COPY_RATE.get(device) or measured_copy_rate()


def measured_copy_rate() -> float:
    """Bytes a second, read + write, of a 2 GiB copy."""
    source = torch.empty(2**29, device="cuda")
    target = torch.empty_like(source)
    ms = do_bench(lambda: target.copy_(source), warmup=25, rep=100, return_mode="median")
    return 2 * source.nbytes / float(ms) * 1e3  # type: ignore[arg-type]


def floor(work: Work, device: str) -> float:
    """Milliseconds below which nothing can do this work."""
    return 1e3 * max(
        work.bytes / copy_rate(device), work.operations / MATRIX_RATE,
        work.exponentials / EXPONENTIAL_RATE,
    )  # fmt: skip


def measure(name: str, make: Callable[[], Case], peers: bool = True) -> Iterator[dict]:
    """One row for our kernel and one a peer: times, floors, error. A failure is its own row."""
    case = make()
    device = torch.cuda.get_device_name()
    floors = [floor(case.forward, device), floor(case.backward, device)]
    floors = dict(zip(DIRECTIONS, (floors[0], sum(floors)), strict=True))
    ours = {"dsf": (case.function, case.tensors)}
    for who, (function, tensors) in (ours | (case.peers if peers else {})).items():
        units = worst_units(case) if who == "dsf" else math.nan
        row = {"case": name, "name": who, "floor": floors, "units": units, "device": device}
        yield row | time_both(function, tensors)


def worst_units(case: Case) -> float:
    """The largest error of output and gradients on the short input, in units (README)."""
    tensors = case.short
    dtype = min((t.dtype for t in tensors), key=lambda d: torch.finfo(d).bits)
    results = []
    for function, change in (
        (case.function, lambda t: t),
        (case.reference, lambda t: t.double()),
        (
            case.bound or case.reference,
            lambda t: t.double() if bool((t <= 0).all()) else t.double().abs(),
        ),
    ):  # the third gives M: a tensor of logarithms, never positive, has no absolute value to take
        leaves = [change(t).detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        ones = torch.ones_like(y)
        gradients = torch.autograd.grad(y, leaves, ones) if y.requires_grad else ()
        results.append([y.detach(), *gradients])
    worst = 0.0
    for found, true, size in zip(*results, strict=True):
        if case.by_row:
            size = true.abs().amax(-1, keepdim=True).clamp_min(true.square().mean().sqrt())
        error = (found.double() - true).abs() - torch.finfo(found.dtype).eps / 2 * true.abs()
        error = torch.where(torch.isfinite(found), error, math.inf)
        units = torch.where(error > 0, error / (UNIT[dtype] * size.abs()), 0.0)
        worst = max(worst, float(units.max()))
    return worst


def replayed(function: Callable[[], object]) -> Callable[[], None]:
    """The function captured in a CUDA graph."""
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


def milliseconds(function: Callable[[], object]) -> dict[str, float | str]:
    """Median times eager and replayed, or the name of the error."""
    times: dict[str, float | str] = {}
    for mode, prepare in zip(MODES, (lambda f: f, replayed), strict=True):
        try:
            times[mode] = do_bench(prepare(function), warmup=25, rep=100, return_mode="median")
        except Exception as error:
            times[mode] = type(error).__name__
    return times


def time_both(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> dict[str, dict]:
    """Forward without a graph of gradients, and forward + backward to every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    try:
        with torch.no_grad():
            upstream = torch.randn_like(function(*tensors))
    except Exception as error:
        return {key: dict.fromkeys(MODES, type(error).__name__) for key in DIRECTIONS}

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    return {"forward": milliseconds(forward), "both": milliseconds(both)}


def table(rows: list[dict]) -> str:
    """The rows in Markdown: milliseconds, in brackets the multiple of the floor."""
    lines = [
        "| case | implementation | floor ms, fwd / fwd+bwd | fwd eager | fwd graph | "
        "fwd+bwd eager | fwd+bwd graph | worst error, units |",
        "| --- |" + " --- |" * 7,
    ]
    previous = ""
    for row in rows:
        cells = [_cell(row[d][m], row["floor"][d]) for d in DIRECTIONS for m in MODES]
        units = "" if math.isnan(row["units"]) else f"{row['units']:.2f}"
        ours = row["name"] == "dsf"
        floors = " / ".join(f"{row['floor'][d]:.3f}" for d in DIRECTIONS) if ours else ""
        case = "" if row["case"] == previous else row["case"]
        who = "**dsf**" if ours else row["name"]
        lines.append(f"| {case} | {who} | {floors} | {' | '.join(cells)} | {units} |")
        previous = row["case"]
    return "\n".join(lines) + "\n"


def _cell(time: float | str, least: float) -> str:
    return f"{time:.3f} ({time / least:.2f})" if isinstance(time, float) else str(time)


def versions() -> dict[str, str]:
    """What the times depend on."""
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "ptxas": compiler.ptxas_version(),
        "cuda": str(torch.version.cuda),
    }  # fmt: skip
