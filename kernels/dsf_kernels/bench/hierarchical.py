"""Cases of hierarchical_attention and hierarchical_stream, against softmax attention itself.

Noise, fp16, 12 heads, width 64, branching 16.8.4.2 (the root takes as many groups as there are).
The peers compute softmax attention, which on noise is far from the projection onto tied matrices:
the times compare, the outputs do not.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsf_kernels.bench import Case, Work
from dsf_kernels.hierarchical_attention import hierarchical_attention
from dsf_kernels.hierarchical_stream import hierarchical_stream
from dsf_kernels.reference import hierarchical_attention_reference, hierarchical_stream_reference

BRANCHING = (16, 8, 4, 2)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def _softmax(backend, causal):
    def run(query, key, value):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal
            )

    return run


def _scores(length, causal):
    """Scores a token: those of its families, the root's the rest."""
    below = BRANCHING[:0:-1]
    span, found = 1, 0.0
    for b in below:
        found += b / (1 if causal else span)  # rows of a stream are not tied
        span *= b
    root = -(-length // span)
    return found / 2 + root / 2 if causal else found + root / span


def case(dtype: torch.dtype, batch: int, length: int, head: int = 12, width: int = 64,
         causal: int = 0) -> Case:  # fmt: skip
    """Noise of unit variance; causal: the streaming form."""

    def draw(batch, length, head):
        return tuple(torch.randn(3, batch, length, head, width, device="cuda").to(dtype))

    tensors = draw(batch, length, head)
    token, size = batch * length * head, torch.finfo(dtype).bits // 8
    scores = token * _scores(length, causal)
    forward = Work(token * 4 * width * size, scores * 4 * width, scores)
    backward = Work(token * 7 * width * size, scores * 10 * width, scores)
    function = hierarchical_stream if causal else hierarchical_attention
    loop = hierarchical_stream_reference if causal else hierarchical_attention_reference
    moved = tuple(t.transpose(1, 2).contiguous() for t in tensors)
    peers = {
        f"torch SDPA {name}": (_softmax(backend, bool(causal)), moved)
        for name, backend in BACKENDS.items()
    }
    return Case(
        lambda *t: function(*t, BRANCHING), tensors, forward, backward,
        lambda *t: loop(*t, BRANCHING), draw(2, 251, 2), peers, by_row=True,
    )  # fmt: skip


FP16 = torch.float16
CASES = {
    "g hierarchical fp16 1 x 1024, 12 heads, 64": lambda: case(FP16, 1, 1024),
    "g hierarchical fp16 1 x 16384, 12 heads, 64": lambda: case(FP16, 1, 16384),
    "g hierarchical fp16 8 x 16384, 12 heads, 64": lambda: case(FP16, 8, 16384),
    "g hierarchical stream fp16 1 x 16384, 12 heads, 64": lambda: case(FP16, 1, 16384, causal=1),
}
