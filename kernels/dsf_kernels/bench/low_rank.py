"""Cases of low_rank_scan: the delta rule with a decay a state (KDA), and RWKV-7."""

import contextlib
import importlib
import math

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.kda_scan import kda_scan
from dsf_kernels.low_rank_scan import low_rank_scan
from dsf_kernels.reference import kda_scan_reference, low_rank_scan_reference

CHUNK = 64  # of the operations counted


def case(kind: str, batch: int, length: int, head: int, width: int,
         dtype: torch.dtype = torch.bfloat16, form: str | None = None) -> Case:  # fmt: skip
    """kind kda or rwkv7: unit keys, strengths and rates uniform in (0, 1), log decays of KDA in
    (-0.1, 0), of RWKV-7 -exp(-1/2) sigmoid(noise); form as `low_rank_scan`."""
    makers = {"kda": _kda, "rwkv7": _rwkv7}
    if kind not in makers:
        raise ValueError(f"kind: expected kda or rwkv7, got {kind!r}.")
    draw, run, loop, peers = makers[kind](width, form)
    tensors = draw(batch, length, head, dtype)
    token, size = batch * length * head, torch.finfo(dtype).bits // 8
    streams = sum(t.shape[-1] == width and t.ndim == 4 for t in tensors)  # value and output too
    forward = Work(token * size * (streams + 1) * width,
                   token * (6 * width**2 + 8 * CHUNK * width), token * width)  # fmt: skip
    backward = Work(token * size * (2 * streams + 1) * width,
                    token * (16 * width**2 + 20 * CHUNK * width), token * width)  # fmt: skip
    return Case(
        run, tensors, forward, backward, loop, draw(2, 257, 2, dtype),
        {name: (peer, tensors) for name, peer in peers.items()}, by_row=True,
    )  # fmt: skip


def _normal(*shape):
    return torch.randn(shape, device="cuda")


def _unit(*shape):
    return torch.nn.functional.normalize(_normal(*shape), dim=-1)


def _kda(width, form):
    scale, peers = width**-0.5, {}

    def draw(batch, length, head, dtype):
        wide = (batch, length, head, width)
        drawn = [_normal(*wide), _unit(*wide), _normal(*wide)]
        strength, logs = torch.rand(wide[:3], device="cuda"), torch.rand(wide, device="cuda")
        return (*(t.to(dtype) for t in (*drawn, strength)), (-0.1 * logs).to(dtype))

    with contextlib.suppress(ImportError):
        peer = importlib.import_module("fla.ops.kda").chunk_kda
        peers["fla chunk_kda"] = lambda q, k, v, b, g: peer(
            q=q, k=k, v=v, g=g, beta=b, scale=scale
        )[0]
    return (
        draw, lambda *t: kda_scan(*t, scale=scale, form=form)[0],
        lambda *t: kda_scan_reference(*t, scale=scale)[0], peers,
    )  # fmt: skip


def _rwkv7(width, form):
    peers = {}

    def draw(batch, length, head, dtype):
        wide = (batch, length, head, width)
        removal, rate = _unit(*wide), torch.rand(wide, device="cuda")
        logs = -math.exp(-0.5) * torch.sigmoid(_normal(*wide))
        rows = (_normal(*wide), _normal(*wide), _normal(*wide), rate * removal, -removal, logs)
        return tuple(t.to(dtype) for t in rows)

    with contextlib.suppress(ImportError):
        peer = importlib.import_module("fla.ops.generalized_delta_rule").chunk_dplr_delta_rule
        peers["fla chunk_dplr_delta_rule"] = lambda q, k, v, x, w, g: peer(
            q=q, k=k, v=v, a=w, b=x, gk=g, scale=1.0
        )[0]
    return (
        draw, lambda *t: low_rank_scan(*t, form=form)[0],
        lambda *t: low_rank_scan_reference(*t)[0], peers,
    )  # fmt: skip


CASES = {
    "e KDA bf16 8 x 4096, 16 heads, 128 x 128": lambda: case(
        "kda", 8, 4096, 16, 128, form="chunk"
    ),
    "e RWKV-7 bf16 8 x 4096, 16 heads, 128 x 128": lambda: case(
        "rwkv7", 8, 4096, 16, 128, form="chunk"
    ),
    "e RWKV-7 bf16 8 x 4096, 32 heads, 64 x 64": lambda: case(
        "rwkv7", 8, 4096, 32, 64, form="chunk"
    ),
    "e KDA bf16 8 x 4096, 16 heads, 128 x 128, step by step": lambda: case(
        "kda", 8, 4096, 16, 128, form="serial"
    ),
}
