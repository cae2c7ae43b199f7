"""How the kernels of scalar_decay_scan are launched: tiles, and the form that fits a shape."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunk_kernel import chunk_kernel
from dsf_kernels.chunks import cumulate
from dsf_kernels.combine import product
from dsf_kernels.exponentials import LN_2
from dsf_kernels.launch import INTERPRETED, MAX_TILE_STRIDE, narrow, power_of_two
from dsf_kernels.scalar_decay_short import short_kernel
from dsf_kernels.sequences import Sequences

CHUNK, SLAB = 64, 64
SHORT = 1024  # tokens, and heads times width, up to which a row is short
FEW = 8  # programs in a row up to which a longer one is split in time
SEGMENT = 16  # chunks of a part of it
SHORT_STAGES = 3  # of a short row in bf16, whose few programs have room for a deeper pipeline


class Settings(NamedTuple):
    """Type and precision of the matrix products, tokens of a chunk, pipeline stages, warps."""

    EXACT: bool
    COMPUTE: tl.dtype
    PRECISION: str
    CHUNK: int
    STAGES: int
    num_warps: int


@functools.cache
def settings_of(dtype: torch.dtype, width: int) -> Settings:
    """What suits operands of one type and the wider of two widths."""
    exact = dtype != torch.bfloat16 or INTERPRETED
    return Settings(
        exact,
        tl.float32 if exact else tl.bfloat16,
        "tf32" if dtype == torch.float16 else "ieee",
        CHUNK // 2 if exact else CHUNK,
        1 if exact else 2,
        8 if width > 128 or exact else 4,
    )


def every_token(log_decay: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Log decays (head,) as (batch, time, head), with strides 0 by which `Decays` knows them.

    `expand` alone gives an axis of size 1 another stride: one token would be computed in another
    form than it is in a packed row, and an ulp away.
    """
    batch, length, n_head = shape[:3]
    if length != 1:
        return log_decay.expand(batch, length, n_head)
    return log_decay.expand(max(batch, 2), 2, n_head)[:batch, :1]


class Decays:
    """Log decays (batch, time, head) in the two forms that the kernels read."""

    def __init__(self, log_decay: Tensor, chunk: int, sequences: Sequences | None = None):
        self.log_decay, self.chunk, self.sequences = log_decay, chunk, sequences
        same = log_decay.stride(0) == log_decay.stride(1) == 0
        self.fixed = log_decay[0, 0].contiguous() if same else None  # (head,) if one a head

    @functools.cached_property
    def cumulated(self) -> tuple[Tensor, Tensor]:
        """Cumulative in each chunk, as a sum of two float32."""
        packed = self.sequences
        log_decay = self.log_decay if packed is None else packed.spread(self.log_decay)
        return cumulate(log_decay, self.chunk)


