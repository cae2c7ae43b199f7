"""ZeroS-SM: its rows against the printed sum, zero sums, limits, masks and options."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfUnsupportedError
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.models.zeros_softmax import ZerosSoftmax, zeros_softmax_recurrence

EXACT = 1e-13


def inputs(length=9):
    q, k = normal(2, length, 4, 3), normal(2, length, 2, 3, seed=1)
    g1, gh = (torch.sigmoid(normal(2, length, 4, seed=s)) for s in (2, 3))
    return q, k, g1, gh, torch.tanh(normal(2, length, 4, seed=4))


def row_by_row(q, k, g1, gh, g0, causal):
    batch, length, head, width = q.shape
    weights = torch.zeros(batch, head, length, length, dtype=q.dtype)
    for b in range(batch):
        for h in range(head):
            for t in range(length):
                n = t + 1 if causal else length
                z = k[b, :n, h // 2] @ q[b, t, h] * width**-0.5
                d, p = (z - z.mean()) / n, torch.softmax(z, -1)
                row = g1[b, t, h] * d + gh[b, t, h] * (p - 1 / n - d)
                weights[b, h, t, :n] = row + (0 if g0 is None else g0[b, t, h] / n)
    return weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("zero_order", [True, False])
def test_rows_are_the_printed_sum(causal, zero_order):
    q, k, g1, gh, g0 = inputs()
    g0 = g0 if zero_order else None
    system = zeros_softmax_recurrence(q, k, g1, gh, g0, causal=causal)
    expected = row_by_row(q, k, g1, gh, g0, causal)
    assert_near("map", dsf.materialise(system), expected, EXACT)
    v = normal(2, 9, 4, 5, seed=7)
    y = torch.einsum("bhts,bshp->bthp", expected, v)
    for backend in ("reference", "auto"):
        assert_near(backend, dsf.scan(system, v, backend), y, EXACT)
    total = torch.zeros(2, 4, 9).double() if g0 is None else g0.transpose(1, 2)
    assert_near("row sums", expected.sum(-1), total, EXACT)


def test_all_gates_open_is_softmax():
    q, k, *_ = inputs()
    one = torch.ones(2, 9, 4, dtype=torch.float64)
    whole = zeros_softmax_recurrence(q, k, one, one, one)
    expected = dsf.materialise(softmax_attention_recurrence(q, k))
    assert_near("softmax", dsf.materialise(whole), expected, EXACT)


def test_masked_keys_do_not_count():
    q, k, g1, gh, g0 = inputs()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[:, [0, 4]] = False
    masked = dsf.materialise(zeros_softmax_recurrence(q, k, g1, gh, g0, key_mask=real))
    kept = [1, 2, 3, 5, 6, 7, 8]
    short = zeros_softmax_recurrence(*(x[:, kept] for x in (q, k, g1, gh, g0)))
    assert_near("kept", masked[:, :, kept][..., kept], dsf.materialise(short), EXACT)
    assert not bool(masked[..., [0, 4]].any())
    assert not bool(masked[:, :, 0].any())


@pytest.mark.parametrize(
    "options",
    [{"token_gates": True, "zero_order": True}, {"n_group": 2, "zero_order": True, "bias": True},
     {"causal": False, "token_gates": True}],
)  # fmt: skip
def test_options_keep_the_contract(options):
    torch.manual_seed(0)
    check_all(shaken(ZerosSoftmax(8, 4, **options), 0.3), fresh_input(8))


def test_what_does_not_fit_is_refused():
    q, k, g1, gh, _ = inputs()
    with pytest.raises(DsfShapeError, match="divides head=4, got 3"):
        zeros_softmax_recurrence(q, k.repeat(1, 1, 2, 1)[:, :, :3], g1, gh)
    with pytest.raises(DsfUnsupportedError, match="expected a causal layer"):
        ZerosSoftmax(8, causal=False).step(torch.zeros(1, 8))
