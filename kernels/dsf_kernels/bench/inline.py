"""Cases of inline_scan and inline_mix, with the released scale width^(-1/2) / t."""

import contextlib
import functools
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.inline_scan import inline_mix, inline_scan
from dsf_kernels.reference import inline_mix_reference, inline_scan_reference
from dsf_kernels.reference.inline import inline_mix_bound, inline_scan_bound

CHUNK = 64  # of the operations counted


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int, channel: int,
         causal: bool = True) -> Case:  # fmt: skip
    """Unit variance. The state is one wider each way: sums of keys, values and tokens.

    No library has this attention; the peer is fla's divided by its kernel sum, of as many
    operations and bytes, on absolute values of the same queries and keys.
    """

    def draw(batch, length):
        query, key = torch.randn((2, batch, length, head, state), device="cuda").to(dtype)
        return query, key, torch.randn(batch, length, head, channel, device="cuda").to(dtype)

    query, key, value = tensors = draw(batch, length)
    options = {"scale": state**-0.5, "over_count": True}
    token, size = batch * length, torch.finfo(dtype).bits // 8
    key_bytes, value_bytes = token * head * state * size, token * head * channel * size
    cells, pairs = (state + 1) * (channel + 1), 2 * CHUNK * causal
    forward = Work(
        2 * key_bytes + 2 * value_bytes,
        token * head * (4 * cells + pairs * (state + channel + 2)),
    )
    backward = Work(
        4 * key_bytes + 3 * value_bytes,
        token * head * (10 * cells + pairs * (3 * state + 2 * channel + 5)),
    )
    peers = {}
    with contextlib.suppress(ImportError):
        call = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        if causal:
            peers["fla chunk_linear_attn(normalize=True)"] = (
                lambda *t: call(*t, scale=options["scale"], normalize=True)[0],
                (query.abs(), key.abs(), value),
            )  # fmt: skip
    if causal:

        def function(*t):
            return inline_scan(*t, **options)[0]

        def reference(*t):
            return inline_scan_reference(*t, **options)[0]

        def bound(*t):
            return inline_scan_bound(*t, **options)[0]
    else:
        function = functools.partial(inline_mix, **options)
        reference = functools.partial(inline_mix_reference, **options)
        bound = functools.partial(inline_mix_bound, **options)
    return Case(
        function, tensors, forward, backward, reference, draw(2, 257), peers, bound=bound,
    )  # fmt: skip


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    "f InLine bf16 8 x 4096, 16 heads, 128 x 128": lambda: BF16(8, 4096, 16, 128, 128),
    "f InLine bf16 8 x 4096, 16 heads, 64 x 64": lambda: BF16(8, 4096, 16, 64, 64),
    "f InLine bf16 8 x 4096, 16 heads, 128 x 128, not causal": lambda: BF16(
        8, 4096, 16, 128, 128, False
    ),
}
