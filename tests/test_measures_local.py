"""Local mass in windows of lines and images, and what masking near keys does to outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from model_laws import normal

import dsf
import dsf.measures.masking as masking
from dsf.errors import DsfShapeError, DsfValueError
from dsf.measures.local_masses import local_mass, local_share
from dsf.measures.masking import masking_effect
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.models.linear_attention import linear_attention_recurrence
from dsf.transitions import Identity

EXACT = 1e-12
ROUNDING = 1e-15
LENGTH, WIDTH, CHANNEL = 13, 4, 3


def qkv(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (normal(2, length, 2, WIDTH), normal(2, length, 2, WIDTH, seed=1),
            normal(2, length, 2, CHANNEL, seed=2))  # fmt: skip


def softmax(causal: bool, length: int = LENGTH, **options: object) -> dsf.wrappers.System:
    q, k, _ = qkv(length)
    rows = dsf.SoftmaxRows(q, k, causal=causal, **options)  # type: ignore[arg-type]
    r = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), rows, system="softmax")
    return r if causal else dsf.Bidirectional.from_rows(r)


def systems(causal: bool) -> dict[str, dsf.wrappers.System]:
    q, k, _ = qkv()
    return {
        "softmax": softmax(causal),
        "linear": linear_attention_recurrence(q, k, causal=causal),
        "inline": inline_attention_recurrence(q, k, causal=causal, scale="published"),
        "undivided": linear_attention_recurrence(q, k, causal=causal, normalise=False),
    }


# -- local mass --------------------------------------------------------------------------------


def test_uniform_attention_over_an_image_has_its_share() -> None:
    """197 tokens, 3 x 3 window: 9/197 inside the image, 6 and 4 keys at sides and corners."""
    uniform = torch.full((1, 1, 197, 197), 1 / 197, dtype=torch.float64)
    found = local_mass(uniform, 3, grid=(14, 14), class_token=True)[0, 0]
    interior = found.where(found.window_keys == 9, drop=True)
    assert interior.size == 12 * 12
    assert float(abs(interior - 9 / 197).max()) <= ROUNDING
    assert np.isnan(found[0])
    assert sorted(set(found.window_keys.values)) == [0, 4, 6, 9]
    assert int((found.window_keys == 4).sum()) == 4
    assert float(abs(found[1:] - found.chance[1:]).max()) <= ROUNDING


@pytest.mark.parametrize("grid", [None, (4, 3)])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_what_they_say(grid, class_token: bool, causal: bool) -> None:
    length = 12 + class_token
    weights = normal(2, 2, length, length)
    weights = weights.tril() if causal else weights
    window = 3
    found, portion = (f(weights, window, grid=grid, class_token=class_token)
                      for f in (local_mass, local_share))  # fmt: skip
    for t in range(length):
        near = []
        for j in range(t + 1 if causal else length):
            a, b = t - class_token, j - class_token
            if min(a, b) < 0:
                continue
            if grid:
                hit = abs(a // 3 - b // 3) <= 1 and abs(a % 3 - b % 3) <= 1
            else:
                hit = 0 <= a - b < window if causal else abs(a - b) <= 1
            near += [j] if hit else []
        if class_token and t == 0:
            assert np.isnan(found[..., 0]).all()
            continue
        row = weights[..., t, :]
        np.testing.assert_allclose(found[..., t], row[..., near].sum(-1), atol=EXACT)
        mass = row[..., near].abs().sum(-1) / row.abs().sum(-1)
        np.testing.assert_allclose(portion[..., t], mass, atol=EXACT)
        assert float(found.window_keys[t]) == len(near)
        assert float(found.chance[t]) == pytest.approx(len(near) / (t + 1 if causal else length))


@pytest.mark.parametrize("causal", [False, True])
def test_a_signed_sum_is_no_share(causal: bool) -> None:
    for name, system in systems(causal).items():
        mass, portion = local_mass(system), local_share(system)
        assert ((portion >= 0) & (portion <= 1 + ROUNDING)).all(), name
        same = np.allclose(mass, portion, atol=EXACT)
        assert same == (name in ("softmax", "linear")), name


def test_the_chance_level_counts_what_a_row_may_see() -> None:
    chance = local_mass(softmax(True), 5).chance.values
    t = np.arange(1, LENGTH + 1)
    np.testing.assert_array_equal(chance, np.minimum(1, 5 / t))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 8:] = False
    padded = local_mass(softmax(False, key_mask=mask), 3)
    assert padded.chance.dims == ("batch", "head", "query")
    assert float(padded.chance[1, 0, 4]) == 3 / 8
    assert float(padded.window_keys[1, 0, 7]) == 2


def test_tiles_do_not_show() -> None:
    for system in (systems(True)["linear"], softmax(False)):
        for measure in (local_mass, local_share):
            whole = measure(system, 5)
            for block in (1, 4, 50):
                np.testing.assert_allclose(measure(system, 5, block=block), whole, atol=EXACT)


def test_a_long_row_is_measured_along_the_diagonal_alone() -> None:
    """8192 tokens; every row's weights are known: 1/t of uniform attention as a recurrence."""
    length, window = 8192, 7
    t = torch.arange(1, length + 1, dtype=torch.float64)
    r = dsf.Recurrence(Identity(1), torch.ones(1, length, 1, 1, 1).double(),
                       (1 / t)[None, :, None, None, None])  # fmt: skip
    found = local_mass(r, window)
    assert found.attrs["method"] == "float64 sums by tiles along the diagonal"
    expected = np.minimum(1, window / t.numpy())
    np.testing.assert_allclose(found[0, 0], expected, rtol=EXACT)
    np.testing.assert_array_equal(found.chance, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_backwards_in_time(strict: bool) -> None:
    r = systems(True)["linear"]
    back = dsf.anticausal(r.flip_time(), strict=strict)  # type: ignore[union-attr]
    found, forward = local_mass(back, 3), local_mass(r, 3)
    if not strict:
        np.testing.assert_allclose(found[..., ::-1], forward, atol=EXACT)
        np.testing.assert_array_equal(found.chance[::-1], forward.chance)
    weights = dsf.materialise(back)
    np.testing.assert_allclose(found[..., 4], weights[..., 4, 4:7].sum(-1), atol=EXACT)
    keys = LENGTH - 4 - strict
    assert float(found.chance[4]) == (3 - strict) / keys


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_inputs(length: int) -> None:
    weights = torch.ones(1, 1, length, length, dtype=torch.float64).tril()
    assert local_mass(weights, 3).shape == (1, 1, length)
    effect = masking_effect(weights, torch.ones(1, length, 1, 2).double(), 1)
    assert effect.local.shape == (1, 1, length)
    assert np.isnan(effect.local[..., :1]).all()


def test_windows_are_refused() -> None:
    with pytest.raises(DsfValueError, match=r"local_mass: window: expected at least 1, odd"):
        local_mass(softmax(False), 2)
    with pytest.raises(DsfValueError, match=r"grid: expected rows x columns = 12 patches"):
        local_mass(softmax(False), 3, grid=(3, 3), class_token=True)
    assert local_mass(softmax(True), 2).notnull().all()


# -- masking -----------------------------------------------------------------------------------


def kept_output(system: dsf.wrappers.System, name: str, causal: bool, t: int, masked: list[int],
                batch: int = 1, head: int = 1) -> torch.Tensor:  # fmt: skip
    """The mixer itself over the keys that are left, from queries and keys."""
    q, k, v = (x[batch, :, head] for x in qkv())
    left = [j for j in range(t + 1 if causal else LENGTH) if j not in masked]
    phi = dsf.feature_maps.elu_plus_one
    if name == "softmax":
        w = torch.softmax(k[left] @ q[t] / WIDTH**0.5, 0)
    elif name == "inline":
        w = (k[left] - k[left].mean(0)) @ q[t] + 1 / len(left)
    else:
        w = phi(k[left]) @ phi(q[t])
        w = w / w.sum() if name == "linear" else w
    return w @ v[left]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["softmax", "linear", "inline", "undivided"])
