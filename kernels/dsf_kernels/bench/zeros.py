"""The cases of `zeros_scan`: ZeroS with all its orders."""

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.reference import zeros_scan_reference
from dsf_kernels.zeros_scan import zeros_scan

CHUNK = 64


def _draw(batch, length, head, width, dtype=torch.bfloat16):
    def normal(*shape):
        return torch.randn(shape, device="cuda")

    query, key = (
        torch.nn.functional.normalize(normal(batch, length, head, width), dim=-1) for _ in range(2)
    )
    streams = [t.to(dtype) for t in (query, key, normal(batch, length, head, width))]
    return (*streams, normal(batch, length, head),
            *(torch.sigmoid(normal(batch, length, head)) for _ in range(2)),
            torch.tanh(normal(batch, length, head)))  # fmt: skip


def case(batch: int, length: int, head: int, width: int) -> Case:
    """Unit queries and keys, normal logits, gates of a sigmoid (zero order: of a tanh)."""
    tensors = _draw(batch, length, head, width)
    rows = batch * length * head
    forward = Work(rows * (8 * width + 16), rows * (12 * width**2 + 4 * CHUNK * width))
    backward = Work(rows * (14 * width + 32), rows * (30 * width**2 + 10 * CHUNK * width))
    return Case(
        lambda *t: zeros_scan(*t)[0], tensors, forward, backward,
        lambda *t: zeros_scan_reference(*t)[0], _draw(2, 257, 2, width), {}, by_row=True,
    )  # fmt: skip


CASES = {
    "f zeros bf16 8 x 4096, 16 heads, 128 x 128": lambda: case(8, 4096, 16, 128),
    "f zeros bf16 8 x 4096, 32 heads, 64 x 64": lambda: case(8, 4096, 32, 64),
    "f zeros bf16 1 x 1048576, 2 heads, 128 x 128": lambda: case(1, 1_048_576, 2, 128),
}
