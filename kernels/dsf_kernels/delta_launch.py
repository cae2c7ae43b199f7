"""How delta_scan launches its kernels: tiles, types, and what the launches of a call share."""

import torch
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunks import cumulate
from dsf_kernels.delta_gradients import gradient_kernel
from dsf_kernels.delta_kernels import forward_kernel, reverse_kernel
from dsf_kernels.delta_solve import solve_kernel
from dsf_kernels.launch import INTERPRETED, narrow, power_of_two
from dsf_kernels.sequences import Sequences

CHUNK = 64
EXACT_CHUNK = 16
MULTIPROCESSORS = 132  # of an H100 or H200
SOLVE = {"STEP": 64, "num_warps": 1}
# Slab of channels (gradients: of the state), warps and pipeline stages, by exactness. These were
# seen right on an H100. ptxas 12.8.93 (in Triton 3.6, 3.7) miscompiles others for sm_90a: forward
# (SAVE) with slabs of 32 and one stage reads through shared-memory descriptors it never sets,
# gradients with decays and slabs of 32 read beyond shared memory; 12.9.86 compiles both rightly.
FORWARD = {False: (64, 4, 2), True: (16, 8, 1)}
REVERSE = {False: (64, 4, 2), True: (16, 8, 1)}
GRADIENT = {False: (32, 4, 2), True: (16, 8, 1)}
GATED_GRADIENT = {False: (64, 4, 2), True: (16, 8, 1)}


def products(dtype: torch.dtype, n_state: int, n_channel: int) -> dict:
    """Type and chunk of the matrix products: bf16 where it was seen right, else exact float32."""
    seen = all(power_of_two(width) in (64, 128) for width in (n_state, n_channel))
    exact = dtype != torch.bfloat16 or INTERPRETED or not seen
    return {
        "EXACT": exact,
        "COMPUTE": tl.float32 if exact else tl.bfloat16,
        "PRECISION": "ieee",
        "CHUNK": EXACT_CHUNK if exact else CHUNK,
    }


def _tile(choices: dict, settings: dict, channels: int) -> dict:
    slab, warps, stages = choices[settings["EXACT"]]
    return {"SLAB": min(slab, power_of_two(channels, 16)), "STAGES": stages, "num_warps": warps}


