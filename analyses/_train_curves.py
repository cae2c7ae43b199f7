"""Loss curves of a model trained by two paths: how far apart, table, data set, figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from _train_mixers import FAMILIES

from dsf import plot
from dsf._panels import new_figure

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Found = dict[str, Any]
"""About, rows and curves, as written to the .json file."""
KERNEL = "triton"
RUNS = ("kernel", "torch", "perturbed")
SMOOTH = 20
"""Steps whose mean is one point of a smoothed curve."""
FACTOR, FLOOR = 4.0, 1e-3
"""A curve matches within so many times the difference that rounding makes, or this of the loss."""
COLUMNS = (
    "family", "kernel", "ran", "dsf.scan takes", "s/step kernel", "s/step torch", "loss kernel",
    "loss torch", "largest", "mean", "smoothed", "rounding: largest", "mean ", "smoothed ",
    "matches",
)  # fmt: skip


@dataclasses.dataclass
class Run:
    """Losses of every step, median seconds of one, and what dsf.scan would have taken."""

    losses: np.ndarray
    seconds: float
    auto: str


def read(files: list[Path]) -> tuple[Found, list[str]]:
    """What one or several runs wrote, families joined; `about` is that of the last."""
    found: Found = {"about": {}, "rows": [], "curves": {}}
    for file in files:
        one = json.loads(file.read_text(encoding="utf-8"))
        found["about"] = one["about"]
        found["rows"] += one["rows"]
        found["curves"] |= one["curves"]
    return found, []


def smoothed(curve: np.ndarray) -> np.ndarray:
    """Running means over SMOOTH steps, or over all when there are fewer."""
    n = min(SMOOTH, len(curve))
    return np.convolve(curve, np.full(n, 1 / n), "valid")


def differences(curve: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Relative difference of two curves: largest and mean of a step, largest of the smoothed."""
    step = np.abs(curve - true) / true
    smooth = np.abs(smoothed(curve) - smoothed(true)) / smoothed(true)
    return float(step.max()), float(step.mean()), float(smooth.max())


def row_of(family: str, runs: dict[str, Run], ran: str) -> dict[str, Any]:
    """One line of the table."""
    true = runs["torch"].losses
    apart = differences(runs["kernel"].losses, true)
    rounding = differences(runs["perturbed"].losses, true)
    matches = "yes" if apart[2] <= max(FACTOR * rounding[2], FLOOR) else "NO"
    values = (
        family, FAMILIES[family].kernel_name, ran, runs["torch"].auto, runs["kernel"].seconds,
        runs["torch"].seconds, smoothed(runs["kernel"].losses)[-1], smoothed(true)[-1], *apart,
        *rounding, matches if ran == KERNEL else "torch twice",
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(found: Found) -> str:
    """The table with what the run was above and what the columns mean below."""
    header = ", ".join(f"{k} {v}" for k, v in found["about"].items())
    unit = UNIT[getattr(torch, found["about"]["dtype"])]
    legend = (
        f"Losses: means of the last {SMOOTH} steps, nats. Then the relative difference from "
        f"torch's curve: largest and mean of a step, largest between means of {SMOOTH} steps; of "
        f"the kernel's run, and of a torch run whose scans are changed by one rounding (u = "
        f"{unit:.2g}). Matches: smoothed <= the larger of {FACTOR:g} x that of rounding and "
        f"{FLOOR:g}."
    )
    return f"{header}\n\n{table(found['rows'])}\n\n{legend}\n"


def dataset(found: Found) -> xr.Dataset:
    """The curves and times, with units."""
    rows, curves = found["rows"], found["curves"]
    losses = np.array([[curves[r["family"]][name] for name in RUNS] for r in rows])
    times = np.array([[r["s/step kernel"], r["s/step torch"]] for r in rows])
    return xr.Dataset(
        {
            "loss": (("family", "run", "step"), losses, {"units": "nat"}),
            "seconds": (("family", "path"), times, {"units": "s"}),
            "ran": ("family", [r["ran"] for r in rows]),
        },
        coords={"family": [r["family"] for r in rows], "run": list(RUNS),
                "path": ["kernel", "torch"], "kernel": ("family", [r["kernel"] for r in rows])},
        attrs=found["about"],
    )  # fmt: skip


def draw(data: xr.Dataset) -> Any:
    """One panel a family: the kernel's curve solid, torch's dashed."""
    n = data.sizes["family"]
    columns = min(4, n)
    with plot.styled():
        figure = new_figure((1.9 * columns, 1.6 * -(-n // columns)))
        grid = figure.subplots(-(-n // columns), columns, sharex=True, squeeze=False)
        panels = list(grid.flat)
        for ax, family in zip(panels, data.family.values, strict=False):
            at = data.loss.sel(family=family)
            ax.plot(data.step, at.sel(run="kernel"), "-", linewidth=1.2, label="kernel")
            ax.plot(data.step, at.sel(run="torch"), "--", linewidth=0.9, label="torch")
            twice = "" if data.ran.sel(family=family) == KERNEL else " (torch)"
            ax.set_title(data.kernel.sel(family=family).item() + twice, loc="left")
        for ax in panels[n:]:
            ax.set_axis_off()
        panels[0].legend()
        figure.supxlabel("step")
        figure.supylabel("loss (nats a byte)")
    return figure
