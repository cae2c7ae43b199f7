"""How low_rank_scan runs by chunks: the algebra, tiles, and what the launches of a call share.

In a chunk of c tokens let D(j, i) be the product of the decays after token j up to token i, H the
state at its start, H' at its end. With rows decayed from the start (W by the steps before the row,
Q by its own too) or to the end (X, K), and pairs

    qk_ij = q_i D(j, i) k_j, qx_ij = q_i D(j, i) x_j (i >= j)
    wk_ij = w_i D(j, i-1) k_j, wx_ij = w_i D(j, i-1) x_j (i > j)

what the rows w find, R = W H + wx R + wk U, is solved by S = (I - wx)^-1 and put back:

    mixed = S wk,   find = S W,   read = Q + qx find,   score = qk + qx mixed,
    put = X,        write = K + mixed^T X
    Y = scale (read H + score U),   H' = D(0, c) H + put^T (find H) + write^T U

`prepare_kernel` gives those, all chunks at once; `walk_kernel` carries H, two products deep. Pairs
are products over halves: blocks of 2, 4 .. c tokens are cut in the middle, and the pairs that a
cut parts are products of rows decayed from it and to it. Every factor is the power of a sum of
logs of one sign: no division, no difference; decays of 0 and exp(-100) are exact.

Backward the same walk runs the other way with read and write, find and put exchanged; it gives
dU and, chunk by chunk, dH'. `chunk_gradient_kernel` and `pair_gradient_kernel` go through the
equations above in reverse, with dS = S^T (..) S^T; a log decay gets the terms that span it.
"""

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.launch import INTERPRETED, narrow, power_of_two
from dsf_kernels.low_rank_chunk_gradients import chunk_gradient_kernel, pair_gradient_kernel
from dsf_kernels.low_rank_chunk_pairs import prepare_kernel
from dsf_kernels.low_rank_chunk_walk import walk_kernel

CHUNK = {False: 16, True: 16}
"""Tokens of a chunk, by the exactness of products; so are the tiles of each kernel.

Chosen by counting instructions (sm_90, Triton 3.6, width 128): preparing takes 10 thousand a chunk
of 16 with one warp, 82 thousand a chunk of 32 with eight, as small tiles leave warps with copies.
"""
PREPARE = {False: {"SLAB": 32, "num_warps": 1}, True: {"SLAB": 32, "num_warps": 4}}
WALK = {
    False: {"SLAB": 64, "STAGES": 2, "num_warps": 4},
    True: {"SLAB": 16, "STAGES": 1, "num_warps": 8},
}
CHUNK_GRADIENT = {
    False: {"PART": 128, "SLAB": 128, "STAGES": 1, "num_warps": 4, "maxnreg": 168},
    True: {"PART": 16, "SLAB": 16, "STAGES": 1, "num_warps": 8},
}
PAIR_GRADIENT = {
    False: {"SLAB": 64, "num_warps": 4, "maxnreg": 168},
    True: {"SLAB": 32, "num_warps": 4},
}


def products(dtype: torch.dtype) -> dict:
    """Type and precision of the matrix products, and the chunk."""
    exact = dtype != torch.bfloat16 or INTERPRETED
    chunk = CHUNK[exact]
    return {
        "EXACT": exact, "COMPUTE": tl.float32 if exact else tl.bfloat16, "PRECISION": "ieee",
        "SOLVE": "ieee" if exact else "tf32", "SPAN": "ieee" if exact else "tf32",
        "CHUNK": chunk, "LEVELS": chunk.bit_length() - 1,
    }  # fmt: skip


def _some(settings: dict, *left_out: str) -> dict:
    return {name: value for name, value in settings.items() if name not in left_out}


