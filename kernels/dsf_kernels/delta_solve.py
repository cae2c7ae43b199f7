"""Device code of delta_scan: the triangular solve of each chunk."""

import triton
import triton.language as tl

from dsf_kernels.chunks import decay_between, rows


@triton.jit
def _strict(product, strength, high, low, row, column, s_t, left,
            HAS_DECAY: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Block (row, column) of G: beta_i exp(g_i - g_j) k_i . k_j where i > j, else 0."""
    i, j = row * 16 + tl.arange(0, 16), column * 16 + tl.arange(0, 16)
    beta = tl.load(strength + i * s_t, i < left, other=0.0).to(tl.float32)
    keep = i[:, None] > j[None, :]
    product = product * beta[:, None]
    if HAS_DECAY:
        g, to = tl.load(high + i), tl.load(high + j)
        if EXACT:
            g_low, to_low = tl.load(low + i), tl.load(low + j)
        else:
            g_low, to_low = g, to
        product = product * decay_between(
            g[:, None], g_low[:, None], to[None, :], to_low[None, :], keep, EXACT
        )
    return tl.where(keep, product, 0.0)


@triton.jit
def _inverse(g, SOLVE: tl.constexpr):
    """(I + g)^-1 of strictly lower blocks (block, 16, 16), from pairs of 1, 2, 4, 8 rows."""
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    t = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), g, 0.0)
    for level in tl.static_range(1, 4):
        beside = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        step = tl.dot(t, tl.where(beside, g, 0.0), input_precision=SOLVE)
        t -= tl.dot(step, t, input_precision=SOLVE)
    return t


@triton.jit
def _pick(blocks, block, BLOCKS: tl.constexpr):
    chosen = tl.arange(0, BLOCKS)[:, None, None] == block
    return tl.sum(tl.where(chosen, blocks, 0.0), 0)


@triton.jit
def _diagonal(key, strength, high, low, k_t, k_w, s_t, width, left,
              HAS_DECAY: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
              COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
              WIDTH: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Diagonal blocks of G: (block, 16, 16)."""
    i = tl.arange(0, BLOCKS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    g = tl.zeros([BLOCKS, 16, 16], tl.float32)
    for start in tl.range(0, WIDTH, STEP):
        cell = start + tl.arange(0, STEP)[None, None, :]
        place = key + i[:, :, None] * k_t + cell * k_w
        if FULL:
            k = tl.load(place)
        else:
            k = tl.load(place, (i[:, :, None] < left) & (cell < width), other=0.0)
        k = k.to(COMPUTE)
        g = tl.dot(k, tl.trans(k, (0, 2, 1)), g, input_precision=PRECISION)
    beta = tl.load(strength + i * s_t, i < left, other=0.0).to(tl.float32)
    keep = tl.arange(0, 16)[None, :, None] > tl.arange(0, 16)[None, None, :]
    g = g * beta[:, :, None]
    if HAS_DECAY:
        e = tl.load(high + i)
        f = tl.load(low + i) if EXACT else e
        g *= decay_between(e[:, :, None], f[:, :, None], e[:, None, :], f[:, None, :], keep, EXACT)
    return tl.where(keep, g, 0.0)


@triton.jit
def _put(solved, block, row, column, CHUNK: tl.constexpr):
    i, j = row * 16 + tl.arange(0, 16)[:, None], column * 16 + tl.arange(0, 16)[None, :]
    tl.store(solved + i * CHUNK + j, block.to(solved.dtype.element_ty))


@triton.jit
def _against(t, a, b, SOLVE: tl.constexpr):
    """-t a b, a step of the forward substitution."""
    return -tl.dot(t, tl.dot(a, b, input_precision=SOLVE), input_precision=SOLVE)


@triton.jit(do_not_specialize=["length", "n_chunk"])
def solve_kernel(key, strength, high, low, solved, table, length, n_chunk, n_head, width,
                 k_b, k_t, k_h, k_w, s_b, s_t, s_h, SHARE: tl.constexpr,
                 HAS_DECAY: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
                 COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
                 CHUNK: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """T = (I + G)^-1 of one chunk, by forward substitution over blocks of 16 tokens.

    table: None, or first token and tokens of every chunk of a packed row.
    """
    program = tl.program_id(0).to(tl.int64)
    head, chunk = program % n_head, program // n_head % n_chunk
    batch = program // (n_head * n_chunk)
    lane, first = batch * n_head + head, chunk * CHUNK
    if table is not None:
        first = tl.load(table + 2 * chunk)
        length = first + tl.load(table + 2 * chunk + 1)
    key += batch * k_b + head // SHARE * k_h
    strength += batch * s_b + head * s_h + first * s_t
    high += (lane * n_chunk + chunk) * CHUNK
    low += (lane * n_chunk + chunk) * CHUNK
    solved += (lane * n_chunk + chunk) * CHUNK * CHUNK
    left = length - first
    zero = tl.zeros([16, 16], tl.float32)
    g = _diagonal(key + first * k_t, strength, high, low, k_t, k_w, s_t, width, left, HAS_DECAY,
                  FULL, EXACT, COMPUTE, PRECISION, CHUNK // 16, WIDTH, STEP)  # fmt: skip
    t = _inverse(g, SOLVE)
    t0 = _pick(t, 0, CHUNK // 16)
    _put(solved, t0, 0, 0, CHUNK)
    g10, g20, g21, g30, g31, g32 = zero, zero, zero, zero, zero, zero
    if CHUNK > 16:
        for start in tl.range(0, WIDTH, STEP):
            k0 = rows(key, first, length, k_t, k_w, width, start, FULL, 16, STEP).to(COMPUTE)
            k1 = rows(key, first + 16, length, k_t, k_w, width, start, FULL, 16, STEP)
            k1 = k1.to(COMPUTE)
            g10 = tl.dot(k1, tl.trans(k0), g10, input_precision=PRECISION)
            if CHUNK > 32:
                k2 = rows(key, first + 32, length, k_t, k_w, width, start, FULL, 16, STEP)
                k3 = rows(key, first + 48, length, k_t, k_w, width, start, FULL, 16, STEP)
                k2, k3 = k2.to(COMPUTE), k3.to(COMPUTE)
                g20 = tl.dot(k2, tl.trans(k0), g20, input_precision=PRECISION)
                g21 = tl.dot(k2, tl.trans(k1), g21, input_precision=PRECISION)
                g30 = tl.dot(k3, tl.trans(k0), g30, input_precision=PRECISION)
                g31 = tl.dot(k3, tl.trans(k1), g31, input_precision=PRECISION)
                g32 = tl.dot(k3, tl.trans(k2), g32, input_precision=PRECISION)
        t1 = _pick(t, 1, CHUNK // 16)
        g10 = _strict(g10, strength, high, low, 1, 0, s_t, left, HAS_DECAY, EXACT)
        t10 = _against(t1, g10, t0, SOLVE)
        _put(solved, t1, 1, 1, CHUNK)
        _put(solved, t10, 1, 0, CHUNK)
        _put(solved, zero, 0, 1, CHUNK)
    if CHUNK > 32:
        g20 = _strict(g20, strength, high, low, 2, 0, s_t, left, HAS_DECAY, EXACT)
        g21 = _strict(g21, strength, high, low, 2, 1, s_t, left, HAS_DECAY, EXACT)
        t2 = _pick(t, 2, CHUNK // 16)
        t21 = _against(t2, g21, t1, SOLVE)
        inner = tl.dot(g20, t0, input_precision=SOLVE)
        inner = tl.dot(g21, t10, inner, input_precision=SOLVE)
        t20 = -tl.dot(t2, inner, input_precision=SOLVE)
        _put(solved, t2, 2, 2, CHUNK)
        _put(solved, t21, 2, 1, CHUNK)
        _put(solved, t20, 2, 0, CHUNK)
        g30 = _strict(g30, strength, high, low, 3, 0, s_t, left, HAS_DECAY, EXACT)
        g31 = _strict(g31, strength, high, low, 3, 1, s_t, left, HAS_DECAY, EXACT)
        g32 = _strict(g32, strength, high, low, 3, 2, s_t, left, HAS_DECAY, EXACT)
        t3 = _pick(t, 3, CHUNK // 16)
        _put(solved, t3, 3, 3, CHUNK)
        _put(solved, _against(t3, g32, t2, SOLVE), 3, 2, CHUNK)
        inner = tl.dot(g31, t1, input_precision=SOLVE)
        inner = tl.dot(g32, t21, inner, input_precision=SOLVE)
        _put(solved, -tl.dot(t3, inner, input_precision=SOLVE), 3, 1, CHUNK)
        inner = tl.dot(g30, t0, input_precision=SOLVE)
        inner = tl.dot(g31, t10, inner, input_precision=SOLVE)
        inner = tl.dot(g32, t20, inner, input_precision=SOLVE)
        _put(solved, -tl.dot(t3, inner, input_precision=SOLVE), 3, 0, CHUNK)
        _put(solved, zero, 0, 2, CHUNK)
        _put(solved, zero, 0, 3, CHUNK)
        _put(solved, zero, 1, 2, CHUNK)
        _put(solved, zero, 1, 3, CHUNK)
        _put(solved, zero, 2, 3, CHUNK)
