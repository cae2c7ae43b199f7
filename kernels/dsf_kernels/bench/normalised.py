"""Cases of normalised_scan: linear attention divided by its kernel sum, features elu + 1."""

import contextlib
import functools
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.normalised_scan import normalised_scan
from dsf_kernels.reference import normalised_scan_reference
from dsf_kernels.reference.normalised import normalised_scan_bound

CHUNK = 64  # of the operations counted
EPS = 1e-10  # fla's


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int, channel: int,
         decay: str | None = None) -> Case:  # fmt: skip
    """Features of normal numbers, values of unit variance; decay none or one a "token".

    The ones column counts as one more channel. The peer has no decay.
    """

    def draw(batch, length):
        normal = torch.randn((2, batch, length, head, state), device="cuda")
        query, key = (torch.nn.functional.elu(normal) + 1).to(dtype)
        value = torch.randn(batch, length, head, channel, device="cuda").to(dtype)
        token = -0.1 * torch.rand(batch, length, head, device="cuda")
        return (query, key, value, token) if decay == "token" else (query, key, value)

    tensors = draw(batch, length)
    options = {"scale": state**-0.5, "eps": EPS}
    token, size = batch * length, torch.finfo(dtype).bits // 8
    key_bytes, value_bytes = token * head * state * size, token * head * channel * size
    wide = channel + 1
    forward = Work(
        2 * key_bytes + 2 * value_bytes,
        token * head * (4 * state * wide + 2 * CHUNK * (state + wide)),
    )
    backward = Work(
        4 * key_bytes + 3 * value_bytes,
        token * head * (10 * state * wide + 2 * CHUNK * (3 * state + 2 * wide)),
    )
    peers = {}
    with contextlib.suppress(ImportError):
        call = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        if decay is None:
            peers["fla chunk_linear_attn(normalize=True)"] = (
                lambda *t: call(*t, scale=options["scale"], normalize=True)[0], tensors,
            )  # fmt: skip
    return Case(
        lambda *t: normalised_scan(*t, **options)[0], tensors, forward, backward,
        lambda *t: normalised_scan_reference(*t, **options)[0], draw(2, 257), peers,
        bound=lambda *t: normalised_scan_bound(*t, **options)[0],
    )  # fmt: skip


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    "c normalised bf16 8 x 4096, 16 heads, 128 x 128": lambda: BF16(8, 4096, 16, 128, 128),
    "c normalised bf16 8 x 4096, 16 heads, 128 x 128, a decay a token": lambda: BF16(
        8, 4096, 16, 128, 128, "token"
    ),
    "c normalised bf16 8 x 4096, 16 heads, 64 x 64": lambda: BF16(8, 4096, 16, 64, 64),
    "c normalised bf16 1 x 1024, 4 heads, 64 x 64": lambda: BF16(1, 1024, 4, 64, 64),
}
