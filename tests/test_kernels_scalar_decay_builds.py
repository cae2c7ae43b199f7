"""The kernels of scalar_decay_scan compiled ahead of time: they build, and what they use."""

import importlib
import re

import kernel_laws
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
SMALL = {"WIDTH": 64, "HAS_DECAY": True, "FIXED": False, "FULL": True}
WALK = SMALL | {"SLAB": 64, "HAS_INITIAL": True, "STORE": True, "FINAL": True}
WALK |= dict.fromkeys(("X_SHARE", "Y_SHARE", "W_SHARE"), 1) | {"table": None}
SHARED = {"WIDTH": 64, "FULL": True, "Q_SHARE": 2, "K_SHARE": 2, "table": None, "chunks": None}
SPREAD = {"CHANNELS": 64, "N_SLAB": 64, "P_SLAB": 64, "HEADS": 2}
ENDS = {"SLAB": 64, "HAS_INITIAL": True, "HAS_FINAL": False}


def packed(constants: dict) -> dict:
    """The same for sequences packed in a row."""
    return {k: v for k, v in constants.items() if k not in ("table", "chunks")} | {"FULL": False}


BUILDS = {  # module, kernel, constants
    "walk": ("chunk_kernel", "chunk_kernel", WALK | {"REVERSE": False}),
    "walk back": ("chunk_kernel", "chunk_kernel", WALK | {"REVERSE": True}),
    "walk packed": ("chunk_kernel", "chunk_kernel", packed(WALK) | {"REVERSE": False}),
    "short": ("scalar_decay_short", "short_kernel", WALK | {"REVERSE": False, "STAGES": 3}),
    "states": ("scalar_decay_states", "states_kernel", SHARED | ENDS),
    "states packed": ("scalar_decay_states", "states_kernel", packed(SHARED) | ENDS),
    "gradients": ("scalar_decay_adjoint", "gradient_kernel", SHARED | SPREAD),
    "gradients packed": ("scalar_decay_adjoint", "gradient_kernel", packed(SHARED) | SPREAD),
}
SLOW = ("walk back", "walk packed", "states packed", "gradients packed")
FLOATS = ("high", "low", "initial", "final", "grad_initial", "grad_final", "dl")
TENSORS = ("x", "y", "w", "out", "q", "k", "v", "dy", "states", "grads", "dq", "dk", "dv")
CONTIGUOUS = ("x_w", "y_w", "w_w", "q_w", "k_w", "v_w", "i_p", "f_p")


def build(name: str, architecture: int, record_property):
    module, kernel, constants = BUILDS[name]
    kernel = getattr(importlib.import_module(f"dsf_kernels.{module}"), kernel)
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    settings = launch.settings_of(torch.bfloat16, 64)._asdict()
    options = {"num_warps": settings.pop("num_warps")}
    fixed = settings | constants | dict.fromkeys(CONTIGUOUS, 1)
    types = dict.fromkeys(TENSORS, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
    types |= {"table": "*i64", "chunks": "*i64", "scale": "fp32", "initial_scale": "fp32"}
    return kernel_laws.build(kernel, architecture, types, fixed, options, record_property)


def overtaken(code: str) -> tuple[int, list[str]]:
    """Asynchronous copies in the loops of a kernel, and those that may come too soon.

    Triton 3.6 gives some tiles one buffer and issues the next copy into it while an asynchronous
    product may still read it: results then differ from run to run.
    """
    lines = code.splitlines()
    copies, wrong = 0, []
    for n, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        end = next(k for k in range(n + 1, len(lines)) if lines[k].startswith(indent + "}"))
        if any("scf.for" in inner for inner in lines[n + 1 : end]):
            continue
        buffers, source, reading = {}, {}, []
        for place, inner in enumerate(lines[:end]):
            name = inner.split(" = ")[0].strip()
            if found := re.search(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", inner):
                buffers[name], _ = int(found[1]), source.pop(name, None)
            elif found := re.search(r"ttg.memdesc_\w+ (%[\w.#]+)", inner):
                source[name] = source.get(found[1], found[1])
            if place <= n:
                continue
            if found := re.search(r"warp_group_dot (%[\w.#]+), (%[\w.#]+),", inner):
                reading.append({source.get(v, v) for v in found.groups()})
            elif found := re.search(r"warp_group_dot_wait .*pendings = (\d+)", inner):
                reading = reading[len(reading) - int(found[1]) :]
            elif found := re.search(r"async_copy_global_to_local \S+ (%[\w.#]+)", inner):
                tile = source.get(found[1], found[1])
                copies += 1
                if buffers.get(tile) == 1 and any(tile in tiles for tiles in reading):
                    wrong.append(inner.strip())
    return copies, wrong


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BUILDS]
)
def test_builds_for_hopper(name, record_property):
    built = build(name, 90, record_property)
    copies, wrong = overtaken(built.asm["ttgir"])
    assert copies
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_builds_for_ampere(name, record_property):
    build(name, 80, record_property)