def slab_of(settings: Settings, width: int, channels: int) -> int:
    """Channels of a program: a state of 8192 numbers fills the registers of four warps."""
    most = SLAB if settings.EXACT else min(2 * SLAB, max(SLAB, 128 * SLAB // width))
    return min(most, power_of_two(channels, 16))


def form_of(length: int, programs: int, width: int, settings: Settings) -> tuple[bool, int]:
    """Whether chunks run side by side without a state, and the chunks of a segment (0: no split).

    Walking over time, a chunk takes 1.8 us, whatever the row is; a row of few heads leaves most
    of the GPU idle meanwhile. A short one then repeats the products of all earlier chunks (at
    most length / 128 times the work), a long one reads key and value twice. This is reckoned for
    one row, never for the batch, so that a row alone equals the row in a batch, bit for bit: a
    large batch of such rows pays for it.
    """
    if length <= SHORT and programs * SLAB <= SHORT and width <= 2 * SLAB:
        return True, 0
    return False, SEGMENT if programs <= FEW and length > 2 * SEGMENT * settings.CHUNK else 0


def state_strides(state: Tensor | None) -> tuple[int, ...]:
    """Strides along batch, head, segment (0 where the row is whole), N, P."""
    if state is None:
        return (0, 0, 0, 0, 0)
    *lead, n, p = state.stride()
    return (*lead, n, p) if len(lead) == 3 else (*lead, 0, n, p)


@triton.jit(do_not_specialize=["n_chunk", "segment"])
def carry_kernel(ends, starts, final, initial, high, low, n_chunk, segment, n_head, size, channels,
                 i_b, i_h, i_n, i_p, REVERSE: tl.constexpr, HAS_DECAY: tl.constexpr,
                 HAS_INITIAL: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """States between segments from what each adds to zero: h <- exp(total) h + end, in turn."""
    n_block, n_segment = tl.cdiv(size, BLOCK), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    block, lane = program % n_block, program // n_block
    batch, head = lane // n_head, lane % n_head
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    if HAS_INITIAL:
        initial += batch * i_b + head * i_h
        source = initial + place // channels * i_n + place % channels * i_p
        h = tl.load(source, inside, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([BLOCK], tl.float32)
    high += lane * n_chunk * CHUNK
    low += lane * n_chunk * CHUNK
    ends += lane * n_segment * size
    starts += lane * n_segment * size
    for count in tl.range(0, n_segment):
        part = n_segment - 1 - count if REVERSE else count
        at = part.to(tl.int64) * size + place
        tl.store(starts + at, h, inside)
        end = tl.load(ends + at, inside, other=0.0)
        if HAS_DECAY:
            chunk = part * segment + tl.arange(0, WHOLE)
            last = chunk * CHUNK + CHUNK - 1
            known = (tl.arange(0, WHOLE) < segment) & (chunk < n_chunk)
            whole = tl.exp2(tl.load(high + last, known, other=0.0))
            whole *= 1.0 + LN_2 * tl.load(low + last, known, other=0.0)
            h = h * tl.reduce(whole, 0, product)
        h += end
    tl.store(final + lane * size + place, h, inside)


def starts_of(x, y, w, settings, scale, segment, *, reverse, decays, initial, final=None):
    """States before each segment (batch, head, segment, N, P), and the last one (in `final`)."""
    batch, length, n_head, channels = w.shape
    n_head = max(x.shape[2], y.shape[2], n_head)
    width, chunk = y.shape[3], settings.CHUNK
    n_chunk = -(-length // chunk)
    shape = (batch, n_head, -(-n_chunk // segment), width, channels)
    ends, starts = (w.new_empty(shape, dtype=torch.float32) for _ in range(2))
    last = ends.new_empty((batch, n_head, width, channels)) if final is None else final
    walk(x, y, w, None, settings, scale, segment, reverse=reverse, decays=decays, final=ends)
    high, low = (last, last) if decays is None else decays.cumulated
    size, block = width * channels, 1024
    carry_kernel[(batch * n_head * -(-size // block),)](
        ends, starts, last, last if initial is None else initial, high, low, n_chunk, segment,
        n_head, size, channels, *((0, 0, 0, 0) if initial is None else initial.stride()),
        REVERSE=reverse, HAS_DECAY=decays is not None, HAS_INITIAL=initial is not None,
        CHUNK=chunk, WHOLE=power_of_two(segment), BLOCK=block,
    )  # fmt: skip
    return starts, last


@functools.lru_cache(maxsize=1024)
def _plan(
    x, y, w, strides, initial_strides, settings, scale, segment, reverse, short, given, packed
):
    """Kernel, grid, numbers, constants of a launch on tensors of these shapes and strides, and
    a place for what was compiled for them. packed: sequences in the row, None for one in each."""
    has_decay, fixed, has_initial, store, final = given
    (batch, length, n_head, channels), width = w, y[3]
    n_head = max(x[2], y[2], n_head)
    wide, slab = power_of_two(width, 16), slab_of(settings, width, channels)
    if short and not settings.EXACT:
        settings = settings._replace(STAGES=SHORT_STAGES)
    n_chunk = -(-length // settings.CHUNK)
    if packed is not None:
        batch, n_chunk = packed, length // settings.CHUNK + packed
    segment = segment or n_chunk
    tasks = n_chunk + final if short else -(-n_chunk // segment)
    grid = (batch * n_head * -(-channels // slab) * tasks, 1, 1)
    numbers = (length, n_chunk, segment, n_head, width, channels, scale,
               1.0 / scale if reverse else 1.0, *strides, *initial_strides)  # fmt: skip
    constants = settings._asdict() | {
        "X_SHARE": n_head // x[2], "Y_SHARE": n_head // y[2], "W_SHARE": n_head // w[2],
        "REVERSE": reverse, "HAS_DECAY": has_decay, "FIXED": fixed, "HAS_INITIAL": has_initial,
        "STORE": store, "FINAL": final, "WIDTH": wide, "SLAB": slab,
        "FULL": length % settings.CHUNK == 0 and width == wide and channels % slab == 0
                and packed is None,
    }  # fmt: skip
    return short_kernel if short else chunk_kernel, grid, numbers, constants, {}


def walk(x, y, w, out, settings, scale, segment=0, *, reverse=False, decays=None, initial=None,
         final=None, short=False, sequences=None):  # fmt: skip
    """One launch; `out` None: only the last state counts. segment: chunks a program, 0 for all.

    `initial` has an axis more (batch, head, segment, N, P) where the row is split. sequences: of
    a packed row, which is not split; `initial` and `final` then have one state for each.
    """
    strides = (*x.stride(), *y.stride(), *w.stride())
    if max(strides) > MAX_TILE_STRIDE or min(strides) < 0:
        x, y, w = narrow(x, 1), narrow(y, 1), narrow(w, 1)
        strides = (*x.stride(), *y.stride(), *w.stride())
    fixed = decays is not None and decays.fixed is not None and not segment
    kernel, grid, numbers, constants, built = _plan(
        x.shape, y.shape, w.shape, strides, state_strides(initial),
        settings, scale, segment, reverse, short,
        (decays is not None, fixed, initial is not None, out is not None, final is not None),
        None if sequences is None else sequences.count,
    )  # fmt: skip
    high = low = x
    if fixed:
        high = low = decays.fixed
    elif decays is not None:
        high, low = decays.cumulated
    tensors = (x, y, w, x if out is None else out, high, low, x if initial is None else initial,
               x if final is None else final,
               None if sequences is None else sequences.table)  # fmt: skip
    start(kernel, grid, tensors, numbers, constants, built)


def start(kernel, grid, tensors, numbers, constants, built):
    """Launch; the second time without asking again which variant of the kernel fits.

    `built`: what was compiled for these numbers and constants, by all else a variant depends on.
    Looking that up took most of the host's time: about 60 arguments.
    """
    key = (
        tensors[0].device.index,
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
    )
    known = built.get(key)
    if known is None:
        built[key] = kernel[grid](*tensors, *numbers, **constants)
        return
    named = kernel.arg_names[len(tensors) + len(numbers) :]
    known[grid](*tensors, *numbers, *[constants[name] for name in named])


def run(x, y, w, out, settings, scale, *, reverse=False, decays=None, initial=None, final=None,
        sequences=None):  # fmt: skip
    """out and the last state (`final`, None: not wanted), in the form that the shape calls for.

    A packed row is always walked: its lengths, which would tell the form, are on the device.
    """
    if sequences is not None:
        walk(x, y, w, out, settings, scale, reverse=reverse, decays=decays, initial=initial,
             final=final, sequences=sequences)  # fmt: skip
        return
    n_head = max(x.shape[2], y.shape[2], w.shape[2])
    width, channels = y.shape[3], w.shape[3]
    programs = n_head * -(-channels // slab_of(settings, width, channels))
    short, segment = form_of(w.shape[1], programs, width, settings)
    if segment:
        initial, _ = starts_of(x, y, w, settings, scale, segment, reverse=reverse, decays=decays,
                               initial=initial, final=final)  # fmt: skip
        final = None
    walk(x, y, w, out, settings, scale, segment, reverse=reverse, decays=decays, initial=initial,
         final=final, short=short)  # fmt: skip
