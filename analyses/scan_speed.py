"""How fast and how exact is the chunked scan, against the loop in the same precision?

Prints one row per structure and decay family: seconds of `dsf.scanning.loop` and of
`dsf.scan(..., backend="chunked")`, their ratio, and the largest errors of both in units of
round-off against the float64 loop: |error| / (u M), M the scan of absolute values (for the delta
rules, whose M grows without bound, the largest output of the head). Times are the best of several
runs, the two taken turn about; the scan checks all that a user's call checks.

    python analyses/scan_speed.py                      # 2 threads, length 4096, 8 heads, 64 x 64
    python analyses/scan_speed.py --structures diagonal --families half zero --backward
    python analyses/scan_speed.py --cpu-time           # one thread, on a machine that is busy
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dsf
from dsf.scanning import loop
from dsf.transitions import Diagonal, DiagonalLowRank, Householder, Identity, Scalar, Transition

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from decays import FAMILIES, decay_parts  # noqa: E402

COLUMNS = (
    "structure", "family", "loop_s", "chunked_s", "ratio", "loop_units", "chunked_units",
    "loop_both_ways_s", "chunked_both_ways_s", "ratio_both_ways",
)  # fmt: skip
STRUCTURES = ("identity", "scalar", "diagonal", "householder", "diagonal_low_rank")
UNIT = 2.0**-24


def main() -> None:
    """Measure, print, write the CSV file."""
    args = _arguments()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    _settle_the_allocator()
    cases = [
        (s, f)
        for s in args.structures
        for f in (["none"] if s in ("identity", "householder") else args.families)
    ]
    setting = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"{'processor time of 1 thread' if args.cpu_time else f'{args.threads} threads'}, "
        f"float32, batch 1, length {args.length}, {args.heads} heads, "
        f"{args.states} states, {args.channels} channels, best of {args.repeats}"
    )
    print(setting)
    print("".join(f"{c:>{_width(c)}}" for c in _shown(args)))
    rows = []
    for structure, family in cases:
        row = measure(structure, family, args)
        print("".join(f"{_text(row[c]):>{_width(c)}}" for c in _shown(args)), flush=True)
        rows.append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out}")
    if args.markdown:
        _write_page(args.markdown, setting, rows, _shown(args))


def _write_page(
    path: Path, setting: str, rows: list[dict[str, object]], columns: tuple[str, ...]
) -> None:
    lines = [
        "# Speed and errors of the chunked scan",
        "",
        f"Written by `python analyses/scan_speed.py {' '.join(sys.argv[1:])}`. Loop: "
        "`dsf.scanning.loop`, the definition in the same precision; "
        'chunked: `dsf.scan(..., backend="chunked")`, its checks included. Units: '
        "|error| / (u M) against the float64 loop, u = 2^-24, M the scan of absolute values (for "
        "the delta rules the largest output of the head).",
        "",
        setting + ".",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(_text(row[c]) for c in columns) + " |" for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n")


def measure(structure: str, family: str, args: argparse.Namespace) -> dict[str, object]:
    """One row of the table."""
    A = _transition(structure, family, args)
    g = torch.Generator().manual_seed(1)
    lead = (1, args.length, args.heads)
    B = torch.randn(*lead, args.states, 1, generator=g) / args.states**0.5
    C = torch.randn(*lead, 1, args.states, generator=g) / args.states**0.5
    u = torch.randn(*lead, args.channels, generator=g)
    r = dsf.Recurrence(A, B, C)
    dtype = torch.complex64 if A.is_complex else torch.float32
    state = torch.zeros(1, args.heads, args.states, args.channels, dtype=dtype)

    def slow(r: dsf.Recurrence, u: Tensor) -> Tensor:
        return loop(r.A, r.B, r.C, u.unsqueeze(3).to(dtype), state)[0].squeeze(3)

    def fast(r: dsf.Recurrence, u: Tensor) -> Tensor:
        return dsf.scan(r, u, "chunked", chunk=args.chunk)

    row: dict[str, object] = dict.fromkeys(COLUMNS, "")
    with torch.no_grad():
        t_loop, t_chunked = _times([lambda: slow(r, u), lambda: fast(r, u)], args)
        row.update(structure=structure, family=family, loop_s=t_loop, chunked_s=t_chunked,
                   ratio=t_loop / t_chunked)  # fmt: skip
        if not args.no_errors:
            exact = dsf.scan(r, u, "reference")
            size = _size(r, u, exact)
            row.update(loop_units=_units(slow(r, u), exact, size),
                       chunked_units=_units(fast(r, u), exact, size))  # fmt: skip
    if args.backward:
        t_loop, t_chunked = _times([_both_ways(slow, r, u), _both_ways(fast, r, u)], args)
        row.update(loop_both_ways_s=t_loop, chunked_both_ways_s=t_chunked,
                   ratio_both_ways=t_loop / t_chunked)  # fmt: skip
    return row


def _transition(structure: str, family: str, args: argparse.Namespace) -> Transition:
    n, lead = args.states, (1, args.length, args.heads)
    g = torch.Generator().manual_seed(2)
    k = torch.nn.functional.normalize(torch.randn(*lead, n, generator=g), dim=-1)
    strength = torch.rand(*lead, generator=g)
    if structure == "identity":
        return Identity(n)
    if structure == "householder":
        return Householder(strength, k)
    if structure == "scalar":
        return Scalar(*_decays(family, lead), n_state=n)
    log, sign, phase = _decays(family, (*lead, n))
    if structure == "diagonal":
        return Diagonal(log, sign, phase)
    left = (strength[..., None] * k * log.exp())[..., None]  # a gated delta rule
    return DiagonalLowRank(log, sign, phase, left=left, right=k[..., None])


def _decays(family: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if family == "mild":  # what trained gates look like: 0.9 to 1
        g = torch.Generator().manual_seed(3)
        return -0.1 * torch.rand(shape, generator=g), None, None
    return decay_parts(family, shape, 3, torch.float32)


def _size(r: dsf.Recurrence, u: Tensor, exact: Tensor) -> Tensor:
    """M, what errors are measured by."""
    A = r.A
    if isinstance(A, Householder | DiagonalLowRank):
        return exact.abs().amax((1, 3), keepdim=True)
    if isinstance(A, Diagonal):
        A = Diagonal(A.log_decay)
    elif isinstance(A, Scalar):
        A = Scalar(A.log_decay, n_state=A.n_state)
    sizes = r.replace(A=A, B=r.B.abs(), C=r.C.abs())  # type: ignore[union-attr]
    return dsf.scan(sizes, u.abs(), "reference")


def _units(found: Tensor, exact: Tensor, size: Tensor) -> float:
    error = (found.to(exact.dtype) - exact).abs()
    error = error.masked_fill(error <= torch.finfo(torch.float32).tiny, 0.0)
    return float((error / (UNIT * size.abs())).nan_to_num(0.0, posinf=math.inf).max())


def _settle_the_allocator() -> None:
    """Free one large tensor: glibc then keeps freed memory instead of returning it page by page.

    Without, the loop of a fresh process can spend most of its time on page faults, which would
    flatter the chunked scan.
    """
    torch.empty(31 * 2**18)


def _both_ways(run: Callable[..., Tensor], r: dsf.Recurrence, u: Tensor) -> Callable[[], None]:
    r = r.replace(B=r.B.clone().requires_grad_(), C=r.C.clone().requires_grad_())  # type: ignore[union-attr]
    u = u.clone().requires_grad_()

    def work() -> None:
        y = run(r, u)
        torch.autograd.grad(y.abs().sum(), [r.B, r.C, u])  # type: ignore[list-item]

    return work


def _times(jobs: list[Callable[[], object]], args: argparse.Namespace) -> list[float]:
    """Best of the runs of each job; quick jobs run more often, for the same chance of a best."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    best = [math.inf] * len(jobs)
    for _ in range(args.repeats):
        for i, job in enumerate(jobs):
            for _ in range(1 + 3 * i):  # the chunked scan is short
                start = clock()
                job()
                best[i] = min(best[i], clock() - start)
    return best


def _shown(args: argparse.Namespace) -> tuple[str, ...]:
    return COLUMNS if args.backward else COLUMNS[:7]


def _width(column: str) -> int:
    return 25 if column in ("structure", "family") else len(column) + 2


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    add("--families", nargs="+", default=["mild", *FAMILIES], choices=["mild", *FAMILIES])
    for name, size in (("length", 4096), ("heads", 8), ("states", 64), ("channels", 64)):
        add(f"--{name}", type=int, default=size)
    add("--chunk", type=int, default=None, help="steps of a chunk; default by structure")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=5)
    add("--cpu-time", action="store_true", help="processor time of one thread, not the clock's")
    add("--backward", action="store_true", help="also time outputs and gradients together")
    add("--no-errors", action="store_true", help="times only")
    add("--markdown", type=Path, default=None, help="also write the table as a page")
    add("--out", type=Path, default=ROOT / "results" / "scan_speed.csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
