"""Cases of monarch_attention: softmax attention projected onto Monarch matrices, forward and both.

The published protocol: noise, fp16, 12 heads, width 64, one step, no mask. The peers compute
softmax attention itself, which on noise is far from the projection: the times compare, the
outputs do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsf_kernels.bench import Case, Work
from dsf_kernels.monarch_attention import monarch_attention
from dsf_kernels.reference import monarch_attention_reference


def softmax_attention(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Not causal, by one backend of torch, tensors (batch, head, time, width)."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    return run


def case(dtype: torch.dtype, batch: int, length: int, head: int = 12, width: int = 64,
         block: int = 64, steps: int = 1) -> Case:  # fmt: skip
    """Noise of unit variance."""

    def draw(batch, length, head):
        return tuple(torch.randn(3, batch, length, head, width, device="cuda").to(dtype))

    tensors = draw(batch, length, head)
    n_block = -(-length // block)
    token = batch * length * head
    size = torch.finfo(dtype).bits // 8
    forward = Work(
        token * 4 * width * size,
        token * 2 * width * ((2 * steps + 1) * block + 2 * steps * n_block),
        token * steps * (block + n_block),
    )
    backward = Work(
        token * 7 * width * size,
        token * 2 * width * ((7 * steps + 2) * block + (7 * steps - 1) * n_block),
        token * steps * (block + n_block),
    )
    moved = tuple(t.transpose(1, 2).contiguous() for t in tensors)
    peers = {
        f"torch SDPA {name}": (softmax_attention(backend), moved)
        for name, backend in {
            "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
        }.items()
    }  # fmt: skip
    short = min(block, 16)
    return Case(
        lambda *t: monarch_attention(*t, block=block, steps=steps), tensors, forward, backward,
        lambda *t: monarch_attention_reference(*t, block=block, steps=steps),
        draw(2, short * block - 3, 2), peers, by_row=True,
    )  # fmt: skip


FP16 = torch.float16
CASES = {
    "g fp16 32 x 256, 12 heads, 64": lambda: case(FP16, 32, 256, block=16),
    "g fp16 1 x 4096, 12 heads, 64": lambda: case(FP16, 1, 4096, block=64),
    "g fp16 1 x 16384, 12 heads, 64": lambda: case(FP16, 1, 16384, block=128),
    "g fp16 1 x 4096, 12 heads, 64, 3 steps": lambda: case(FP16, 1, 4096, block=64, steps=3),
}