class Plan:
    """What the launches of one call share: sizes, chunk, type of products, decays, T.

    cu_seqlens: of a packed row; lanes are then heads of sequences.
    """

    def __init__(self, key, strength, log_decay, n_channel, solved=None, cu_seqlens=None):
        self.batch, self.length, self.head = strength.shape
        self.width, self.channels = key.shape[3], n_channel
        self.settings = products(key.dtype, self.width, n_channel)
        self.chunk = self.settings["CHUNK"]
        self.n_chunk, self.lanes = -(-self.length // self.chunk), self.batch * self.head
        self.packed = self.table = self.places = None
        if cu_seqlens is not None:
            self.packed = packed = Sequences(cu_seqlens, self.length, self.chunk)
            self.n_chunk, self.lanes = packed.bound, packed.count * self.head
            self.table, self.places = packed.table, packed.chunks()
            log_decay = None if log_decay is None else packed.spread(log_decay)
        self.strength = narrow(strength, 1)
        self.wide = power_of_two(self.width, 16)
        decays = None if log_decay is None else cumulate(log_decay, self.chunk)
        self.decays = (strength, strength) if decays is None else decays
        self.has_decay = decays is not None
        self.solved = self.solve(key) if solved is None else solved

    def empty(self, *shape, kind=torch.float32):
        return torch.empty(shape, dtype=kind, device=self.strength.device)

    def steps(self, chunks):
        """(batch, head, time in chunks) as (batch, time, head)."""
        if self.packed is not None:
            return self.packed.gather(chunks.mT)
        return chunks[:, :, : self.length].mT.contiguous()

    @property
    def kind(self):
        """The type of what passes between kernels."""
        return torch.float32 if self.settings["EXACT"] else torch.bfloat16

    def full(self, slab: int) -> bool:
        rows = self.packed is None and self.length % self.chunk == 0
        return rows and self.width == self.wide and self.channels % slab == 0

    def share(self, tensor: Tensor) -> int:
        return self.head // tensor.shape[2]

    def sizes(self):
        return self.length, self.n_chunk, self.head, self.width

    def solve(self, key: Tensor) -> Tensor:
        chunks = self.batch * self.head, self.n_chunk, self.chunk, self.chunk
        solved, key = self.empty(*chunks, kind=self.kind), narrow(key, 1)
        step = min(SOLVE["STEP"], self.wide)
        solve_kernel[(self.batch * self.n_chunk * self.head,)](
            key, self.strength, *self.decays, solved, self.places, *self.sizes(),
            *key.stride(), *self.strength.stride(), SHARE=self.share(key),
            HAS_DECAY=self.has_decay, FULL=self.full(1), WIDTH=self.wide,
            SOLVE="ieee" if self.settings["EXACT"] else "tf32x3",
            **(SOLVE | {"STEP": step}), **self.settings,
        )  # fmt: skip
        return solved

    def forward(self, query, key, value, scale, initial, out=None, saved=None, final=None):
        query, key, value = (narrow(t, 1) for t in (query, key, value))
        tile = _tile(FORWARD, self.settings, self.channels)
        n_slab = -(-self.channels // tile["SLAB"])
        if not self.settings["EXACT"] and self.lanes * n_slab <= MULTIPROCESSORS:
            tile["STAGES"] = 3  # one program a multiprocessor: room for a deeper pipeline
        states, written = (key, key) if saved is None else saved
        strides = (0, 0, 0, 0) if initial is None else initial.stride()
        forward_kernel[(self.lanes * n_slab,)](
            query, key, value, self.strength, self.solved, key if out is None else out,
            *self.decays, key if initial is None else initial, key if final is None else final,
            states, written, self.table, *self.sizes(), self.channels, float(scale),
            *query.stride(), *key.stride(), *value.stride(), *self.strength.stride(), *strides,
            Q_SHARE=self.share(query), K_SHARE=self.share(key), HAS_DECAY=self.has_decay,
            HAS_INITIAL=initial is not None, STORE=out is not None, SAVE=saved is not None,
            FINAL=final is not None, FULL=self.full(tile["SLAB"]), WIDTH=self.wide,
            **tile, **self.settings,
        )  # fmt: skip

    def reverse(self, query, key, grad, scale, grad_final, adjoints, pulled, grad_initial):
        query, key, grad = (narrow(t, 1) for t in (query, key, grad))
        tile = _tile(REVERSE, self.settings, self.channels)
        strides = (0, 0, 0, 0) if grad_final is None else grad_final.stride()
        n_slab = -(-self.channels // tile["SLAB"])
        reverse_kernel[(self.lanes * n_slab,)](
            query, key, grad, self.strength, self.solved, *self.decays,
            key if grad_final is None else grad_final, grad_initial, adjoints, pulled,
            self.table, *self.sizes(), self.channels, float(scale),
            *query.stride(), *key.stride(), *grad.stride(), *self.strength.stride(), *strides,
            Q_SHARE=self.share(query), K_SHARE=self.share(key), HAS_DECAY=self.has_decay,
            HAS_INITIAL=grad_final is not None, FULL=self.full(tile["SLAB"]), WIDTH=self.wide,
            **tile, **self.settings,
        )  # fmt: skip

    def gradients(self, query, key, value, grad, scale, between, targets, decay_grad):
        query, key, value, grad = (narrow(t, 1) for t in (query, key, value, grad))
        choices = GATED_GRADIENT if self.has_decay else GRADIENT
        tile = _tile(choices, self.settings, self.wide)
        across = power_of_two(self.channels, 16)
        gradient_kernel[(self.batch * self.n_chunk * self.head,)](
            query, key, value, grad, self.strength, *self.decays, *between, *targets,
            self.places, *self.sizes(), self.channels, float(scale),
            *query.stride(), *key.stride(), *value.stride(), *grad.stride(),
            *self.strength.stride(),
            Q_SHARE=self.share(query), K_SHARE=self.share(key), HAS_DECAY=self.has_decay,
            DECAY_GRAD=decay_grad, FULL=self.full(across), WIDTH=self.wide, CHANNELS=across,
            **tile, **self.settings,
        )  # fmt: skip
