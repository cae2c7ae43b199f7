"""What `map_tiles` and `map_statistics` take: shapes, kinds, ranges; refused before any work."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dsf_kernels.launch import check_kind, check_scale, check_tensor, check_type
from dsf_kernels.map_launch import BINS

MAX_WIDTH = 256


def check_map(function: str, query: Tensor, key: Tensor, log_decay: Tensor | None,
              bias: Tensor | None, scale: float, softmax: bool, causal: bool) -> int:  # fmt: skip
    """Raise on wrong kinds and shapes; the number of heads."""
    check_kind(function, {"query": query, "key": key, "log_decay": log_decay, "bias": bias})
    check_scale(function, scale)
    axes = dict.fromkeys(("batch", "time", "group", "state"))
    check_tensor(function, "query", query, axes, "")
    batch, length, group, n_state = query.shape
    keys = {"batch": batch, "time": None if softmax else length, "group": None, "state": n_state}
    check_tensor(function, "key", key, keys, "sizes are fixed by query")
    check_type(function, "query", {"query": query, "key": key})
    if not 1 <= n_state <= MAX_WIDTH:
        raise ValueError(
            f"dsf_kernels.{function}: query: expected 1 to {MAX_WIDTH} states, got {n_state}."
        )
    if softmax and log_decay is not None:
        raise ValueError(
            f"dsf_kernels.{function}: log_decay: expected None with softmax, got a tensor; "
            "give the decay as bias."
        )
    if not softmax and (bias is not None or not causal):
        raise ValueError(
            f"dsf_kernels.{function}: expected no bias and causal=True without softmax, got "
            f"bias {'None' if bias is None else 'given'}, causal={causal}."
        )
    head = group if softmax else max(group, key.shape[2])
    if log_decay is not None:
        head = log_decay.shape[2] if log_decay.dim() > 2 else 0
        sizes = {"batch": batch, "time": length, "head": head}
        sizes |= {"state": n_state} if log_decay.dim() == 4 else {}
        check_tensor(function, "log_decay", log_decay, sizes, "sizes are fixed by query")
    for name, tensor in {"query": query, "key": key}.items():
        if head and (tensor.shape[2] == 0 or head % tensor.shape[2]):
            raise ValueError(
                f"dsf_kernels.{function}: {name}: expected a group count that divides "
                f"head={head}, got {tensor.shape[2]}."
            )
    if bias is not None:
        check_bias(function, bias, (batch, head, length, key.shape[1]))
    return head


def check_bias(function: str, bias: Tensor, shape: tuple[int, ...]) -> None:
    if bias.dim() != 4 or any(b not in (1, n) for b, n in zip(bias.shape, shape, strict=True)):
        raise ValueError(
            f"dsf_kernels.{function}: bias: expected axes (batch, head, query, key) that "
            f"broadcast to {shape}, got {tuple(bias.shape)}."
        )


def check_range(function: str, name: str, asked: range | None, total: int) -> range:
    """The positions asked for, all for None."""
    if asked is None:
        return range(total)
    if asked.step != 1 or (len(asked) and (asked.start < 0 or asked.stop > total)):
        raise ValueError(
            f"dsf_kernels.{function}: {name}: expected a range of step 1 within 0..{total}, got "
            f"{asked}."
        )
    return asked


def check_edges(function: str, edges: Sequence[int] | Tensor | None, like: Tensor) -> Tensor:
    """Edges (bin + 1) of the bins as int32 on the device; those of a tensor are not looked at."""
    if edges is None:
        return torch.empty(0, dtype=torch.int32, device=like.device)
    if isinstance(edges, Tensor):
        right = edges.dim() == 1 and edges.dtype in (torch.int32, torch.int64)
        size = edges.numel() if right else 0
    else:
        edges = [int(e) for e in edges]
        right = all(low < high for low, high in itertools.pairwise(edges))
        size = len(edges)
    if not right or not 2 <= size <= BINS + 1:
        raise ValueError(
            f"dsf_kernels.{function}: edges: expected 2 to {BINS + 1} ascending integers, got "
            f"{edges}."
        )
    return torch.as_tensor(edges, dtype=torch.int32, device=like.device)