class Chunks:
    """What the launches of one call share: sizes, settings, and what `prepare_kernel` gave."""

    def __init__(self, tensors: tuple[Tensor, ...], log_decay: Tensor | None, scale: float):
        query, key, value, left, right = (narrow(t, 1) for t in tensors)
        self.value, self.scale, self.rows = value, float(scale), (query, key, left, right)
        self.log_decay = query if log_decay is None else narrow(log_decay, 1)
        self.has_decay = log_decay is not None
        self.batch, self.length, self.n_head, self.channels = value.shape
        self.width = key.shape[3]
        self.settings = products(value.dtype)
        self.exact, self.chunk = self.settings["EXACT"], self.settings["CHUNK"]
        self.n_chunk = -(-self.length // self.chunk)
        self.lanes = self.batch * self.n_head
        self.programs = self.lanes * self.n_chunk
        self.wide, self.broad = (power_of_two(n, 16) for n in (self.width, self.channels))
        self.whole = self.length % self.chunk == 0 and self.width == self.wide
        self.sizes = self.length, self.n_chunk, self.n_head, self.width
        self.read, self.find, self.put, self.write = (self.streams() for _ in range(4))
        self.score, self.solve, self.mixed, self.cross = (self.squares() for _ in range(4))
        self.total = self.empty(self.programs, self.width)
        self._prepare()

    def empty(self, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return self.value.new_empty(shape, dtype=kind)

    @property
    def kind(self) -> torch.dtype:
        """The type of what passes between kernels."""
        return torch.float32 if self.exact else torch.bfloat16

    def streams(self) -> Tensor:
        """Room for one row a token."""
        return self.empty(self.programs, self.chunk, self.width, kind=self.kind)

    def squares(self) -> Tensor:
        """Room for the pairs of each chunk."""
        return self.empty(self.programs, self.chunk, self.chunk, kind=self.kind)

    def states(self) -> Tensor:
        """Room for one state a chunk."""
        return self.empty(self.programs, self.width, self.channels, kind=self.kind)

    def replies(self) -> Tensor:
        """Room for what the rows of every token find."""
        return self.empty(*self.value.shape, kind=self.kind)

    def _inputs(self) -> tuple[tuple[Tensor, ...], list[int], dict]:
        given = (*self.rows, self.log_decay)
        strides = [step for t in given for step in t.stride()]
        names = ("Q_SHARE", "K_SHARE", "X_SHARE", "W_SHARE")
        shares = {n: self.n_head // t.shape[2] for n, t in zip(names, self.rows, strict=True)}
        return given, strides, shares | {"HAS_DECAY": self.has_decay, "FULL": self.whole}

    def _prepare(self) -> None:
        given, strides, settings = self._inputs()
        tiles = dict(PREPARE[self.exact])
        tiles["SLAB"] = min(tiles["SLAB"], self.wide)
        prepare_kernel[(self.programs,)](
            *given, self.read, self.find, self.put, self.write, self.score, self.solve,
            self.mixed, self.cross, self.total, *self.sizes, self.scale, *strides,
            WIDTH=self.wide, **settings, **tiles, **self.settings,
        )  # fmt: skip

    def walk(self, rows: Tensor, *, reverse=False, out=None, initial=None, final=None,
             saved=None, found=None):  # fmt: skip
        """Run `walk_kernel` over values, or back over the gradients of outputs."""
        streams = (self.read, self.find, self.put, self.write)
        rows = narrow(rows, 1)
        tiles = dict(WALK[self.exact])
        slab = tiles["SLAB"] = min(tiles["SLAB"], self.broad)
        targets = [self.read if t is None else t for t in (out, initial, final, saved, found)]
        walk_kernel[(self.lanes * -(-self.channels // slab),)](
            *(streams[n] for n in ((3, 2, 1, 0) if reverse else (0, 1, 2, 3))), self.score, rows,
            self.total, *targets, *self.sizes, self.channels, *rows.stride(),
            *((0, 0, 0, 0) if initial is None else initial.stride()),
            REVERSE=reverse, HAS_DECAY=self.has_decay, HAS_INITIAL=initial is not None,
            STORE=out is not None, FINAL=final is not None, SAVE=saved is not None,
            FULL=self.whole and self.channels % slab == 0, PRECISION=self.settings["PRECISION"],
            CHUNK=self.chunk, WIDTH=self.wide, **tiles,
        )  # fmt: skip

    def gradients(self, grad: Tensor, states: tuple[Tensor, Tensor],
                  replies: tuple[Tensor, Tensor]) -> list[Tensor]:  # fmt: skip
        """Gradients of query, key, left, right a head, and of the log decays."""
        rows, pairs = [self.streams() for _ in range(4)], [self.squares() for _ in range(4)]
        total, grad = self.empty(self.programs, self.width), narrow(grad, 1)
        tiles = dict(CHUNK_GRADIENT[self.exact])
        tiles["SLAB"] = min(tiles["SLAB"], self.wide)
        tiles["PART"] = min(tiles["PART"], self.broad)
        chunk_gradient_kernel[(self.programs,)](
            self.value, grad, *replies, *states, self.find, self.put, self.solve, self.mixed,
            self.cross, *rows, *pairs, total, *self.sizes, self.channels, self.scale,
            *self.value.stride(), *grad.stride(),
            FULL=self.whole and self.channels == self.broad, WIDTH=self.wide,
            HAS_DECAY=self.has_decay, CHANNELS=self.broad, **tiles,
            **_some(self.settings, "EXACT", "SOLVE", "SPAN", "LEVELS"),
        )  # fmt: skip
        given, strides, settings = self._inputs()
        shape = (*self.value.shape[:3], self.width)
        found = [self.empty(*shape, kind=self.kind) for _ in range(4)]
        found.append(self.empty(*shape, kind=self.log_decay.dtype) if self.has_decay else found[0])
        tiles = dict(PAIR_GRADIENT[self.exact])
        slab = tiles["SLAB"] = min(tiles["SLAB"], self.wide)
        pair_gradient_kernel[(self.programs * -(-self.width // slab),)](
            *given, *rows, *pairs, total, *found, *self.sizes, *strides,
            **settings, **tiles, **_some(self.settings, "SOLVE"),
        )  # fmt: skip
        return found
