"""Cases of mlstm_scan: a matrix memory with exponential input gates and a bounded divisor."""

import contextlib
import functools
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.mlstm_scan import mlstm_scan
from dsf_kernels.reference.mlstm import mlstm_scan_reference

CHUNK = 64  # of the operations counted
PEER = "mlstm_kernels.torch.chunkwise.triton_xl_chunk"


def _draw(dtype, batch, length, head, state, channel):
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    token = (batch, length, head)
    rows = [normal(*token, width).to(dtype) for width in (state, state, channel)]
    return *rows, normal(*token) - 4, 4 + normal(*token)


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int, channel: int) -> Case:
    """Unit variance; input gates about -4, forget gates about 4, in float32."""
    scale = state**-0.5
    tensors = _draw(dtype, batch, length, head, state, channel)
    token, size = batch * length * head, torch.finfo(dtype).bits // 8
    wide, gates = token * (state + channel) * size, 8 * token
    pairs = 2 * CHUNK * (state + channel)
    forward = Work(2 * wide + gates, token * (4 * state * channel + pairs))
    backward = Work(
        wide + token * (3 * state + 2 * channel) * size + 2 * gates,
        token * (10 * state * channel + 2 * CHUNK * (3 * state + 2 * channel)),
    )
    peers = {}
    with contextlib.suppress(ImportError):
        call = importlib.import_module(PEER).mlstm_chunkwise__xl_chunk
        swapped = tuple(t.transpose(1, 2).contiguous() for t in tensors)
        peers["mlstm_kernels xl_chunk"] = (
            functools.partial(call, return_last_states=False, autocast_kernel_dtype=dtype),
            swapped,
        )
    return Case(
        lambda *t: mlstm_scan(*t, scale=scale)[0], tensors, forward, backward,
        lambda *t: mlstm_scan_reference(*t, scale=scale)[0],
        _draw(dtype, 2, 257, 2, state, channel), peers, by_row=True,
    )  # fmt: skip


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    "c mLSTM bf16 8 x 4096, 16 heads, 128 x 128": lambda: BF16(8, 4096, 16, 128, 128),
    "c mLSTM bf16 8 x 4096, 8 heads, 256 x 256": lambda: BF16(8, 4096, 8, 256, 256),
    "c mLSTM bf16 1 x 1024, 4 heads, 64 x 64": lambda: BF16(1, 1024, 4, 64, 64),
}
