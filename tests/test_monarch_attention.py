"""MonarchAttention: the dense construction from its equations, its loss, masks, causal variant."""

from itertools import pairwise

import pytest
import torch
from model_laws import assert_near, normal

import dsf
from dsf.models._monarch_core import (
    Grid,
    MonarchRows,
    Tokens,
    half_steps,
    left_logits,
    objective,
    right_update,
)
from dsf.models.monarch_attention import (
    monarch_attention_recurrence,
    monarch_divergence,
    monarch_products,
)
from dsf.wrappers import core

EXACT = 1e-12
ROWS = 1e-13
SLACK = 1e-10
RANK_THRESHOLD = 1e-12


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=32, width=5, head=2, batch=2):
    return tuple(normal(batch, length, head, width, seed=i) for i in range(3))


def softmax_of(q, k, real=None):
    S = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if real is not None:
        S = S.masked_fill(~real[:, None, None], -torch.inf)
    return torch.softmax(S, -1), S


def naive(q, k, block, steps, front, real):
    """One head of one sample, index by index, on the padded set; q, k (padded, width)."""
    n, d = q.shape
    m = n // block
    Q, K = q.view(m, block, d), k.view(m, block, d)
    real = real.view(m, block)
    L = torch.zeros(block, m, m, dtype=q.dtype)
    R = torch.zeros(m, block, block, dtype=q.dtype)
    for j in range(block):
        L[j] = torch.eye(m)
    for _ in range(steps):
        for kk in range(m):
            for j in range(block):
                w = L[j, kk] * real[:, j]
                a, c = (w[:, None] * Q[:, j]).sum(0), w.sum()
                z = d**-0.5 * (K[kk] @ a) / (c + 1e-300)
                if real[kk].any():
                    R[kk, j] = torch.softmax(z.masked_fill(~real[kk], -torch.inf), 0)
        for j in range(block):
            z = torch.full((m, m), -torch.inf, dtype=q.dtype)  # k, l
            for kk in range(m):
                if real[kk].any():
                    r = R[kk, j]
                    z[kk] = Q[:, j] @ (d**-0.5 * r @ K[kk]) - torch.special.xlogy(r, r).sum()
            L[j] = torch.softmax(z, 0)
    M = torch.einsum("jkl,kji->ljki", L, R).reshape(n, n)
    return M, L, R


def padded(x, block, padding):
    missing = -len(x) % block
    pad = (missing, 0) if padding == "before" else (0, missing)
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + pad), pad[0]


# -- the construction --------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "head", "length", "width", "block", "steps"), [
    (1, 1, 16, 16, 4, 2), (1, 4, 16, 16, 8, 3), (1, 1, 19, 16, 4, 2), (2, 2, 32, 5, 8, 2),
    (2, 1, 24, 16, 7, 3), (1, 2, 13, 6, 5, 1),
])  # fmt: skip
@pytest.mark.parametrize("padding", ["after", "before"])
def test_is_the_dense_construction(batch, head, length, width, block, steps, padding):
    q, k, v = qkv(length, width, head, batch)
    real = torch.rand(batch, length) < 0.8
    real[:, 0] = True
    for mask in (None, real):
        system = monarch_attention_recurrence(
            q, k, block=block, steps=steps, padding=padding, key_mask=mask)  # fmt: skip
        M = dsf.materialise(system)
        for b in range(batch):
            keep = torch.ones(length, dtype=torch.bool) if mask is None else mask[b]
            full, _ = padded(keep, block, padding)
            for h in range(head):
                (Q, front), (K, _) = (padded(x[b, :, h], block, padding) for x in (q, k))
                dense, _, _ = naive(Q, K, block, steps, front, full)
                # rows of masked queries are not defined by the mathematics
                expected = dense[front : front + length, front : front + length][keep]
                near(M[b, h][keep], expected)
                assert not bool(M[b, h][:, ~keep].any())
        near(M.sum(-1), torch.ones_like(M[..., 0]), ROWS)
        assert float(M.min()) >= 0
        expected = torch.einsum("bhts,bshc->bthc", M, v)
        for backend in ("auto", "reference", "chunked"):
            near(dsf.scan(system, v, backend), expected, ROWS)


