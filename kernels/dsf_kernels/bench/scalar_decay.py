"""Cases of scalar_decay_scan: a matrix state under no decay, one a head, or one a token."""

import contextlib
import functools
import importlib

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.reference import scalar_decay_scan_reference
from dsf_kernels.scalar_decay_scan import scalar_decay_scan

CHUNK = 64  # of the operations counted
PEERS = {None: "linear_attn", "head": "retention", "token": "simple_gla"}  # in fla.ops


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int, channel: int,
         decay: str | None = None, group: int = 0) -> Case:  # fmt: skip
    """Unit variance; decay none, one a "head" (no gradient) or one a "token"; group 0: no sharing.

    Score products are counted per head, also where heads share query and key.
    """
    group = group or head

    def draw(batch, length):
        query, key = torch.randn((2, batch, length, group, state), device="cuda").to(dtype)
        value = torch.randn(batch, length, head, channel, device="cuda").to(dtype)
        token = -0.1 * torch.rand(batch, length, head, device="cuda")
        return (query, key, value, token) if decay == "token" else (query, key, value)

    tensors = draw(batch, length)
    given = (-torch.linspace(0.01, 0.1, head, device="cuda"),) if decay == "head" else ()
    scale = state**-0.5
    token, size = batch * length, torch.finfo(dtype).bits // 8
    query_bytes, value_bytes = token * group * state * size, token * head * channel * size
    pairs = 2 * CHUNK * (state + channel)
    forward = Work(2 * query_bytes + 2 * value_bytes, token * head * (4 * state * channel + pairs))
    backward = Work(
        4 * query_bytes + 3 * value_bytes,
        token * head * (10 * state * channel + 2 * CHUNK * (3 * state + 2 * channel)),
    )
    peers = _peers(tensors, decay, scale) if group == head else _group_peers(tensors, scale)
    return Case(
        lambda *t: scalar_decay_scan(*t, *given, scale=scale)[0], tensors, forward, backward,
        lambda *t: scalar_decay_scan_reference(*t, *given, scale=scale)[0], draw(2, 257), peers,
    )  # fmt: skip


def _peers(tensors: tuple[torch.Tensor, ...], decay: str | None, scale: float) -> dict:
    """fla-core, when it is installed."""
    peers = {}
    with contextlib.suppress(ImportError):
        name = PEERS[decay]
        call = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
        plain = {} if decay else {"normalize": False}
        peers[f"fla chunk_{name}"] = (lambda *t: call(*t, scale=scale, **plain)[0], tensors)
    return peers


def _group_peers(tensors: tuple[torch.Tensor, ...], scale: float) -> dict:
    """mamba-ssm's SSD, when it is installed: its step sizes are our log decays, negated."""
    peers = {}
    with contextlib.suppress(ImportError):
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        scan, (query, key, value, decay) = module.mamba_chunk_scan_combined, tensors
        rate = -torch.ones(value.shape[2], device="cuda")
        peers["mamba-ssm SSD, chunk 256"] = (
            lambda x, dt, B, C: scan(x, dt, rate, B, C, 256), (value, -decay, key, query * scale),
        )  # fmt: skip
    return peers


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    "c bf16 8 x 4096, 16 heads, 128 x 128, no decay": lambda: BF16(8, 4096, 16, 128, 128),
    "c bf16 8 x 4096, 16 heads, 128 x 128, a decay a head": lambda: BF16(
        8, 4096, 16, 128, 128, "head"
    ),
    "c bf16 8 x 4096, 16 heads, 128 x 128, a decay a token": lambda: BF16(
        8, 4096, 16, 128, 128, "token"
    ),
    "c SSD bf16 8 x 4096, 64 heads, N 128, P 64, one group": lambda: BF16(
        8, 4096, 64, 128, 64, "token", 1
    ),
    "c bf16 1 x 1024, 4 heads, 64 x 64, no decay": lambda: BF16(1, 1024, 4, 64, 64),
    "c bf16 1 x 1024, 4 heads, 64 x 64, a decay a head": lambda: BF16(1, 1024, 4, 64, 64, "head"),
    "c bf16 8 x 1024, 8 heads, 64 x 64, a decay a head": lambda: BF16(8, 1024, 8, 64, 64, "head"),
}
