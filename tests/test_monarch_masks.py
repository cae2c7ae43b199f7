"""MonarchAttention: masks, shifts, the causal variant and the layer."""

import pytest
import torch
from model_laws import assert_near, check_all, fresh_input, normal, shaken

import dsf
from dsf.errors import DsfShapeError, DsfUnsupportedError, DsfValueError
from dsf.models._monarch_core import (
    Factors,
    MonarchRows,
)
from dsf.models.monarch_attention import (
    MonarchAttention,
    monarch_attention_recurrence,
    online_minus_entropy,
)
from dsf.wrappers import core

EXACT = 1e-12
SHIFTED = 1e-10


def near(got, expected, tolerance=EXACT):
    assert_near("difference", got, expected, tolerance)


def qkv(length=32, width=5, head=2, batch=2):
    return tuple(normal(batch, length, head, width, seed=i) for i in range(3))


# -- masks, shifts, edges ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_empty_blocks_take_no_mass(steps):
    q, k, v = qkv(32)
    for count in (12, 3, 1):
        real = (torch.arange(32) < count).expand(2, 32)
        system = monarch_attention_recurrence(q, k, block=8, steps=steps, key_mask=real)
        M = dsf.materialise(system)
        near(M.sum(-1), torch.ones_like(M[..., 0]))
        assert not bool(M[..., count:].any())
    none = torch.zeros(2, 32, dtype=torch.bool)
    system = monarch_attention_recurrence(q, k, block=8, steps=steps, key_mask=none)
    assert not bool(dsf.scan(system, v).any())
    causal = monarch_attention_recurrence(q, k, block=8, key_mask=none, causal=True)
    assert not bool(dsf.scan(causal, v).any())


@pytest.mark.parametrize("shift", [200.0, -200.0, -218.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_common_shift_of_all_logits_changes_nothing(shift, causal):
    q, k, _ = qkv(18)
    root = 6**0.5  # the width after one coordinate more
    q, k = q * (6 / 5) ** 0.25, k * (6 / 5) ** 0.25
    one = torch.ones_like(q[..., :1])
    maps = [dsf.materialise(monarch_attention_recurrence(
        torch.cat([q, s * root * one], -1), torch.cat([k, one], -1), block=4,
        steps=1 if causal else 2, causal=causal)) for s in (0.0, shift)]  # fmt: skip
    near(maps[1], maps[0], SHIFTED)
    near(maps[1].sum(-1), torch.ones_like(maps[1][..., 0]))


def test_peaked_logits_stay_finite():
    q, k, v = (x.float() for x in qkv(20))
    for causal in (False, True):
        system = monarch_attention_recurrence(1e3 * q, k, block=4, causal=causal)
        y = dsf.scan(system, v)
        assert bool(torch.isfinite(y).all())
        near(dsf.materialise(system).sum(-1), torch.ones(2, 2, 20), 1e-5)


def test_strided_inputs_give_the_same_bits():
    q, k, v = qkv(20)
    y = dsf.scan(monarch_attention_recurrence(q, k, block=4), v)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(dsf.scan(monarch_attention_recurrence(*strided, block=4), v), y)


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
def test_online_entropy(chunk):
    logits = 5 * normal(4, 40)
    r = torch.softmax(logits, -1)
    near(online_minus_entropy(logits, chunk), torch.special.xlogy(r, r).sum(-1))


# -- causal ------------------------------------------------------------------------------------


def test_causal_is_the_renormalised_lower_triangle():
    q, k, v = qkv(22)
    system = monarch_attention_recurrence(q, k, block=4, causal=True)
    M = dsf.materialise(monarch_attention_recurrence(q, k, block=4)).tril()
    near(dsf.materialise(system), M / M.sum(-1, keepdim=True))
    changed, later = k.clone(), 13
    changed[:, later] += 1
    other = monarch_attention_recurrence(q, changed, block=4, causal=True)
    assert torch.equal(dsf.scan(other, v)[:, :later], dsf.scan(system, v)[:, :later])
    near(dsf.materialise(core(system).time_slice(5, 9)), dsf.materialise(system)[..., 5:9, 5:9])


def test_two_masked_steps_leak():
    """Why causal is one step: the lower triangle of T = 2 changes before the changed token."""
    q, k, _ = qkv(22)
    changed = [x.clone() for x in (q, k)]
    for x in changed:
        x[:, 13] += 1
    maps = [dsf.materialise(monarch_attention_recurrence(*pair, block=4, steps=2)).tril()
            for pair in ((q, k), changed)]  # fmt: skip
    rows = [m / m.sum(-1, keepdim=True) for m in maps]
    assert float((rows[0] - rows[1])[..., :13, :].abs().max()) > 1e-3


# -- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"block": 3, "steps": 2}, {"block": 4, "padding": "before"}, {"steps": 3},
    {"block": 1, "causal": True}, {"block": 16, "causal": True}, {"block": 3, "causal": True},
], ids=str)  # fmt: skip
def test_contract_with_options(options):
    torch.manual_seed(0)
    check_all(shaken(MonarchAttention(8, 4, **options)), fresh_input(8))


@torch.no_grad()
def test_masked_tokens_are_not_read():
    torch.manual_seed(0)
    layer = shaken(MonarchAttention(8, 4, block=4, steps=2))
    x, real = fresh_input(8), torch.arange(11) < torch.tensor([[11], [6]])
    changed = x.masked_fill(~real[..., None], 7.0)
    outputs = [layer(z, key_mask=real) for z in (x, changed)]
    near(outputs[1][real], outputs[0][real])


def test_refusals():
    q, k, _ = qkv(8)
    with pytest.raises(DsfValueError, match="1 if causal"):
        monarch_attention_recurrence(q, k, steps=2, causal=True)
    with pytest.raises(DsfValueError, match="padding: expected one of"):
        monarch_attention_recurrence(q, k, padding="middle")
    with pytest.raises(DsfValueError, match="block: expected at least 1"):
        monarch_attention_recurrence(q, k, block=0)
    with pytest.raises(DsfValueError, match="fixed block"):
        MonarchAttention(8, causal=True)
    with pytest.raises(DsfUnsupportedError, match="depends on all tokens"):
        MonarchAttention(8).step(torch.zeros(1, 8))
    rows = core(monarch_attention_recurrence(q, k, block=4)).C
    wrong = MonarchRows(rows.left, rows.right[:, :, :1], n_row=8, n_column=8)
    assert "expected (position, block, block)" in wrong.shape_faults()[0]
    assert isinstance(Factors(rows.left, rows.right).left, torch.Tensor)


def test_a_float_mask_is_refused(unchecked):
    q, k, _ = qkv(8)
    with pytest.raises(DsfShapeError, match="expected boolean"):
        monarch_attention_recurrence(q, k, key_mask=torch.ones(2, 8))
