"""Cases of diagonal_decay_scan: a matrix state under one decay per state and token."""

import contextlib
import functools
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.diagonal_decay_scan import diagonal_decay_scan
from dsf_kernels.reference import diagonal_decay_scan_reference

CHUNK = 64  # of the operations counted


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int, channel: int,
         normaliser: float = 16.0) -> Case:  # fmt: skip
    """Unit variance; log decays as GLA draws them, log sigmoid(noise) / normaliser."""

    def draw(batch, length, head):
        wide = (batch, length, head, state)
        query, key = torch.randn((2, *wide), device="cuda").to(dtype)
        value = torch.randn(batch, length, head, channel, device="cuda").to(dtype)
        logs = torch.nn.functional.logsigmoid(torch.randn(wide, device="cuda")) / normaliser
        return query, key, value, logs.to(dtype)

    tensors = draw(batch, length, head)
    scale = state**-0.5
    token = batch * length * head
    size = torch.finfo(dtype).bits // 8
    forward = Work(
        token * size * (3 * state + 2 * channel),
        token * (4 * state * channel + 2 * CHUNK * (state + channel)),
        token * state,
    )
    backward = Work(
        token * size * (6 * state + 3 * channel),
        token * (10 * state * channel + 2 * CHUNK * (3 * state + 2 * channel)),
        token * state,
    )
    peers = {}
    with contextlib.suppress(ImportError):
        gla = importlib.import_module("fla.ops.gla").chunk_gla
        peers["fla chunk_gla"] = (
            lambda q, k, v, g: gla(q=q, k=k, v=v, g=g, scale=scale)[0],
            tensors,
        )
    return Case(
        lambda *t: diagonal_decay_scan(*t, scale=scale)[0], tensors, forward, backward,
        lambda *t: diagonal_decay_scan_reference(*t, scale=scale)[0], draw(2, 257, 2), peers,
    )  # fmt: skip


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    "d bf16 8 x 4096, 16 heads, 128 x 128": lambda: BF16(8, 4096, 16, 128, 128),
    "d bf16 8 x 4096, 16 heads, 128 x 128, strong decay": lambda: BF16(
        8, 4096, 16, 128, 128, normaliser=0.1
    ),
    "d bf16 8 x 4096, 32 heads, 64 x 64": lambda: BF16(8, 4096, 32, 64, 64),
    "d bf16 1 x 1024, 4 heads, 64 x 64": lambda: BF16(1, 1024, 4, 64, 64),
}
