"""Cases of map_tiles and map_statistics: maps written once, and statistics that store none."""

import functools

import torch

from dsf_kernels.bench import Case, Work
from dsf_kernels.map_tiles import map_statistics, map_tiles
from dsf_kernels.reference import (
    linear_map_reference,
    map_statistics_reference,
    softmax_map_reference,
)


def case(dtype: torch.dtype, batch: int, length: int, head: int, state: int,
         decay: str | None = None, statistics: bool = False) -> Case:  # fmt: skip
    """Unit variance; decay: None, head, state or softmax. statistics: entropies, not the map.

    The floor of a map is its write in float32, that of statistics the products below the diagonal
    and one exponential a pair where there is a decay. No gradient, so `backward` is nothing.
    """
    options = {"softmax": True} if decay == "softmax" else {}
    scale = state**-0.5

    def draw(batch, length, head):
        wide = (batch, length, head, state)
        query, key = torch.randn((2, *wide), device="cuda").to(dtype)
        if decay not in ("head", "state"):
            return query, key
        logs = torch.nn.functional.logsigmoid(torch.randn(wide, device="cuda")) / 16
        return query, key, logs if decay == "state" else logs[..., 0]

    def run(*tensors):
        if statistics:
            return map_statistics(*tensors, scale=scale, **options)["entropy"]
        return map_tiles(*tensors, scale=scale, **options)

    def loop(*tensors):
        reference = softmax_map_reference if options else linear_map_reference
        with torch.no_grad():
            weights = reference(*tensors, scale=scale)
            return map_statistics_reference(weights)["entropy"] if statistics else weights

    pairs = batch * head * length * (length + 1) / 2
    size = torch.finfo(dtype).bits // 8
    read = 2 * batch * length * head * state * size
    written = batch * head * length * (1 if statistics else length) * 4
    forward = Work(read + written, 2 * pairs * state, pairs if decay in ("head", "softmax") else 0)
    return Case(run, draw(batch, length, head), forward, Work(0, 0), loop, draw(2, 257, 2), {},
                by_row=bool(options) or statistics)  # fmt: skip


BF16 = functools.partial(case, torch.bfloat16)
CASES = {
    f"h {what} bf16 1 x {length}, 4 heads, 128, {decay or 'no decay'}": functools.partial(
        BF16, 1, length, 4, 128, decay, what == "statistics"
    )
    for what, length in {"map": 16384, "statistics": 32768}.items()
    for decay in (None, "head", "state", "softmax")
}
