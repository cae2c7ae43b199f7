"""Device code of hierarchical attention: the levels of the subtrees that one tile holds.

A tile holds M nodes of one level, families of B beside each other, every family filled up to a
power of two with empty nodes (count 0). Scores, logarithms to base 2, are a matrix (M, M) whose
blocks are added up on the way, so that a coarser level needs no product of its own:

    T_AB = n_A n_B S_AB = sum of the leaves' scores,   2^lambda_A = sum_{B != A} n_B 2^S_AB
    mu_A = 1 / (1 + 2^(lambda_A - g_A)),   g_P = sum_A n_A/n_P log2(2^g_A + 2^lambda_A)
    a_A = a_P mu_A (mass that stays in A),   Y_AB = a_P (1 - mu_A) 2^(S_AB - lambda_A)

with Y the weight of one leaf of B in the rows of A. Infinite logarithms are -1e30 here: a
difference of them is a number. Columns of items that do not count have weight in Y where their
parents count: they are met by values of zero. Each function calls itself for the level above.
"""

# Triton's functions are typed as returning a tensor or a tuple of them.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from dsf_kernels.exponentials import fast_exp2, fast_log2, fast_reciprocal

NONE = tl.constexpr(-1e30)
LIVE = tl.constexpr(-1e28)  # larger: a logarithm of something; means of NONE stay below it