def test_masking_is_the_mixer_without_these_keys(name: str, causal: bool) -> None:
    system = systems(causal)[name]
    _, _, v = qkv()
    window = 2 if causal else 3
    found = masking_effect(system, v, window)
    for t in range(1, LENGTH):
        near = list(range(max(t - 2, 0), t)) if causal else [
            j for j in range(LENGTH) if abs(j - t) <= 1]  # fmt: skip
        y, less = (kept_output(system, name, causal, t, m) for m in ([], near))
        expected = float((y - less).norm() / y.norm())
        enough = not causal or t - len(near) >= len(near)
        value = float(found.local[1, 1, t])
        assert (value == pytest.approx(expected, rel=1e-9)) if enough else math.isnan(value)
        assert float(found.masked[1, 1, t]) == len(near)


def test_random_keys_lie_outside_the_window() -> None:
    """Where the window holds all weight, random masking changes nothing, local masking all."""
    n = 12
    near = torch.eye(n, dtype=torch.float64) * 0.5
    near = near + torch.diag(torch.full((n - 1,), 0.25).double(), 1)
    near = near + torch.diag(torch.full((n - 1,), 0.25).double(), -1)
    v = normal(1, n, 1, 2)
    found = masking_effect(near[None, None], v, 3, rule="none", draws=6)
    assert float(found.random.max()) == 0
    assert float(abs(found.local - 1).max()) <= EXACT
    assert found.local_pooled.item() == pytest.approx(1)
    far = torch.ones(1, 1, n, n, dtype=torch.float64) - (near > 0).double()
    away = masking_effect(far, v, 3, rule="none", draws=6)
    assert float(away.local.max()) == 0
    assert float(away.random.min()) > 0


