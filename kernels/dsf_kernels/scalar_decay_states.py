"""States at the edges of chunks: the walk from both ends that scalar_decay_adjoint starts from."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunks import cells, chunk_decays, entering, rows
from dsf_kernels.launch import power_of_two
from dsf_kernels.scalar_decay_launch import Decays, Settings, form_of, starts_of, state_strides
from dsf_kernels.sequences import Sequences

WALK = {"SLAB": 64, "STAGES": 2, "num_warps": 4}  # channels whose state a program holds, ...


@triton.jit
def record(x, w, high, low, first_state, last_state, states, length, begin, stop, width, channels,
           offset, factor, x_t, x_w, w_t, w_w, s_n, s_p, REVERSE: tl.constexpr,
           HAS_STATE: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
           COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
           WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write the state before each chunk, then add the chunk's outer products to it."""
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    h = entering(first_state, row, column, inside, s_n, s_p, HAS_STATE)
    if HAS_STATE:
        h = h / factor
    for count in tl.range(0, stop - begin, num_stages=STAGES):
        chunk = stop - 1 - count if REVERSE else begin + count
        first = chunk * CHUNK
        place = states + chunk.to(tl.int64) * width * channels + row * channels + column
        tl.store(place, h.to(states.dtype.element_ty), inside)
        xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        _, _, to_end, from_start, whole = chunk_decays(
            high, low, first, length, CHUNK, EXACT, False
        )
        inward = from_start if REVERSE else to_end
        ws = (ws.to(tl.float32) * inward[:, None]).to(COMPUTE)
        h = h * whole
        h = tl.dot(tl.trans(xs), ws, h, input_precision=PRECISION)
    if REVERSE and begin == 0:
        tl.store(last_state + row * channels + column, h * factor, inside)


@triton.jit(do_not_specialize=["length", "n_chunk", "segment"])
def states_kernel(q, k, v, dy, high, low, initial, grad_final, states, grads, grad_initial,
                  table, length, n_chunk, segment, n_head, width, channels, scale,
                  q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w,
                  y_b, y_t, y_h, y_w, i_b, i_h, i_s, i_n, i_p, f_b, f_h, f_s, f_n, f_p,
                  Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, HAS_INITIAL: tl.constexpr,
                  HAS_FINAL: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                  COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                  WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """States at the chunks' starts (even programs), their gradients at the ends (odd ones).

    table: see chunk_kernel.
    """
    n_slab, n_segment = tl.cdiv(channels, SLAB), tl.cdiv(n_chunk, segment)
    program = tl.program_id(0).to(tl.int64)
    reverse, program = program % 2, program // 2
    offset, program = (program % n_slab).to(tl.int32) * SLAB, program // n_slab
    piece, lane = (program % n_segment).to(tl.int32), program // n_segment
    begin = piece * segment
    stop = tl.minimum(begin + segment, n_chunk)
    batch, head = lane // n_head, lane % n_head
    line, chunks = batch, lane * n_chunk
    if table is not None:
        table += 2 * batch
        line, chunks, start = 0, head * n_chunk + tl.load(table + 1), tl.load(table)
        length = (tl.load(table + 2) - start).to(tl.int32)
        stop = tl.cdiv(length, CHUNK)
        q += start * q_t
        k += start * k_t
        v += start * v_t
        dy += start * y_t
    high += chunks * CHUNK
    low += chunks * CHUNK
    before = chunks * width * channels
    if reverse == 0:
        record(k + line * k_b + head // K_SHARE * k_h, v + line * v_b + head * v_h, high, low,
               initial + batch * i_b + head * i_h + piece * i_s, grad_initial, states + before,
               length, begin, stop, width, channels, offset, 1.0, k_t, k_w, v_t, v_w, i_n, i_p,
               False, HAS_INITIAL, FULL, EXACT, COMPUTE, PRECISION, CHUNK, WIDTH, SLAB,
               STAGES)  # fmt: skip
    else:
        record(q + line * q_b + head // Q_SHARE * q_h, dy + line * y_b + head * y_h, high, low,
               grad_final + batch * f_b + head * f_h + piece * f_s,
               grad_initial + lane * width * channels, grads + before, length, begin, stop, width,
               channels, offset, scale, q_t, q_w, y_t, y_w, f_n, f_p, True, HAS_FINAL,
               FULL, EXACT, COMPUTE, PRECISION, CHUNK, WIDTH, SLAB, STAGES)  # fmt: skip


def states_of(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, decays: Decays,
    initial: Tensor | None, grad_final: Tensor | None, scale: float, settings: Settings,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """States before each chunk, gradients of those after it over `scale` (batch, head, chunk, N,
    P), both in the type of the products, and the gradient of the initial state."""
    batch, length, n_head, channels = value.shape
    width, chunk = key.shape[3], settings.CHUNK
    n_chunk, wide = -(-length // chunk), power_of_two(width, 16)
    walking = settings._asdict() | ({} if settings.EXACT else WALK)
    walking = walking | {"SLAB": min(WALK["SLAB"], power_of_two(channels, 16))}
    n_slab = -(-channels // walking["SLAB"])
    _, segment = form_of(length, n_head * n_slab, width, settings)
    rows, table = batch, None
    if sequences is not None:
        rows, n_chunk, segment, table = sequences.count, sequences.bound, 0, sequences.table
    if segment:
        initial, _ = starts_of(key, key, value, settings, 1.0, segment, reverse=False,
                               decays=decays, initial=initial)  # fmt: skip
        grad_final, _ = starts_of(query, query, grad, settings, scale, segment, reverse=True,
                                  decays=decays, initial=grad_final)  # fmt: skip
    segment = segment or n_chunk
    kept = torch.float32 if value.dtype == torch.float16 else value.dtype
    states, grads = value.new_empty((2, batch, n_head, n_chunk, width, channels), dtype=kept)
    grad_initial = value.new_empty((rows, n_head, width, channels), dtype=torch.float32)
    states_kernel[(2 * rows * n_head * n_slab * -(-n_chunk // segment),)](
        query, key, value, grad, *decays.cumulated, value if initial is None else initial,
        value if grad_final is None else grad_final, states, grads, grad_initial, table,
        length, n_chunk, segment, n_head, width, channels, scale, *query.stride(), *key.stride(),
        *value.stride(), *grad.stride(), *state_strides(initial), *state_strides(grad_final),
        Q_SHARE=n_head // query.shape[2], K_SHARE=n_head // key.shape[2],
        HAS_INITIAL=initial is not None,
        HAS_FINAL=grad_final is not None, WIDTH=wide,
        FULL=length % chunk == 0 and width == wide and channels % walking["SLAB"] == 0
        and sequences is None, **walking,
    )  # fmt: skip
    return states, grads, grad_initial