@pytest.mark.parametrize(("length", "block", "width", "steps"), [(500, 90, 32, 2), (300, 16, 4, 2),
                                                                 (256, 96, 8, 1)])  # fmt: skip
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_long_product_and_narrow_types(length, block, width, steps, kind):
    """Blocks above 64 and no powers of two; 16-bit inputs against the mathematics on them."""
    q, k, v = (x.to(kind) for x in qkv(length, width, 2, 1))
    system = monarch_attention_recurrence(q, k, block=block, steps=steps)
    exact = monarch_attention_recurrence(q.double(), k.double(), block=block, steps=steps)
    y = dsf.scan(exact, v.double())
    near(dsf.materialise(exact) @ v.double().transpose(1, 2), y.transpose(1, 2))
    tolerance = {torch.float64: EXACT, torch.float16: 1e-2, torch.bfloat16: 5e-2}[kind]
    near(dsf.scan(system, v).double(), y, tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("padding", ["after", "before"])
def test_one_block_and_blocks_of_one_are_softmax(steps, padding):
    q, k, _ = qkv(21)
    trailing = torch.arange(21) < torch.tensor([[21], [13]])
    random = torch.rand(2, 21) < 0.6
    random[:, 3] = True
    for block in (1, 21, 32):
        for mask in (None, trailing, random):
            M = dsf.materialise(monarch_attention_recurrence(
                q, k, block=block, steps=steps, padding=padding, key_mask=mask))  # fmt: skip
            keep = torch.ones(2, 21, dtype=torch.bool) if mask is None else mask
            expected = softmax_of(q, k, keep)[0]
            near(M.transpose(1, 2)[keep], expected.transpose(1, 2)[keep])


def test_cascade_of_block_diagonals_rebuilds_the_matrix():
    """M = P^T blkdiag(L_j^T) P blkdiag(R_k), exactly."""
    q, k, _ = qkv(24, head=1, batch=1)
    rows = core(monarch_attention_recurrence(q, k, block=4, steps=2)).C
    left, right = rows.left[0, 0], rows.right[0, 0]
    R = torch.block_diag(*right)
    L = torch.block_diag(*left.mT)
    token = torch.arange(24)
    P = torch.zeros(24, 24, dtype=torch.float64)
    P[(token % 4) * 6 + token // 4, token] = 1
    assert torch.equal(P.T @ L @ P @ R, rows.tile(slice(0, 24), slice(0, 24))[0, 0])


@pytest.mark.parametrize("length", [16, 32])
def test_ranks_of_random_factors_are_full(length):
    """Monarch structure gives no finite recurrence: every strict block has full rank."""
    block = 4
    m = length // block
    left = torch.softmax(normal(1, 1, block, m, m), -2)
    right = torch.softmax(normal(1, 1, m, block, block, seed=1), -1)
    every = slice(0, length)
    M = MonarchRows(left, right, n_row=length, n_column=length).tile(every, every)[0, 0]
    for t in range(1, length):
        assert int(torch.linalg.matrix_rank(M[t:, :t], rtol=RANK_THRESHOLD)) == min(t, length - t)


# -- the objective -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padding", ["after", "before"])
def test_objective_rises_and_certifies_the_loss(masked, padding):
    q, k, _ = qkv(30)
    q = 2 * q
    real = torch.ones(2, 30, dtype=torch.bool)
    if masked:
        real[0, 24:] = False
        real[1, ::3] = False
    grid = Grid.of(30, 4, padding)
    tokens = Tokens.of(q, k, real, grid, None)
    values = [objective(tokens, f) for f in half_steps(tokens, 4)]
    for earlier, later in pairwise(values):
        assert bool((later >= earlier - SLACK).all())
    for steps in (1, 3):
        M = dsf.materialise(monarch_attention_recurrence(
            q, k, block=4, steps=steps, padding=padding, key_mask=real))  # fmt: skip
        S = softmax_of(q, k, real)[1]
        ratio = torch.where(M > 0, M, 1.0).log() - torch.log_softmax(S, -1)
        kl = torch.where(M > 0, M * ratio, 0.0).sum(-1)
        direct = (kl * real[:, None]).sum(-1)
        found = monarch_divergence(
            q, k, block=4, steps=steps, padding=padding, key_mask=real)  # fmt: skip
        near(found / direct, torch.ones_like(direct), SLACK)


def test_own_block_logit_is_its_log_sum():
    q, k, _ = qkv(24)
    tokens = Tokens.of(q, k, None, Grid.of(24, 4, "after"), None)
    logits = left_logits(tokens, *right_update(tokens, None))  # batch head j l k
    own = logits.diagonal(dim1=-2, dim2=-1).mT
    scores = tokens.scale * tokens.query @ tokens.key.mT
    near(own, torch.logsumexp(scores, -1))


def test_product_counts_are_the_published_ones():
    vit = [144 * monarch_products(197, 14, t, 64) / 1e6 for t in (1, 2, 3)]
    assert [f"{x:.1f}" for x in vit] == ["139.3", "251.6", "363.8"]
    assert f"{144 * 2 * 197**2 * 64 / 1e6:.1f}" == "715.3"
    dense = 2 * 384**2 * 64
    roberta = [12 * (8 * monarch_products(384, b, 1, 64) + 4 * dense) / 1e9
               for b in (24, 48, 96, 128)]  # fmt: skip
    assert [f"{x:.3f}" for x in roberta] == ["1.151", "1.283", "1.604", "1.826"]
    cases = [(1024, 32, 3), (2048, 32, 2), (4096, 64, 2), (8192, 64, 2)]
    bart = [72 * monarch_products(n, b, t, 64) / 1e9 for n, b, t in cases]
    assert [f"{x:.4g}" for x in bart] == ["1.963", "3.926", "10.87", "31.41"]
