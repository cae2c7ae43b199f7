"""The walk of chunk_kernel with the gradient of the log decay beside it, for gradients in float32
and float16 and for wide states: as dq = forward(dy, v, k) and dk = reverse(v, dy, q), which also
sum the pairs that span each token. In bf16 scalar_decay_adjoint does the same faster.
"""

import torch
import triton
import triton.language as tl

from dsf_kernels.chunks import cells, chunk_decays, entering, owned, pair_decay, rows
from dsf_kernels.launch import narrow, power_of_two

SLAB = 64


@triton.jit(do_not_specialize=["length", "n_chunk"])
def spanning_kernel(x, y, w, extra, out, high, low, initial, saved, share, table,
                    length, n_chunk, n_head, width, channels, scale, initial_scale,
                    x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, w_b, w_t, w_h, w_w,
                    e_b, e_t, e_h, e_w, i_b, i_h, i_n, i_p,
                    W_SHARE: tl.constexpr, E_SHARE: tl.constexpr, REVERSE: tl.constexpr,
                    HAS_INITIAL: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
                    WIDTH: tl.constexpr, SLAB: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`extra`: dots with `out`; `saved`: the state before each chunk; table: see chunk_kernel."""
    n_slab = tl.cdiv(channels, SLAB)
    slab, lane, batch, head, offset = owned(n_slab, n_head, SLAB)
    line = batch
    if table is not None:
        line, lane = 0, head
    x += line * x_b + head * x_h
    y += line * y_b + head * y_h
    w += line * w_b + head // W_SHARE * w_h
    extra += line * e_b + head // E_SHARE * e_h
    out += (line * length * n_head + head) * channels
    high += lane * n_chunk * CHUNK
    low += lane * n_chunk * CHUNK
    n_lane = tl.num_programs(0) // n_slab if table is None else n_head
    share += (slab * n_lane + lane) * n_chunk * CHUNK
    saved += lane * n_chunk * width * channels
    if table is not None:
        table += 2 * batch
        begin, skipped = tl.load(table), tl.load(table + 1)
        x += begin * x_t
        y += begin * y_t
        w += begin * w_t
        extra += begin * e_t
        out += begin * n_head * channels
        high += skipped * CHUNK
        low += skipped * CHUNK
        share += skipped * CHUNK
        saved += skipped * width * channels
        length = (tl.load(table + 2) - begin).to(tl.int32)
        n_chunk = tl.cdiv(length, CHUNK)
    row, column, inside = cells(offset, width, channels, FULL, WIDTH, SLAB)
    initial += batch * i_b + head * i_h
    h = entering(initial, row, column, inside, i_n, i_p, HAS_INITIAL)
    if HAS_INITIAL:
        h = h * initial_scale
    i = tl.arange(0, CHUNK)
    pair = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
    for count in tl.range(0, n_chunk, num_stages=STAGES):
        chunk = n_chunk - 1 - count if REVERSE else count
        first = chunk * CHUNK
        ys = rows(y, first, length, y_t, y_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        ws = rows(w, first, length, w_t, w_w, channels, offset, FULL, CHUNK, SLAB).to(COMPUTE)
        g, g_low, to_end, from_start, whole = chunk_decays(
            high, low, first, length, CHUNK, EXACT, False
        )
        written = (ws.to(tl.float32) * (from_start if REVERSE else to_end)[:, None]).to(COMPUTE)
        xs = rows(x, first, length, x_t, x_w, width, 0, FULL, CHUNK, WIDTH).to(COMPUTE)
        between = tl.dot(xs, h.to(COMPUTE), input_precision=PRECISION)
        between = between * (to_end if REVERSE else from_start)[:, None]
        score = tl.dot(xs, tl.trans(ys), input_precision=PRECISION)
        score = score * pair_decay(g, g_low, pair, 1 if REVERSE else 0, EXACT)
        es = rows(extra, first, length, e_t, e_w, channels, offset, FULL, CHUNK, SLAB)
        spanning = tl.sum(es.to(tl.float32) * between, 1)[:, None]
        place = saved + (chunk.to(tl.int64) * width + row) * channels + column
        if REVERSE:  # pairs (later chunk, j < t), and (later chunk, earlier chunk)
            earlier = tl.load(place, inside, other=0.0).to(tl.float32)
            total = tl.sum(tl.sum(earlier * h, 1), 0) * whole
            total += tl.sum(tl.where(i[:, None] < i[None, :], spanning, 0.0), 0)
        else:  # pairs (i >= t, earlier chunk), and (i >= t, j < t)
            tl.store(place, h.to(saved.dtype.element_ty), inside)
            product = tl.dot(es.to(COMPUTE), tl.trans(ws), input_precision=PRECISION)
            product = (score * product).to(COMPUTE)
            before = (i[:, None] < i[None, :]).to(COMPUTE)
            prefix = tl.dot(product, before, input_precision=PRECISION)
            total = tl.sum(tl.where(pair, prefix + spanning, 0.0), 0)
        tl.store(share + first + i, total * scale)
        result = tl.dot(score.to(COMPUTE), ws, between, input_precision=PRECISION)
        place = out + (first + i).to(tl.int64)[:, None] * (n_head * channels) + column
        keep = (first + i[:, None] < length) & (column < channels)
        tl.store(place, (result * scale).to(out.dtype.element_ty), None if FULL else keep)
        h = tl.dot(tl.trans(ys), written, h * whole, input_precision=PRECISION)


def spanning_gradients(
    query, key, value, decays, initial, grad, grad_final, scale, settings, sequences=None
):
    """Gradients of query and key, one per head, and of the log decay (batch, time, head).

    sequences: of a packed row (batch 1); tokens of none then have gradients 0.
    Cost: twice chunk_kernel's and N P numbers per chunk and head in memory.
    """
    batch, length, n_head, channels = value.shape
    n_state, chunk = key.shape[3], settings.CHUNK
    n_chunk, slab = -(-length // chunk), min(SLAB, power_of_two(n_state, 16))
    rows, table, empty = batch, None, torch.empty
    if sequences is not None:
        rows, n_chunk, table = sequences.count, sequences.bound, sequences.table
        empty = torch.zeros
    wide, n_slab = power_of_two(channels, 16), -(-n_state // slab)
    query, key, value, grad = (narrow(t, 1) for t in (query, key, value, grad))
    kept = torch.float32 if value.dtype == torch.float16 else value.dtype
    saved = value.new_empty((batch, n_head, n_chunk, channels, n_state), dtype=kept)
    shares = value.new_empty((2, n_slab, batch, n_head, n_chunk * chunk), dtype=torch.float32)
    shape = (batch, length, n_head, n_state)
    grads = [empty(shape, dtype=value.dtype, device=value.device) for _ in range(2)]
    passes = ((grad, value, key, query, initial), (value, grad, query, key, grad_final))
    for reverse, (x, y, w, extra, state) in enumerate(passes):
        state = None if state is None else state.mT
        spanning_kernel[(rows * n_head * n_slab,)](
            x, y, w, extra, grads[reverse], *decays.cumulated, x if state is None else state,
            saved, shares[reverse], table, length, n_chunk, n_head, channels, n_state, scale,
            1.0 / scale if reverse else 1.0, *x.stride(), *y.stride(), *w.stride(),
            *extra.stride(), *((0, 0, 0, 0) if state is None else state.stride()),
            W_SHARE=n_head // w.shape[2], E_SHARE=n_head // extra.shape[2],
            REVERSE=bool(reverse), HAS_INITIAL=state is not None, WIDTH=wide, SLAB=slab,
            FULL=length % chunk == 0 and channels == wide and n_state % slab == 0
            and sequences is None,
            **settings._asdict() | {"STAGES": 1},
        )  # fmt: skip
    grad_decay = shares.sum((0, 1)).mT
    if sequences is not None:
        return *grads, sequences.gather(grad_decay)
    return *grads, grad_decay[:, :length].contiguous()
