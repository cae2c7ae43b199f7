"""Does a model trained through the kernels follow the loss curve of the torch path?

One residual language model of bytes (embedding, blocks of mixer and MLP, tied head) a family of
kernels, trained three times from the same weights on the same batches of the repository's own
text: its scans in the kernel; in torch; and in torch with every output of a scan, and with it its
gradient, changed at random by one rounding of the type. The third curve says how far apart
rounding alone drives two runs, and the kernel's is judged by it: it matches when its smoothed
curve leaves torch's by at most FACTOR times as much, or by FLOOR of the loss. Inputs of a scan
are rounded to --dtype in all three; weights, gates and everything else are float32.
MonarchAttention sees all tokens: there masked bytes are restored, elsewhere the next byte is
foretold.

    python analyses/train_through_kernels.py                     # a CUDA device, minutes
    python analyses/train_through_kernels.py --families c e --dtype bfloat16
    python analyses/train_through_kernels.py --device cpu --layers 2 --width 32 --steps 3

On a CPU, or where a kernel refuses, torch runs in its place, and the table says so. Curves and
table are written after every family (.json, .md), the data set and the figure at the end, or from
curves made elsewhere by --read. A family that fails is named, and the others run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _train_curves import KERNEL, RUNS, UNIT, Found, Run, dataset, draw, page, read, row_of, table
from _train_mixer import Mixer
from _train_mixer import Path as Scans
from _train_mixers import FAMILIES
from torch import Tensor, nn
from torch.nn import functional

import dsf
from dsf import plot, results

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("data/*.txt", "README.md", "docs/*.md", "docs/howto/*.md", "docs/decisions/*.md")
NAME = "train_through_kernels"
N_BYTE, MASK = 257, 256
MASKED = 0.15
WARM_UP = 20
"""Steps in which the learning rate rises; the first quarter of them is not timed."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, mixer: Mixer, width: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Logits of bytes (batch, time, byte) from bytes."""

    def __init__(self, family: str, args: argparse.Namespace, scans: Scans) -> None:
        super().__init__()
        width, heads = args.width, max(1, args.width // args.head)
        self.scans = scans
        self.embedding = nn.Embedding(N_BYTE, width)
        self.place = nn.Parameter(0.02 * torch.randn(args.length, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(FAMILIES[family](width, heads, scans), width) for _ in range(args.layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def main() -> None:
    """Train each family three times; write and print as it goes."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    found, failed = read(args.read) if args.read else train_families(args)
    print(table(found["rows"]))
    if found["rows"]:
        keep(found, args.out)
        data = dataset(found)
        figure = draw(data)
        for kind in ("pdf", "png"):
            plot.save_figure(figure, args.out / f"{NAME}.{kind}")
        results.save(data, args.out / f"{NAME}.nc", overwrite=True)
    print(f"wrote {args.out / NAME}.json, .md, .nc, .pdf, .png")
    if failed:
        raise SystemExit("\n".join(failed))


def train_families(args: argparse.Namespace) -> tuple[Found, list[str]]:
    """The curves, a row of the table for each family and what the run was; what failed."""
    torch.set_float32_matmul_precision("highest")
    text, about = corpus(args)
    found: Found = {"about": about, "rows": [], "curves": {}}
    failed = []
    print(about)
    for family in args.families:
        try:
            runs, ran = train_all(family, text, args)
        except Exception as error:
            failed.append(f"{family}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        found["curves"][family] = {name: run.losses.tolist() for name, run in runs.items()}
        found["rows"].append(row_of(family, runs, ran))
        print(table(found["rows"][-1:]).splitlines()[-1], flush=True)
        keep(found, args.out)
    return found, failed


def keep(found: Found, folder: Path) -> None:
    """Write what there is so far."""
    (folder / f"{NAME}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / f"{NAME}.md").write_text(page(found), encoding="utf-8")


def corpus(args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The bytes, and what a reader needs to know of the run."""
    files = [p for pattern in args.text for p in sorted(ROOT.glob(pattern))]
    raw = b"".join(p.read_bytes() for p in files)
    if len(raw) <= args.length + 1:
        raise SystemExit(f"--text: expected more than {args.length + 1} bytes, got {len(raw)}.")
    cuda = args.device == "cuda"
    about = {
        "layers": args.layers, "width": args.width, "length": args.length, "batch": args.batch,
        "dtype": str(args.dtype).removeprefix("torch."), "seed": args.seed,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__, "dsf": dsf.__version__, "bytes": len(raw),
        "text": hashlib.blake2b(raw, digest_size=8).hexdigest(),
    }  # fmt: skip
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long(), about


def batches(text: Tensor, causal: bool, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and targets (step, batch, time); -100 where nothing is asked."""
    draw = torch.Generator().manual_seed(args.seed)
    shape = (args.steps, args.batch)
    start = torch.randint(len(text) - args.length, shape, generator=draw)
    tokens = text[start[..., None] + torch.arange(args.length + 1)]
    x, y = tokens[..., :-1], tokens[..., 1:]
    if not causal:
        hidden = torch.rand(x.shape, generator=draw) < MASKED
        x, y = x.masked_fill(hidden, MASK), x.masked_fill(~hidden, -100)
    return x.to(args.device), y.to(args.device)


def train_all(family: str, text: Tensor, args: argparse.Namespace) -> tuple[dict[str, Run], str]:
    """The three runs of a family, and what the first one ran in."""
    data = batches(text, FAMILIES[family].causal, args)
    torch.manual_seed(args.seed)
    first = LanguageModel(family, args, Scans(False, args.dtype)).to(args.device)
    gap = kernel_gap(first, data[0][0])
    runs = {}
    for name in RUNS:
        model = copy.deepcopy(first)
        model.scans.kernel = name == "kernel" and not gap
        model.scans.noise = UNIT[args.dtype] if name == "perturbed" else 0.0
        runs[name] = train(model, data, args)
    return runs, gap or KERNEL


def kernel_gap(model: LanguageModel, tokens: Tensor) -> str:
    """Why torch runs in the kernel's place, in the kernel's words; "" when it does not."""
    model = copy.deepcopy(model)
    model.scans.kernel = True
    try:
        model(tokens)
    except ModuleNotFoundError as error:
        return f"torch ({error})"
    except NotImplementedError as error:
        return f"torch ({str(error).split(': ', 1)[-1].split('. ')[0]})"
    return ""


def train(model: LanguageModel, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> Run:
    """AdamW over the batches in order."""
    torch.manual_seed(args.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01,
                                  fused=args.device == "cuda")  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1, (n + 1) / WARM_UP))
    losses, seconds = [], []
    for x, y in zip(*data, strict=True):
        begin = time.perf_counter()
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    timed = seconds[min(WARM_UP // 4, len(seconds) - 1) :]
    return Run(np.array(losses), statistics.median(timed), model.scans.auto)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The flags, of the command line unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    sizes = {"layers": 12, "width": 768, "head": 64, "steps": 200, "length": 512, "batch": 2,
             "seed": 0}  # fmt: skip
    for name, size in sizes.items():
        add(f"--{name}", type=int, default=size)
    add("--rate", type=float, default=3e-4, help="of learning, after the warm-up")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--text", nargs="+", default=list(TEXTS), help="patterns below the repository's root")
    add("--read", type=Path, nargs="+", help="draw what such .json files hold; train nothing")
    add("--out", type=Path, default=ROOT / "results" / "train_through_kernels")
    args = parser.parse_args(given)
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