def test_random_masks_have_the_right_number_and_depend_on_the_seed() -> None:
    """All weights and values 1, nothing divided: the change counts the masked keys."""
    n = 20
    ones = torch.ones(1, 1, n, n, dtype=torch.float64).tril()
    v = torch.ones(1, n, 1, 1, dtype=torch.float64)
    found = masking_effect(ones, v, 3, rule="none")
    t = np.arange(1, n + 1)
    expected = np.minimum(t - 1, 3) / t
    np.testing.assert_allclose(found.random[0, 0, 6:], expected[6:], atol=EXACT)
    np.testing.assert_allclose(found.local[0, 0, 6:], expected[6:], atol=EXACT)
    assert np.isnan(found.random[0, 0, :2]).all()
    system, (_, _, u) = softmax(True), qkv()
    one, two, three = (masking_effect(system, u, 2, seed=s).random for s in (0, 0, 1))
    assert one.equals(two)
    assert not np.allclose(one, three, equal_nan=True)


def test_masking_in_an_image_with_a_class_token() -> None:
    system, (_, _, v) = softmax(False), qkv()
    found = masking_effect(system, v, 3, grid=(3, 4), class_token=True)
    assert found.masked[0, 0].values.tolist() == [0, 4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4]
    assert np.isnan(found.local[..., 0]).all()
    # 9 of 13 masked: too few others left
    assert np.isnan(found.random[0, 0, 6])
    assert found.local[0, 0, 1] > 0
    assert found.attrs == {} or found.local.attrs["grid"] == "[3, 4]"


def test_the_sink_keeps_its_share() -> None:
    q, k, v = qkv()
    sink = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = masking_effect(softmax(True, sink=sink), v, 2)
    t, head = 9, 1
    left = [j for j in range(t + 1) if j not in (t - 1, t - 2)]
    e, all_keys = (torch.exp(k[0, rows, head] @ q[0, t, head] / WIDTH**0.5)
                   for rows in (left, range(t + 1)))  # fmt: skip
    y = all_keys @ v[0, : t + 1, head] / (all_keys.sum() + math.exp(1.0))
    less = e @ v[0, left, head] / (e.sum() + math.exp(1.0))
    assert float(found.local[0, head, t]) == pytest.approx(float((y - less).norm() / y.norm()))


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_do_not_show_in_masking(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, v = qkv()
    whole = {name: masking_effect(s, v, 3) for name, s in systems(causal).items()}
    monkeypatch.setattr(dsf.measures._maps, "TILE_BYTES", 8 * 4 * LENGTH * 3)
    monkeypatch.setattr(masking, "TILE_BYTES", 8 * LENGTH * 2)
    for name, s in systems(causal).items():
        found = masking_effect(s, v, 3)
        for part in ("local", "random", "masked", "random_pooled"):
            np.testing.assert_allclose(found[part], whole[name][part], rtol=1e-9, err_msg=name)


def test_padding_is_never_drawn() -> None:
    """Sample 1 sees 8 keys; what stands in the others does not count."""
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 8:] = False
    _, _, v = qkv()
    found = masking_effect(softmax(False, key_mask=mask), v, 3)
    other = v.clone()
    other[1, 8:] = 1e6
    again = masking_effect(softmax(False, key_mask=mask), other, 3)
    np.testing.assert_allclose(found.random, again.random, rtol=1e-9)
    assert found.masked[:, 0, 8].values.tolist() == [3, 1]
    assert (found.random[1, :, 0] > 0).all()


def test_masking_refuses_what_does_not_fit() -> None:
    _, _, v = qkv()
    with pytest.raises(DsfShapeError, match=r"values: expected axes \(batch=2, time=13, head=2"):
        masking_effect(softmax(True), v[:, 1:])
    with pytest.raises(DsfValueError, match="draws: expected at least 1"):
        masking_effect(softmax(True), v, draws=0)
    gated = dsf.Gated(systems(True)["linear"], normal(2, LENGTH, 2, CHANNEL))  # type: ignore[arg-type]
    with pytest.raises(DsfShapeError, match=r"take system\.system of a gated one"):
        masking_effect(gated, v)