@triton.jit
def slots(LEVELS: tl.constexpr, PADS: tl.constexpr, PLACES: tl.constexpr, N: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    """Item, counted from the tile's first, of every slot of the tile, and whether it is one."""
    rest = tl.arange(0, ROWS)
    item = tl.zeros([ROWS], tl.int32)
    inside = rest >= 0
    for level in tl.static_range(N):
        digit = rest % PADS[level]
        rest = rest // PADS[level]
        item += digit * PLACES[level]
        inside = inside & (digit < LEVELS[level])
    return item + rest * PLACES[N], inside


@triton.jit
def pooled(x, M: tl.constexpr, B: tl.constexpr):
    """Sums (M / B) of a vector over families."""
    return tl.sum(tl.reshape(x, [M // B, B]), 1)


@triton.jit
def spread(x, M: tl.constexpr, B: tl.constexpr):
    """A vector (M) with one number for all of a family."""
    return tl.reshape(tl.broadcast_to(x[:, None], [M // B, B]), [M])


@triton.jit
def pooled_pairs(x, M: tl.constexpr, B: tl.constexpr):
    """Sums (M / B, M / B) over blocks of two families."""
    return tl.sum(tl.sum(tl.reshape(x, [M // B, B, M // B, B]), 3), 1)


@triton.jit
def spread_pairs(x, M: tl.constexpr, B: tl.constexpr):
    """A matrix (M, M) with one number for a block of two families."""
    wide = tl.broadcast_to(x[:, None, :, None], [M // B, B, M // B, B])
    return tl.reshape(wide, [M, M])


@triton.jit
def diagonal(x, M: tl.constexpr):
    """The diagonal of a matrix (M, M)."""
    i = tl.arange(0, M)
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1)


@triton.jit
def family(T, n, g, M: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr):
    """p = 2^(S - top) among siblings, else 0; 1 / sum of n p, lambda, mu, 1 - mu, 1 / n.

    UNIT: no count is above 1.
    """
    i = tl.arange(0, M)
    apart = (i[:, None] ^ i[None, :]) - 1  # siblings differ below B, and B is a power of two
    siblings = apart.to(tl.uint32, bitcast=True) < B - 1
    least = fast_reciprocal(tl.maximum(n, 1.0))
    S = T
    if not UNIT:
        S = T * (least[:, None] * least[None, :])
    logits = tl.where(siblings, S + tl.where(n > 0, 0.0, NONE)[None, :], NONE)
    top = tl.max(logits, 1)
    alone = (top < LIVE) | (n == 0)
    top = tl.where(alone, 0.0, top)
    p = fast_exp2(logits - top[:, None])
    if UNIT:
        total = tl.sum(p, 1)
    else:
        total = tl.sum(p * n[None, :], 1)
    total = tl.where(alone, 1.0, total)
    lam = tl.where(alone, NONE, top + fast_log2(total))
    mu = tl.where(alone, 1.0, fast_reciprocal(1.0 + fast_exp2(lam - g)))
    leave = tl.where(alone, 0.0, fast_reciprocal(1.0 + fast_exp2(g - lam)))
    return p, fast_reciprocal(total), lam, mu, leave, least


@triton.jit
def parents(T, n, g, lam, M: tl.constexpr, B: tl.constexpr):
    """Sums of scores, counts and g of the level above."""
    high = tl.maximum(g, lam)
    both = high + fast_log2(fast_exp2(g - high) + fast_exp2(lam - high))
    count = pooled(n, M, B)
    mean = pooled(n * both, M, B) * fast_reciprocal(tl.maximum(count, 1.0))
    return pooled_pairs(T, M, B), count, tl.where(count > 0, mean, NONE)


@triton.jit
def weigh(T, n, g, M: tl.constexpr, PADS: tl.constexpr, U: tl.constexpr, N: tl.constexpr,
          LEAF: tl.constexpr):  # fmt: skip
    """Y and a of a level; count and g of the subtrees' roots."""
    if U == N:
        Y = tl.zeros([M, M], tl.float32)
        a = tl.full([M], 1.0, tl.float32)
        count, value = n, g
    else:
        B: tl.constexpr = PADS[U]
        p, part, lam, mu, leave, _ = family(T, n, g, M, B, LEAF and U == 0)
        T_up, n_up, g_up = parents(T, n, g, lam, M, B)
        Y_up, a_up, count, value = weigh(T_up, n_up, g_up, M // B, PADS, U + 1, N, LEAF)
        mass = spread(a_up, M, B)
        Y = (mass * leave * part)[:, None] * p + spread_pairs(Y_up, M, B)
        a = mass * mu
    return Y, a, count, value


@triton.jit
def adjoint(T, n, g, D, da, dg_root, M: tl.constexpr, PADS: tl.constexpr, U: tl.constexpr,
            N: tl.constexpr, LEAF: tl.constexpr):  # fmt: skip
    """Gradients of T and g from those of Y (D), a (da) and the roots' g; and Y, a, counts.

    With t_A = (1 - mu_A) sum_B D_AB W_AB + mu_A da_A, W = 2^(S - lambda) and da_P = sum_A t_A,

        dg_A = mu_A (a_P (da_A - t_A) + n_A/n_P dg_P)
        dlambda_A = (1 - mu_A) (n_A/n_P dg_P - a_P t_A)
        dT_AB = W_AB (a_P (1 - mu_A) D_AB + n_B dlambda_A) / (n_A n_B) + dT_PQ

    in natural logarithms.
    """
    if U == N:
        dT = tl.zeros([M, M], tl.float32)
        Y = tl.zeros([M, M], tl.float32)
        a = tl.full([M], 1.0, tl.float32)
        dg, count = dg_root, n
    else:
        B: tl.constexpr = PADS[U]
        UNIT: tl.constexpr = LEAF and U == 0
        p, part, lam, mu, leave, least = family(T, n, g, M, B, UNIT)
        T_up, n_up, g_up = parents(T, n, g, lam, M, B)
        kept = leave * part * tl.sum(D * p, 1) + mu * da
        dT_up, Y_up, a_up, dg_up, count = adjoint(
            T_up, n_up, g_up, pooled_pairs(D, M, B), pooled(kept, M, B), dg_root, M // B, PADS,
            U + 1, N, LEAF,
        )  # fmt: skip
        mass = spread(a_up, M, B)
        above = n * spread(dg_up * fast_reciprocal(tl.maximum(n_up, 1.0)), M, B)
        dg = mu * (mass * (da - kept) + above)
        dlam = leave * part * (above - mass * kept)
        weight = mass * leave * part
        if UNIT:
            own = p * (weight[:, None] * D + dlam[:, None])
        else:
            own = weight[:, None] * (D * least[None, :]) + dlam[:, None]
            own = p * least[:, None] * own
        dT = own + spread_pairs(dT_up, M, B)
        Y = weight[:, None] * p + spread_pairs(Y_up, M, B)
        a = mass * mu
    return dT, Y, a, dg, count
