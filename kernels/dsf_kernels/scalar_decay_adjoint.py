"""Gradients of scalar_decay_scan with chunks in parallel: two kernels and the states between them.

The first walks time from both ends and writes, per chunk of c tokens, the state h at its start and
the gradient e of the state at its end (divided by the scale s). The second takes all chunks at
once: with g the cumulative log decay in the chunk, D_ij = exp(g_i - g_j) for i >= j, else 0,
S_ij = D_ij q_i . k_j and W_ij = D_ij dy_i . v_j,

    dq_i = s (exp(g_i) h dy_i + sum_j W_ij k_j)
    dk_j = s (exp(g_c - g_j) e v_j + sum_i W_ij q_i)
    dv_j = s (exp(g_c - g_j) k_j e + sum_i S_ij dy_i)
    dl_t = s (sum_{j < t <= i} W_ij q_i . k_j + sum_{i >= t} exp(g_i) q_i h dy_i
              + sum_{j < t} exp(g_c - g_j) k_j e v_j + exp(g_c) <h, e>)

dl, the gradient of the log decay, sums the pairs that span a token and never takes a difference
of prefix sums, so it stays exact where decays are strong or 0. The programs for dq and dk sum the
heads that share q and k in registers. Where the log decay wants no gradient, the serial kernel
(chunk_kernel), which keeps no states, is faster.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsf_kernels.chunks import chunk_decays, pair_decay, rows
from dsf_kernels.launch import narrow, power_of_two
from dsf_kernels.scalar_decay_launch import Decays, Settings
from dsf_kernels.scalar_decay_states import states_of
from dsf_kernels.sequences import Sequences

# Of the products' inner axis. Two outputs to a program need fewer loads, but more registers, and
# with two stages Triton 3.6 then lets a copy overtake the product that still reads its tile.
PART = {"SLAB": 64, "STAGES": 2, "num_warps": 4}
MAX_HEADS = 16  # heads whose dq and dk one program sums


@triton.jit
def part(x, y, w, state, out, high, low, first, length, n_chunk, x_width, w_width, out_step,
         state_step, state_row, scale, x_t, x_h, x_w, y_t, y_h, y_w, w_t, w_w,
         LATER: tl.constexpr, HEADS: tl.constexpr, FULL: tl.constexpr,
         EXACT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
         WIDE: tl.constexpr, SLAB: tl.constexpr, N_SLAB: tl.constexpr, FLIP: tl.constexpr,
         STAGES: tl.constexpr):  # fmt: skip
    """out_i = scale sum over heads of (decay_i x_i state + sum_j D_ij (x_i . y_j) w_j).

    LATER 1: i is the later token of a pair, else j. FLIP: the state is stored (w, x).
    """
    i = tl.arange(0, CHUNK)
    pair = i[:, None] >= i[None, :] if LATER else i[:, None] <= i[None, :]
    wide, slim = tl.arange(0, WIDE), tl.arange(0, SLAB)
    total = tl.zeros([CHUNK, WIDE], tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        start = head * n_chunk.to(tl.int64) * CHUNK
        g, g_low, to_end, from_start, _ = chunk_decays(
            high + start, low + start, first, length, CHUNK, EXACT, False
        )
        weight = tl.zeros([CHUNK, CHUNK], tl.float32)
        inter = tl.zeros([CHUNK, WIDE], tl.float32)
        for slab in tl.range(0, N_SLAB, num_stages=STAGES):
            offset = slab * SLAB
            xs = rows(x + head * x_h, first, length, x_t, x_w, x_width, offset, FULL, CHUNK, SLAB)
            ys = rows(y + head * y_h, first, length, y_t, y_w, x_width, offset, FULL, CHUNK, SLAB)
            xs, ys = xs.to(COMPUTE), ys.to(COMPUTE)
            place = state + head * state_step
            if FLIP:
                place += wide[:, None] * state_row + offset + slim[None, :]
                inside = (wide[:, None] < w_width) & (offset + slim[None, :] < x_width)
            else:
                place += (offset + slim[:, None]) * state_row + wide[None, :]
                inside = (wide[None, :] < w_width) & (offset + slim[:, None] < x_width)
            h = tl.load(place) if FULL else tl.load(place, inside, other=0.0)
            h = h.to(COMPUTE)
            weight = tl.dot(xs, tl.trans(ys), weight, input_precision=PRECISION)
            inter = tl.dot(xs, tl.trans(h) if FLIP else h, inter, input_precision=PRECISION)
        inter = inter * (from_start if LATER else to_end)[:, None]
        weight = weight * pair_decay(g, g_low, pair, 0 if LATER else 1, EXACT)
        ws = rows(w, first, length, w_t, w_w, w_width, 0, FULL, CHUNK, WIDE).to(COMPUTE)
        inter = tl.dot(weight.to(COMPUTE), ws, inter, input_precision=PRECISION)
        total = inter if HEADS == 1 else total + inter
    place = out + (first + i).to(tl.int64)[:, None] * out_step + wide[None, :]
    keep = (first + i[:, None] < length) & (wide[None, :] < w_width)
    tl.store(place, (total * scale).to(out.dtype.element_ty), None if FULL else keep)


@triton.jit
def spans(q, k, v, dy, states, grads, out, high, low, first, length, width, channels, scale,
          q_t, q_w, k_t, k_w, v_t, v_w, y_t, y_w, FULL: tl.constexpr, EXACT: tl.constexpr,
          COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
          SLAB: tl.constexpr, N_SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dl: the sums over the pairs that span each token."""
    i = tl.arange(0, CHUNK)
    pair = i[:, None] >= i[None, :]
    row, column = tl.arange(0, WIDE)[:, None], tl.arange(0, SLAB)[None, :]
    g, g_low, to_end, from_start, whole = chunk_decays(
        high, low, first, length, CHUNK, EXACT, False
    )
    qs = rows(q, first, length, q_t, q_w, width, 0, FULL, CHUNK, WIDE).to(COMPUTE)
    ks = rows(k, first, length, k_t, k_w, width, 0, FULL, CHUNK, WIDE).to(COMPUTE)
    weight = tl.zeros([CHUNK, CHUNK], tl.float32)
    left = tl.zeros([CHUNK], tl.float32)  # later tokens with the state before
    right = tl.zeros([CHUNK], tl.float32)  # earlier tokens with the state after
    over = 0.0  # the state before with the state after
    for slab in tl.range(0, N_SLAB, num_stages=STAGES):
        offset = slab * SLAB
        vs = rows(v, first, length, v_t, v_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        ys = rows(dy, first, length, y_t, y_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        place = row * channels + offset + column
        if FULL:
            h, e = tl.load(states + place).to(COMPUTE), tl.load(grads + place).to(COMPUTE)
        else:
            inside = (row < width) & (offset + column < channels)
            h = tl.load(states + place, inside, other=0.0).to(COMPUTE)
            e = tl.load(grads + place, inside, other=0.0).to(COMPUTE)
        product = h.to(tl.float32) * e.to(tl.float32)
        over += tl.sum(tl.sum(product, 1), 0)  # pyright: ignore[reportOperatorIssue]
        weight = tl.dot(ys, tl.trans(vs), weight, input_precision=PRECISION)
        product = tl.dot(qs, h, input_precision=PRECISION)
        left += tl.sum(ys.to(tl.float32) * product, 1)
        product = tl.dot(ks, e, input_precision=PRECISION)
        right += tl.sum(vs.to(tl.float32) * product, 1)
    score = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
    inner = (weight * score * pair_decay(g, g_low, pair, 0, EXACT)).to(COMPUTE)
    before = (i[:, None] < i[None, :]).to(COMPUTE)
    prefix = tl.dot(inner, before, input_precision=PRECISION)  # [i, t]: over j < t
    total = tl.sum(tl.where(pair, prefix + (left * from_start)[:, None], 0.0), 0)
    total += tl.sum(tl.where(pair, 0.0, (right * to_end)[:, None]), 0)
    tl.store(out + first + i, (total + over * whole) * scale, first + i < length)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def gradient_kernel(q, k, v, dy, high, low, states, grads, dq, dk, dv, dl,
                    chunks, length, n_chunk, n_head, width, channels, scale,
                    q_b, q_t, q_h, q_w, k_b, k_t, k_h, k_w, v_b, v_t, v_h, v_w, y_b, y_t, y_h, y_w,
                    Q_SHARE: tl.constexpr, K_SHARE: tl.constexpr, HEADS: tl.constexpr,
                    FULL: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
                    PRECISION: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
                    CHANNELS: tl.constexpr, N_SLAB: tl.constexpr, P_SLAB: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Programs side by side share a chunk of HEADS heads, so that their tiles meet in the cache:
    one for dq, one for dk, one a head for dv, one a head for dl.

    chunks: None, or first token and number of tokens of every chunk of a packed row."""
    TASKS: tl.constexpr = 2 + 2 * HEADS
    n_part = n_head // HEADS
    program = tl.program_id(0).to(tl.int64)
    task, program = (program % TASKS).to(tl.int32), program // TASKS
    chunk, lane = (program % n_chunk).to(tl.int32), program // n_chunk
    batch, split = lane // n_part, lane % n_part
    first = chunk * CHUNK
    head = split * HEADS + (0 if task < 2 else (task - 2) % HEADS)
    q += batch * q_b + head // Q_SHARE * q_h
    k += batch * k_b + head // K_SHARE * k_h
    v += batch * v_b + head * v_h
    dy += batch * y_b + head * y_h
    lane = batch * n_head + head
    high += lane * n_chunk * CHUNK
    low += lane * n_chunk * CHUNK
    states += (lane * n_chunk + chunk) * width * channels
    grads += (lane * n_chunk + chunk) * width * channels
    dv += (batch * length * n_head + head) * channels
    step = n_part * width
    dq += (batch * length * n_part + split) * width
    dk += (batch * length * n_part + split) * width
    dl += lane * length
    if chunks is not None:
        shift = tl.load(chunks + 2 * chunk) - first
        length = first + tl.load(chunks + 2 * chunk + 1).to(tl.int32)
        q += shift * q_t
        k += shift * k_t
        v += shift * v_t
        dy += shift * y_t
        dv += shift * n_head * channels
        dq += shift * step
        dk += shift * step
        dl += shift
    size = width * channels
    state_step = n_chunk.to(tl.int64) * size
    if task == 0:
        part(dy, v, k, states, dq, high, low, first, length, n_chunk, channels, width, step,
             state_step, channels, scale, y_t, y_h, y_w, v_t, v_h, v_w, k_t, k_w, 1, HEADS,
             FULL, EXACT, COMPUTE, PRECISION, CHUNK, WIDTH, P_SLAB,
             tl.cdiv(CHANNELS, P_SLAB), True, STAGES)  # fmt: skip
    elif task == 1:
        part(v, dy, q, grads, dk, high, low, first, length, n_chunk, channels, width, step,
             state_step, channels, scale, v_t, v_h, v_w, y_t, y_h, y_w, q_t, q_w, 0, HEADS,
             FULL, EXACT, COMPUTE, PRECISION, CHUNK, WIDTH, P_SLAB,
             tl.cdiv(CHANNELS, P_SLAB), True, STAGES)  # fmt: skip
    elif task < 2 + HEADS:
        part(k, q, dy, grads, dv, high, low, first, length, n_chunk, width, channels,
             n_head * channels, state_step, channels, scale, k_t, k_h, k_w, q_t, q_h, q_w, y_t,
             y_w, 0, 1, FULL, EXACT, COMPUTE, PRECISION, CHUNK, CHANNELS, N_SLAB,
             tl.cdiv(WIDTH, N_SLAB), False, STAGES)  # fmt: skip
    else:
        spans(q, k, v, dy, states, grads, dl, high, low, first, length, width, channels, scale,
              q_t, q_w, k_t, k_w, v_t, v_w, y_t, y_w, FULL, EXACT, COMPUTE, PRECISION, CHUNK,
              WIDTH, P_SLAB, tl.cdiv(CHANNELS, P_SLAB), STAGES)  # fmt: skip


def heads_together(n_head: int, *groups: int) -> int:
    """Heads that one program sums: they share query and key, at most MAX_HEADS of them."""
    run = math.gcd(*(n_head // group for group in groups))
    return max(n for n in range(1, min(run, MAX_HEADS) + 1) if run % n == 0)


def adjoint(
    query: Tensor, key: Tensor, value: Tensor, decays: Decays, initial: Tensor | None,
    grad: Tensor, grad_final: Tensor | None, scale: float, settings: Settings,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query and key (one per run of heads), value, log decay, initial state.

    Cost: time x (14 N P + 384 (N + P)) operations a head, 2 N P numbers per chunk and head in
    memory. sequences: of a packed row (batch 1); tokens of none then have gradients 0.
    """
    batch, length, n_head, channels = value.shape
    width, chunk = key.shape[3], settings.CHUNK
    n_chunk, heads = -(-length // chunk), heads_together(n_head, query.shape[2], key.shape[2])
    query, key, value, grad = (narrow(t, 1) for t in (query, key, value, grad))
    final = heads * query.shape[2] == n_head == heads * key.shape[2]
    summed = (batch, length, n_head // heads, width)
    kind = value.dtype if final else torch.float32
    new, chunks = value.new_empty, None
    if sequences is not None:
        new, n_chunk, chunks = value.new_zeros, sequences.bound, sequences.chunks()
    grad_query, grad_key = (new(summed, dtype=kind) for _ in range(2))
    grad_value = new(value.shape)
    grad_decay = new((batch, n_head, length), dtype=torch.float32)
    wide, broad = power_of_two(width, 16), power_of_two(channels, 16)
    states, grads, grad_initial = states_of(
        query, key, value, grad, decays, initial, grad_final, scale, settings, sequences
    )
    inner = settings._asdict() | ({} if settings.EXACT else PART)
    slab = inner.pop("SLAB", PART["SLAB"])
    gradient_kernel[((2 + 2 * heads) * batch * n_chunk * (n_head // heads),)](
        query, key, value, grad, *decays.cumulated, states, grads, grad_query, grad_key,
        grad_value, grad_decay, chunks, length, n_chunk, n_head, width, channels, scale,
        *query.stride(), *key.stride(), *value.stride(), *grad.stride(),
        Q_SHARE=n_head // query.shape[2], K_SHARE=n_head // key.shape[2],
        WIDTH=wide, CHANNELS=broad, HEADS=heads,
        FULL=length % chunk == 0 and width == wide and channels == broad and sequences is None,
        N_SLAB=min(slab, wide), P_SLAB=min(slab, broad), **inner,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_decay.mT, grad_initial
