"""The cases of `delta_scan`: DeltaNet and Gated DeltaNet."""

import contextlib
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.delta_scan import delta_scan
from dsf_kernels.reference import delta_scan_reference

CHUNK = 64


def _draw(batch, length, head, group, width, gated, dtype=torch.bfloat16):
    def normal(*shape):
        return torch.randn(shape, device="cuda")

    key = torch.nn.functional.normalize(normal(batch, length, group, width), dim=-1)
    tensors = [normal(batch, length, group, width), key, normal(batch, length, head, width)]
    tensors = [t.to(dtype) for t in tensors]
    tensors.append(torch.rand(batch, length, head, device="cuda").to(dtype))
    if gated:
        tensors.append(-torch.rand(batch, length, head, device="cuda") * 0.1)
    return tuple(tensors)


def case(batch: int, length: int, head: int, group: int, width: int, gated: int) -> Case:
    """Unit keys, write strengths uniform in (0, 1), log decays in (-0.1, 0) when gated (1)."""
    scale = width**-0.5
    tensors = _draw(batch, length, head, group, width, gated)
    token = batch * length
    shared, own = 2 * token * group * width, 2 * token * head * width
    scalars = token * head * (2 + 4 * gated)
    forward = Work(2 * shared + 2 * own + scalars,
                   token * head * (6 * width**2 + 8 * CHUNK * width))  # fmt: skip
    backward = Work(4 * shared + 3 * own + 2 * scalars,
                    token * head * (16 * width**2 + 20 * CHUNK * width))  # fmt: skip
    peers = {}
    with contextlib.suppress(ImportError):
        if gated:
            peer = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
            peers["fla chunk_gated_delta_rule"] = (
                lambda q, k, v, b, g: peer(q, k, v, g, b, scale=scale)[0], tensors,
            )  # fmt: skip
        elif group == head:
            plain = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
            peers["fla chunk_delta_rule"] = (
                lambda q, k, v, b: plain(q, k, v, b, scale=scale)[0], tensors,
            )  # fmt: skip
    return Case(
        lambda *t: delta_scan(*t, scale=scale)[0], tensors, forward, backward,
        lambda *t: delta_scan_reference(*t, scale=scale)[0],
        _draw(2, 257, 2, 1 if group < head else 2, width, gated), peers, by_row=True,
    )  # fmt: skip


CASES = {
    "e delta rule bf16 8 x 4096, 16 heads, 128 x 128": lambda: case(8, 4096, 16, 16, 128, 0),
    "e gated delta rule, same": lambda: case(8, 4096, 16, 16, 128, 1),
    "e gated bf16 1 x 32768, 16 key heads, 64 value heads, 128": lambda: case(
        1, 32768, 64, 16, 128, 1
    ),
    "e gated bf16 1 x 8192, 2 key heads, 8 value heads, 128": lambda: case(1, 8192, 8, 2, 128, 1),
}
