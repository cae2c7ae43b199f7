"""fla's native sparse attention on a stand-in, token by token; another function chooses blocks."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fla_stand_ins import HEADS, KEY, VALUE, WIDTH, StandIn, layer, rows
from torch import Tensor

import dsf
from dsf.errors import DsfUnsupportedError
from dsf.tracing import from_layer, relative_error

DOUBLE = 1e-12
GROUPS, SIZE, COUNT, WINDOW = 2, 3, 2, 4
SHARED = HEADS // GROUPS


def parallel_nsa_topk(*, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, counts: int) -> Tensor:
    """First, own and last block before others, these by the mean of their group's softmax."""
    out = torch.full((*q.shape[:2], GROUPS, counts), -1, dtype=torch.int32)
    for row, span in rows(cu_seqlens, *q.shape[:2]):
        query, key = q[row, span], k[row, span]
        for t in range(len(query)):
            own = t // SIZE
            for g in range(GROUPS):
                importance = {n: 1.0 for n in (0, own - 1, own) if n >= 0}
                ended = [n for n in range(own) if n not in importance]
                if ended:
                    means = torch.stack([key[n * SIZE : (n + 1) * SIZE, g].mean(0)
                                         for n in range((t + 1) // SIZE)])  # fmt: skip
                    heads = query[t, g * SHARED : (g + 1) * SHARED]
                    p = (heads @ means.T * KEY**-0.5).softmax(-1).mean(0)
                    importance |= {n: float(p[n]) for n in ended}
                best = sorted(importance, key=importance.__getitem__, reverse=True)[:counts]
                out[row, span.start + t, g, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


def _attended(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    if not keys:
        return torch.zeros(VALUE, dtype=query.dtype)
    weights = (torch.stack(keys) @ query / math.sqrt(KEY)).softmax(0)
    return weights @ torch.stack(values)


def parallel_nsa(*, q, k, v, g_cmp, g_slc, g_swa, block_size, block_counts, window_size,
                 cu_seqlens=None):  # fmt: skip
    chosen = parallel_nsa_topk(q=q, k=k, cu_seqlens=cu_seqlens, counts=block_counts)
    out = torch.zeros(*q.shape[:3], VALUE, dtype=q.dtype)
    for row, span in rows(cu_seqlens, *q.shape[:2]):
        for t in range(span.stop - span.start):
            at = span.start + t
            for h in range(HEADS):
                g = h // SHARED
                key, value = k[row, span, g], v[row, span, g]
                ended = [slice(n, n + block_size)
                         for n in range(0, t + 2 - block_size, block_size)]  # fmt: skip
                blocks = [int(n) * block_size for n in chosen[row, at, g] if n >= 0]
                tokens = [s for n in blocks for s in range(n, min(n + block_size, t + 1))]
                near = range(max(0, t + 1 - window_size), t + 1)
                parts = (
                    _attended(q[row, at, h], [key[b].mean(0) for b in ended],
                              [value[b].mean(0) for b in ended]),
                    _attended(q[row, at, h], [key[s] for s in tokens], [value[s] for s in tokens]),
                    _attended(q[row, at, h], [key[s] for s in near], [value[s] for s in near]),
                )  # fmt: skip
                gates = (g_cmp[row, at, h], g_slc[row, at, h], g_swa[row, at, h])
                out[row, at, h] = sum(a * b for a, b in zip(gates, parts, strict=True))
    return out


class Sparse(StandIn):
    """Its three gates are sigmoids."""

    def call(self, given: dict, cu_seqlens) -> Tensor:
        given = {n: x.squeeze(-1).sigmoid() if n.startswith("g_") else x for n, x in given.items()}
        return super().call(given, cu_seqlens)


@pytest.fixture
def sparse(monkeypatch):
    """A layer of fla's class and module names."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def make(**changed):
        options = {"block_size": SIZE, "block_counts": COUNT, "window_size": WINDOW, **changed}
        sizes = {"q": (HEADS, KEY), "k": (GROUPS, KEY), "v": (GROUPS, VALUE),
                 **{f"g_{n}": (HEADS, 1) for n in ("cmp", "slc", "swa")}}  # fmt: skip
        torch.manual_seed(2)
        return layer(("nsa", "NativeSparseAttention", "parallel_nsa", parallel_nsa, sizes,
                      options, Sparse))  # fmt: skip

    return make


def _inputs(padding: str, length: int = 11) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = 2 * torch.randn(2, length, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, length, dtype=torch.long)
    if padding != "none":
        mask[1, {"left": slice(3), "right": slice(-3, None), "holes": slice(3, 5)}[padding]] = 0
    return x, mask


@pytest.mark.parametrize(("padding", "counts"), [
    ("none", COUNT), ("left", 4), ("right", COUNT), ("holes", COUNT)])  # fmt: skip
def test_three_maps_are_one_with_and_without_padding(sparse, padding, counts):
    layer = sparse(block_counts=counts)
    x, mask = _inputs(padding)
    found = from_layer(layer, x, **({} if padding == "none" else {"attention_mask": mask}))
    assert found.error <= DOUBLE
    assert found.attrs["scan_error"] <= DOUBLE
    y, real = dsf.scan(found.recurrence, found.values), mask[1].bool()
    assert y.shape == (2, 11, HEADS, VALUE)
    alone = from_layer(layer, x[1:, real])
    assert relative_error(y[1:, real], dsf.scan(alone.recurrence, alone.values)) <= DOUBLE
    assert not y[1, ~real].any()


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_sequences_and_what_is_left_behind(sparse, length):
    layer = sparse()
    x, _ = _inputs("none", length)
    space, before = layer.space["parallel_nsa"], layer(x)[0]
    assert from_layer(layer, x).error <= DOUBLE
    assert torch.equal(layer(x)[0], before)
    assert layer.space["parallel_nsa"] is space
    assert parallel_nsa.__globals__["parallel_nsa_topk"] is parallel_nsa_topk


def test_rows_of_the_map_hold_the_gates_and_the_chosen_blocks_alone(sparse):
    """Without a window and compression: what a token reads lies in its COUNT blocks."""
    layer = sparse(window_size=0)
    with torch.no_grad():
        layer.parts["g_cmp"].weight.zero_()
        layer.parts["g_cmp"].bias.fill_(-1e6)
    x, _ = _inputs("none")
    found = from_layer(layer, x)
    weights = dsf.materialise(found.recurrence)
    gates = layer.parts["g_slc"](x).sigmoid().transpose(1, 2)
    assert relative_error(weights.sum(-1), gates) <= DOUBLE
    assert int((weights != 0).sum(-1).max()) == COUNT * SIZE
    assert not bool(weights.triu(1).any())


def test_a_choice_that_nothing_tells_of_is_refused(sparse, monkeypatch):
    layer = sparse()
    hidden = lambda **given: parallel_nsa(**given)  # noqa: E731
    space = {n: x for n, x in globals().items() if n != "parallel_nsa_topk"}
    layer.space["parallel_nsa"] = type(hidden)(hidden.__code__, space)
    with pytest.raises(DsfUnsupportedError, match="one choice of blocks by parallel_nsa_topk"):
        from_layer(layer, _inputs("none")[0])
