"""How the kernels of diagonal_decay_scan are launched: tiles, and what both passes share.

The tiles are those that a GPU has shown right. The same gradient kernel in another order of its
steps, with 4 warps and 64 states a slab, gave wrong gradients on one (ptxas 12.8.93), with 8 warps
right ones: change no tile without the GPU tests.
"""

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.diagonal_decay_gradient import gradient_kernel
from dsf_kernels.diagonal_decay_kernels import pair_kernel, walk_kernel
from dsf_kernels.launch import INTERPRETED, narrow, power_of_two
from dsf_kernels.sequences import Sequences

CHUNK = {False: 64, True: 32}
"""Tokens of a chunk, by the exactness of products; so are the tiles of each kernel. HIGH: the
groups of tokens that warps divide, while each thread keeps CHUNK / HIGH tokens of a state."""
PAIR = {
    False: {"HIGH": 4, "SLAB": 128, "num_warps": 8},
    True: {"HIGH": 4, "SLAB": 32, "num_warps": 8},
}
WALK = {
    False: {"SLAB": 64, "STAGES": 2, "num_warps": 4},
    True: {"SLAB": 32, "STAGES": 1, "num_warps": 8},
}
GRADIENT = {
    False: {"HIGH": 4, "SLAB": 32, "PART": 128, "PAIRED": False, "num_warps": 4},
    True: {"HIGH": 4, "SLAB": 32, "PART": 32, "PAIRED": True, "num_warps": 8},
}


def exact_products(value: Tensor) -> bool:
    return value.dtype != torch.bfloat16 or INTERPRETED


def _shared(value: Tensor) -> dict:
    """Type and precision of the matrix products."""
    exact = exact_products(value)
    return {
        "EXACT": exact,
        "COMPUTE": tl.float32 if exact else tl.bfloat16,
        "PRECISION": "tf32" if value.dtype == torch.float16 else "ieee",
        "CHUNK": CHUNK[exact],
        "LEVELS": CHUNK[exact].bit_length() - 1,
    }


def _paired(*tensors: Tensor) -> bool:
    """Whether neighbouring states can be read two at a time."""
    return all(
        t.shape[-1] % 2 == 0
        and t.stride(-1) == 1
        and all(step % 2 == 0 for step in t.stride()[:-1])
        and t.data_ptr() % (2 * t.element_size()) == 0
        for t in tensors
    )


class Chunks:
    """What the forward and the backward pass share: scores, decayed queries and keys, totals.

    cu_seqlens: of a packed row; lanes are then heads of sequences, tokens of none have results 0.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor,
                 scale: float, cu_seqlens: Tensor | None = None):  # fmt: skip
        self.exact = exact_products(value)
        self.query, self.key, self.value, self.log_decay = (
            self._regular(t) for t in (query, key, value, log_decay)
        )
        self.scale = scale
        batch, length, self.n_head, self.channels = value.shape
        self.length, self.width, self.chunk = length, key.shape[3], CHUNK[self.exact]
        self.n_chunk, self.lanes = -(-length // self.chunk), batch * self.n_head
        self.packed, self.table, self.places = cu_seqlens is not None, None, None
        if cu_seqlens is not None:
            packed = Sequences(cu_seqlens, length, self.chunk)
            self.n_chunk, self.lanes = packed.bound, packed.count * self.n_head
            self.table, self.places = packed.table, packed.chunks()
        self.programs = batch * self.n_head * self.n_chunk
        self.kept = torch.float32 if self.exact else value.dtype
        rows = (2, self.programs, self.chunk, self.width)
        self.queries, self.keys = value.new_empty(rows, dtype=self.kept)
        self.score = value.new_empty((self.programs, self.chunk, self.chunk), dtype=self.kept)
        totals = torch.float64 if self.exact else torch.float32
        self.total = value.new_empty((self.programs, self.width), dtype=totals)
        tiles = dict(PAIR[self.exact])
        wide = power_of_two(self.width, 16)
        tiles["SLAB"] = min(tiles["SLAB"], wide)
        given = (self.query, self.key, self.log_decay)
        full = self._full_rows(wide)
        pair_kernel[(self.programs,)](
            *given, self.score, self.queries, self.keys, self.total, self.places,
            length, self.n_chunk, self.n_head, self.width, scale,
            *(step for t in given for step in t.stride()), 1,
            PAIRED=_paired(*given), FULL=full, WIDTH=wide,
            **_shared(value), **tiles,
        )  # fmt: skip

    def _full_rows(self, wide: int) -> bool:
        """Whether every chunk has all of its tokens, every tile all of its states."""
        return not self.packed and self.length % self.chunk == 0 and self.width == wide

    def _regular(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy in strides that the GPU tests have covered."""
        tensor = narrow(tensor, 1)
        return tensor if self.exact or _paired(tensor) else tensor.contiguous()

    def walk(self, rows: Tensor, *, reverse=False, out=None, initial=None, final=None,
             saved=None):  # fmt: skip
        """Run `walk_kernel` over values or their gradients' sources."""
        x, y = (self.keys, self.queries) if reverse else (self.queries, self.keys)
        rows = self._regular(rows)
        tiles, wide = dict(WALK[self.exact]), power_of_two(self.width, 16)
        slab = tiles["SLAB"] = min(tiles["SLAB"], power_of_two(self.channels, 16))
        full = self._full_rows(wide) and self.channels % slab == 0
        targets = [x if t is None else t for t in (out, initial, final, saved)]
        walk_kernel[(self.lanes * -(-self.channels // slab),)](
            x, y, self.score, rows, self.total, *targets, self.table,
            self.length, self.n_chunk, self.n_head, self.width, self.channels,
            *rows.stride(), *((0, 0, 0, 0) if initial is None else initial.stride()),
            REVERSE=reverse, HAS_INITIAL=initial is not None, STORE=out is not None,
            FINAL=final is not None, SAVE=saved is not None, FULL=full, CHUNK=self.chunk,
            PRECISION=_shared(rows)["PRECISION"], WIDTH=wide, **tiles,
        )  # fmt: skip

    def states(self) -> Tensor:
        """Room for one state a chunk."""
        shape = (self.programs, self.width, self.channels)
        return self.value.new_empty(shape, dtype=self.kept)

    def gradients(self, grad: Tensor, start: Tensor, end: Tensor) -> list[Tensor]:
        """Gradients of queries, keys, log decays."""
        given = (self.query, self.key, self.log_decay)
        new = torch.zeros if self.packed else torch.empty
        found = [new(t.shape, dtype=t.dtype, device=t.device) for t in given]
        tiles, grad = dict(GRADIENT[self.exact]), self._regular(grad)
        wide, broad = power_of_two(self.width, 16), power_of_two(self.channels, 16)
        paired = tiles.pop("PAIRED") and _paired(*given)
        slab = tiles["SLAB"] = min(tiles["SLAB"], wide)
        tiles["PART"] = min(tiles["PART"], broad)
        full = self._full_rows(wide) and self.channels == broad
        gradient_kernel[(self.programs * -(-self.width // slab),)](
            *given, self.value, grad, start, end, start.new_ones((8, slab)), *found, self.places,
            self.length, self.n_chunk, self.n_head, self.width, self.channels, self.scale,
            *(step for t in (*given, self.value, grad) for step in t.stride()), 1, 0,
            FULL=full, CHANNELS=broad,
            PAIRED=paired, ONES=slab, **_shared(grad), **tiles,
        )  # fmt: skip
        return found
