"""What fla's own layers call in place of kernels that no interpreter runs: its reference code.

Each takes the released op's arguments. Packed rows are taken one by one.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_argsort = torch.Tensor.argsort


def replace_ops(file: str, space: dict[str, Any]) -> None:
    """Put them in the names of a layer's file."""
    space.update(REPLACED.get(file, {}))
    if file == "rodimus":  # whose attention would round to 16 bit
        space["autocast_to_fp16"] = lambda x: x
    if file == "moba":
        importlib.import_module("fla.ops.moba.parallel").__dict__.update(
            _flash_attn_varlen_forward=_flash_forward, flash_attn_varlen_func=_varlen)  # fmt: skip
    if file == "nsa":
        importlib.import_module("fla.ops.nsa.parallel").__dict__.update(FLASH)
    if file == "mom":  # whose sort must keep the order of tokens, as on a GPU
        torch.Tensor.argsort = functools.partialmethod(_argsort, stable=True)  # type: ignore


def _row_by_row(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def op(q: Tensor, *args: Tensor, cu_seqlens: Tensor | None = None, **given: Any) -> Tensor:
        if cu_seqlens is None:
            return function(q, *args, **given)
        timed = {n for n, x in given.items()
                 if isinstance(x, Tensor) and x.shape[:2] == q.shape[:2]}  # fmt: skip
        return torch.cat(
            [function(q[:, a:b], *[x[:, a:b] for x in args],
                      **{n: x[:, a:b] if n in timed else x for n, x in given.items()})
             for a, b in itertools.pairwise(cu_seqlens.tolist())], 1)  # fmt: skip

    return op


def _with_state(op: Callable[..., Tensor], states: int = 1) -> Callable[..., Any]:
    return lambda *args, **given: (op(*args, **given), *[None] * states)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
               window_size: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    back = window_size[0] if window_size[0] >= 0 else q.shape[1]
    lag = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    y = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), (lag >= 0) & (lag <= back)
    )
    return y.transpose(1, 2)  # fmt: skip


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    packed = _row_by_row(_attention)
    return packed(q[None], k[None], v[None], cu_seqlens=cu_seqlens_q, window_size=window_size)[0]


def _flash_forward(*, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                   softmax_scale: float, causal: bool, **sizes: Any) -> tuple:  # fmt: skip
    """(output, log of the sum of exponentials (head, token)), as flash-attn's inner function."""
    out, logs = [], []
    spans = zip(*(itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k)),
                strict=True)  # fmt: skip
    for (a, b), (c, d) in spans:
        z = softmax_scale * torch.einsum("thd,shd->hts", q[a:b], k[c:d])
        if causal:
            z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(1), -torch.inf)
        out.append(torch.einsum("hts,shd->thd", z.softmax(-1), v[c:d]))
        logs.append(z.logsumexp(-1))
    return torch.cat(out), torch.cat(logs, 1), None, None


def _abc(*, q: Tensor, k: Tensor, v: Tensor, s: Tensor, **state: Any) -> tuple[Tensor, None]:
    from fla.ops.abc.naive import naive_recurrent_abc as naive

    y, _ = naive(*(x.transpose(1, 2) for x in (q, k, v, s)))
    return y.transpose(1, 2), None


def _mesa(q: Tensor, *, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor,
          max_CG_iteration: int, **state: Any) -> Tensor:  # fmt: skip
    from fla.ops.mesa_net.naive import naive_mesa_net_CG as naive

    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return naive(q, k, v, g, lamb, beta, 1, max_CG_iteration)[0]


def _parallax(*args: Tensor, **given: Any) -> Tensor:
    from fla.ops.parallax.naive import naive_parallax as naive

    return naive(*args, **given)


def _cyclic_flow(**given: Any) -> tuple[Tensor, None]:
    from fla.ops.cyfa.naive import naive_recurrent_cyfa as naive

    given.pop("checkpoint_level", None)
    return naive(**given)[0], None


def _deltaformer(*, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, attention_mask: Tensor | None,
                 cu_seqlens: None) -> Tensor:  # fmt: skip
    """The values less what is known of them from the released loop, then masked attention."""
    from fla.ops.deltaformer.naive import naive_deltaformer_attn, tril_softmax

    if attention_mask is None:
        return naive_deltaformer_attn(q, k, v, beta)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    known = tril_softmax(scores) * beta.transpose(1, 2)[..., None]
    eye = torch.eye(q.shape[1])
    u = torch.linalg.solve(known + eye, v.transpose(1, 2)).transpose(1, 2)
    out = torch.zeros_like(v)
    for row, kept in enumerate(attention_mask.bool()):
        out[row, kept] = _attention(q[row, kept][None], k[row, kept][None], u[row, kept][None])[0]
    return out


FLASH = {"flash_attn_func": _attention, "flash_attn_varlen_func": _varlen}
REPLACED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("attn", "bitattn", "mla", "rodimus"), FLASH),
    "abc": {"chunk_abc": _abc}, "mesa_net": {"chunk_mesa_net": _with_state(_row_by_row(_mesa), 2)},
    "parallax": {"parallel_parallax": _row_by_row(_parallax)},
    "cyfa": {"chunk_cyfa": _cyclic_flow, "fused_recurrent_cyfa": _cyclic_flow},
    "deltaformer": {"deltaformer_attn": _deltaformer},
}  # fmt: skip
