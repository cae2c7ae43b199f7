"""Injectivity: verdicts of constructed systems, colliding queries, decoders, Jacobians."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import dsf
from dsf import measures
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.models.inline_attention import inline_attention_recurrence
from dsf.transitions import Diagonal, Householder, Identity

KEYS, WIDTH = 14, 4
COLLIDES = 1e-12
NO, UNDECIDED, YES = -1, 0, 1


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def attention(
    query: torch.Tensor, key: torch.Tensor, full: bool = False, **options: object
) -> dsf.Recurrence | dsf.Bidirectional:
    n = key.shape[1]
    rows = dsf.SoftmaxRows(query, key, causal=not full, **options)  # type: ignore[arg-type]
    r = dsf.Recurrence(Identity(n), dsf.OneHot(n, n), rows, system="softmax")
    return dsf.Bidirectional.from_rows(r) if full else r


def on_hyperplane(key: torch.Tensor) -> torch.Tensor:
    w = random(WIDTH, seed=9)
    return key - (key @ w - 1)[..., None] * w / (w @ w)


def verdicts(system: object, positions: object = None, **options: object) -> np.ndarray:
    return measures.injectivity(system, positions, **options).verdict.values


# -- softmax -----------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_generic_keys_are_injective_and_keys_on_a_hyperplane_are_not(full: bool) -> None:
    q, k = random(2, KEYS, 4, WIDTH), random(2, KEYS, 2, WIDTH, seed=1)
    assert (verdicts(attention(q, k, full)) == YES).all()
    found = measures.injectivity(attention(q, on_hyperplane(k), full))
    assert (found.verdict == NO).all()
    assert float(found.difference.max()) <= COLLIDES
    pair = found.query_pair.values
    assert (np.linalg.norm(pair[..., 0, :] - pair[..., 1, :], axis=-1) > 0.1).all()
    rounded = attention(q.float(), on_hyperplane(k).float(), full)
    assert (verdicts(rounded) == NO).all()


def test_causal_positions_up_to_the_width_are_never_injective() -> None:
    q, k = random(1, KEYS, 2, WIDTH), random(1, KEYS, 2, WIDTH, seed=1)
    found = measures.injectivity(attention(q, k), "all")
    assert found.verdict.values[0, 0].tolist() == [NO] * WIDTH + [YES] * (KEYS - WIDTH)
    assert found.margin.values[0, 0, :WIDTH].tolist() == [0] * WIDTH
    assert float(found.difference.sel(query=slice(0, WIDTH - 1)).max()) <= COLLIDES
    assert "at least 5 are necessary" in str(found.reason.values[0, 0, 0])
    assert (verdicts(attention(q, k, full=True), "all") == YES).all()


def test_the_pair_collides_in_the_layer_itself() -> None:
    """Not only in our weights: put the second query into the attention and nothing changes."""
    q, k = random(1, KEYS, 2, WIDTH), on_hyperplane(random(1, KEYS, 2, WIDTH, seed=1))
    found = measures.collision(attention(q, k), head=1)
    changed = q.clone()
    changed[0, -1, 1] = torch.from_numpy(found.query_pair.values[1])
    values = random(1, KEYS, 2, 3, seed=2)
    one, two = (dsf.scan(attention(x, k), values) for x in (q, changed))
    assert float((one - two).abs().max()) <= COLLIDES
    assert float((q - changed).norm()) == pytest.approx(found.attrs["distance"])
    assert found.attrs["difference"] <= COLLIDES


def test_grouped_heads_use_their_own_keys() -> None:
    q, k = random(1, KEYS, 4, WIDTH), random(1, KEYS, 2, WIDTH, seed=1)
    k[:, :, 1:] = on_hyperplane(k[:, :, 1:])
    assert verdicts(attention(q, k))[0, :, 0].tolist() == [YES, YES, NO, NO]


def test_masked_and_distant_keys_do_not_help() -> None:
    q, k = random(2, KEYS, 1, WIDTH), random(2, KEYS, 1, WIDTH, seed=1)
    mask = torch.ones(2, KEYS, dtype=torch.bool)
    mask[1, WIDTH:] = False
    assert verdicts(attention(q, k, True, key_mask=mask))[:, 0, 0].tolist() == [YES, NO]
    assert verdicts(attention(q, k, window=WIDTH))[0, 0, 0] == NO
    assert verdicts(attention(q, k, window=WIDTH + 1))[0, 0, 0] == YES
    bias = torch.zeros(1, 1, KEYS, KEYS, dtype=torch.float64)
    bias[..., WIDTH:] = -torch.inf
    assert verdicts(attention(q, k, bias=bias))[0, 0, 0] == NO


def test_a_sink_needs_only_the_rank_of_the_keys() -> None:
    q, k = random(1, KEYS, 1, WIDTH), on_hyperplane(random(1, KEYS, 1, WIDTH, seed=1))
    sink = torch.zeros(1, dtype=torch.float64)
    assert verdicts(attention(q, k))[0, 0, 0] == NO
    assert verdicts(attention(q, k, sink=sink))[0, 0, 0] == YES
    flat = k.clone()
    flat[..., 0] = 0
    assert verdicts(attention(q, flat, sink=sink))[0, 0, 0] == NO
    assert verdicts(attention(q, k, softcap=5.0))[0, 0, 0] == UNDECIDED


def test_the_decoder_recovers_the_query() -> None:
    """q = (P K)^+ P log w, the constructive form of the verdict yes."""
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    w = dsf.materialise(attention(q, k))[0, 0, -1]
    centred = k[0, :, 0] - k[0, :, 0].mean(0)
    logs = torch.log(w) - torch.log(w).mean()
    decoded = torch.linalg.pinv(centred) @ logs * WIDTH**0.5
    assert float((decoded - q[0, -1, 0]).abs().max()) <= COLLIDES


# -- finite states -----------------------------------------------------------------------------


def linear(phi: object, normalised: bool, width: int = WIDTH) -> dsf.Recurrence:
    q, k = (phi(random(1, KEYS, 2, width, seed=s)) for s in (0, 1))  # type: ignore[operator]
    eta = (q * k.cumsum(1)).sum(-1, keepdim=True) if normalised else torch.ones_like(q[..., :1])
    return dsf.Recurrence(
        Identity(k.shape[-1]), k[..., None], (q / eta)[..., None, :], system="linear"
    )


def elu1(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1


def one_and_x(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x], -1)


def test_linear_attention_without_normaliser_needs_as_many_keys_as_features() -> None:
    found = verdicts(linear(elu1, False), "all")[0, 0].tolist()
    assert found == [NO] * (WIDTH - 1) + [YES] * (KEYS - WIDTH + 1)


def test_divided_rows_confuse_a_ray() -> None:
    r = linear(elu1, True)
    found = measures.injectivity(r, "all")
    assert (found.verdict == NO).all()
    assert float(found.difference.max()) <= COLLIDES
    assert "c and 2 c" in str(found.reason.values[0, 0, -1])
    pair = measures.collision(r).query_pair.values
    assert np.allclose(pair[1], 2 * pair[0])
    assert verdicts(r, normalised=False)[0, 0, 0] == YES
    few = measures.injectivity(r, query_width=WIDTH)
    assert (few.verdict == NO).all()
    assert "no continuous feature map" in str(few.reason.values[0, 0, 0])
    assert (verdicts(r, query_width=WIDTH - 1) == UNDECIDED).all()


def test_a_state_that_counts_is_no_division() -> None:
    """[1; x] features: rows sum to one, yet the query can be told (D = d + 1)."""
    r = linear(one_and_x, True)
    assert np.allclose(measures.row_sum(r), 1)
    assert (verdicts(r) == YES).all()
    centred = inline()
    assert np.allclose(measures.row_sum(centred), 1)
    assert (verdicts(centred) == YES).all()


def inline() -> dsf.Recurrence:
    """Causal InLine attention in prefix sums: A = I, B = [k; 1], C = [q, (1 - q.z)/t]."""
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    t = torch.arange(1, KEYS + 1, dtype=torch.float64)[None, :, None, None]
    last = (1 - (q * k.cumsum(1)).sum(-1, keepdim=True)) / t
    B, C = torch.cat([k, torch.ones_like(last)], -1), torch.cat([q, last], -1)
    return dsf.Recurrence(Identity(WIDTH + 1), B[..., None], C[..., None, :])


def test_a_projected_state_is_found_short() -> None:
    """A delta rule step with write strength 1 erases a direction; one key puts one back."""
    k = torch.nn.functional.normalize(random(1, 3, 1, 3), dim=-1)
    A = Householder(torch.ones(1, 3, 1, dtype=torch.float64), k)
    u = random(1, 3, 1, 3, 1, seed=2)
    r = dsf.Recurrence(A, u, random(1, 3, 1, 1, 3, seed=3))
    assert (verdicts(r, normalised=False) == YES).all()
    same = r.replace(B=u[:, :1].expand(-1, 3, -1, -1, -1), A=Identity(3))
    found = measures.injectivity(same, normalised=False)
    assert (found.verdict == NO).all()
    assert float(found.difference.max()) <= COLLIDES
    assert measures.collision(same, normalised=False).attrs["difference"] <= COLLIDES


def test_both_directions_see_all_keys() -> None:
    r = linear(elu1, False)
    both = dsf.Bidirectional(r, dsf.anticausal(r, strict=True))
    assert (verdicts(both, "all") == YES).all()
    back = verdicts(dsf.anticausal(r), "all")[0, 0].tolist()
    assert back == verdicts(r, "all")[0, 0].tolist()[::-1]
    weights = dsf.materialise(both)
    reach, c = measures.confusions.reach_at(both, 5)
    assert torch.allclose((c[..., None, :] @ reach)[..., 0, :], weights[:, :, 5], atol=1e-12)


def test_conjugate_pairs_count_real_states() -> None:
    A = Diagonal(-0.1 * random(1, 1, 1, 2).abs(), phase=1 + random(1, 1, 1, 2, seed=1))
    B, C = (random(1, 9, 1, *s, seed=2, dtype=torch.complex128) for s in ((2, 1), (1, 2)))
    r = dsf.Recurrence(A, B, C, real_output=True)
    found = measures.injectivity(r, "all", normalised=False)
    assert found.verdict.values[0, 0].tolist() == [NO] * 3 + [YES] * 6
    assert float(found.difference.max()) <= COLLIDES
    assert found.sizes["feature"] == 4


def test_gates_do_not_matter_and_given_rows_are_undecided() -> None:
    r = linear(elu1, False)
    gate = random(1, KEYS, 2, 3)
    assert np.array_equal(verdicts(dsf.Gated(r, gate), "all"), verdicts(r, "all"))
    rows = dsf.ExplicitRows(dsf.materialise(r))
    given = dsf.Recurrence(Identity(KEYS), dsf.OneHot(KEYS, KEYS), rows)
    assert (verdicts(given) == UNDECIDED).all()
    with pytest.raises(DsfUnsupportedError, match="whose rows are given"):
        measures.local_modulus(given)


def test_collisions_are_refused_where_there_are_none() -> None:
    with pytest.raises(DsfValueError, match=r"got none at batch 0, head 1, position 13"):
        measures.collision(linear(elu1, False), head=1)
    k = on_hyperplane(random(1, KEYS, 1, WIDTH, seed=1)).float()
    with pytest.raises(DsfValueError, match="the closest pair's weights differ by"):
        measures.collision(attention(random(1, KEYS, 1, WIDTH).float(), k))
    with pytest.raises(DsfValueError, match=r"positions: expected within -14\.\.13"):
        measures.injectivity(linear(elu1, False), [14])
    with pytest.raises((DsfTypeError, TypeError)):
        measures.injectivity(torch.zeros(3, 3))


# -- rays --------------------------------------------------------------------------------------


def test_relu_confuses_a_query_and_four_times_it_exactly() -> None:
    found = measures.ray_collision(
        torch.relu, random(WIDTH), random(KEYS, WIDTH, seed=1), factor=4.0
    )
    assert found.attrs["difference"] == 0
    assert np.array_equal(found.query_pair[1], 4 * found.query_pair[0])


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_elu_plus_one_confuses_a_query_and_its_shifted_multiple(factor: float) -> None:
    q = random(WIDTH).abs()
    found = measures.ray_collision(elu1, q, random(KEYS, WIDTH, seed=1), factor=factor)
    assert found.attrs["difference"] <= 1e-14
    expected = factor * (1 + q) - 1
    assert np.allclose(found.query_pair[1], expected, atol=1e-12)


def test_more_features_than_query_entries_leave_no_ray() -> None:
    keys = random(KEYS, WIDTH, seed=1) / 20  # small: denominators stay positive
    with pytest.raises(DsfValueError, match="With more features than query entries"):
        measures.ray_collision(one_and_x, random(WIDTH), keys)
    with pytest.raises(DsfValueError, match="factor: expected positive and not 1"):
        measures.ray_collision(elu1, random(WIDTH), keys, factor=1.0)


# -- local modulus -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sink": torch.zeros(1).double()}, {"softcap": 2.0}])
def test_the_softmax_jacobian_matches_differences(options: dict) -> None:
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    found = float(measures.local_modulus(attention(q, k, **options))[0, 0, 0])

    def last_row(x: torch.Tensor) -> torch.Tensor:
        changed = torch.cat([q[:, :-1], x[None, None, None]], 1)
        return dsf.materialise(attention(changed, k, **options))[0, 0, -1]

    step = 1e-6
    columns = [(last_row(q[0, -1, 0] + step * e) - last_row(q[0, -1, 0] - step * e)) / (2 * step)
               for e in torch.eye(WIDTH, dtype=torch.float64)]  # fmt: skip
    expected = float(torch.linalg.svdvals(torch.stack(columns, 1))[-1])
    assert found == pytest.approx(expected, abs=1e-8)
    assert found > 1e-4


def test_the_modulus_vanishes_where_queries_are_confused() -> None:
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    assert measures.local_modulus(attention(q, on_hyperplane(k))).item() <= 1e-15
    moduli = measures.local_modulus(attention(q, k), "all")[0, 0].values
    assert (moduli[:WIDTH] <= 1e-15).all()
    assert (moduli[WIDTH:] > 1e-6).all()
    saturated = measures.local_modulus(attention(100 * q, k))
    assert saturated.item() < 1e-3 * moduli[-1]
    r = linear(elu1, True)
    assert float(measures.local_modulus(r).max()) <= 1e-15
    assert float(measures.local_modulus(r, normalised=False).max()) > 0.1
    plain = linear(elu1, False)
    sigma = torch.linalg.svdvals(plain.B[0, :, 0, :, 0])[-1]
    assert float(measures.local_modulus(plain)[0, 0, 0]) == pytest.approx(float(sigma))


def test_a_row_without_weights_does_not_hide_the_division() -> None:
    """ReLU features of one query all vanish: its row is zero, the others were divided."""
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    q[:, -1] = -1
    phi_q, phi_k = q.relu(), k.relu()
    eta = (phi_q * phi_k.sum(1, keepdim=True)).sum(-1, keepdim=True)
    c = phi_q / eta.masked_fill(eta == 0, 1.0)
    r = dsf.Recurrence(Identity(WIDTH), phi_k[..., None], c[..., None, :], system="linear")
    both = dsf.Bidirectional(r, dsf.anticausal(r, strict=True))
    assert (measures.row_sum(both).values[..., -1] == 0).all()
    found = measures.injectivity(both, "all")
    assert (found.verdict == NO).all()
    assert float(found.difference.max()) <= COLLIDES
    moduli = measures.local_modulus(both, "all")[0, 0]
    assert np.isnan(moduli[-1])
    assert float(moduli[:-1].max()) <= 1e-14


def test_rows_cut_without_being_divided_anew() -> None:
    """A causal system over rows whose softmax runs over all keys: the sum gives one bit more."""
    q, k = random(1, KEYS, 1, WIDTH), random(1, KEYS, 1, WIDTH, seed=1)
    rows = dsf.SoftmaxRows(q, k, causal=False)
    r = dsf.Recurrence(Identity(KEYS), dsf.OneHot(KEYS, KEYS), rows, system="cut")
    expected = [NO] * (WIDTH - 1) + [UNDECIDED] + [YES] * (KEYS - WIDTH)
    assert verdicts(r, "all")[0, 0].tolist() == expected
    back = dsf.anticausal(r)
    assert verdicts(back, "all")[0, 0].tolist()[::-1] == expected
    found = measures.local_modulus(back, "all")[0, 0].values
    assert (found[-WIDTH + 1 :] <= 1e-15).all()
    assert (found[:WIDTH] > 1e-6).all()
    two = dsf.Bidirectional(r, dsf.anticausal(attention(k, q), strict=True))
    assert (verdicts(two) == UNDECIDED).all()
    with pytest.raises(DsfUnsupportedError, match="two maps"):
        measures.local_modulus(two)


def test_few_keys_are_never_injective_in_the_query() -> None:
    """t <= d keys under a divided row, whatever the number of features; d > D states."""
    wide = linear(lambda x: torch.cat([x.exp(), (-x).exp()], -1), True)
    found = verdicts(wide, "all", normalised=True, query_width=WIDTH)[0, 0].tolist()
    assert found == [NO] * WIDTH + [UNDECIDED] * (KEYS - WIDTH)
    narrow = linear(lambda x: x[..., :2], False)
    assert (verdicts(narrow) == YES).all()
    found = measures.injectivity(narrow, query_width=WIDTH)
    assert (found.verdict == NO).all()
    assert "fewer than the query's 4 entries" in str(found.reason.values[0, 0, 0])


@pytest.mark.parametrize("full", [False, True])
def test_inline_is_judged_by_the_affine_rank_of_its_features(full: bool) -> None:
    """Both coordinates; t <= D keys never; keys on a hyperplane never; decoded rows collide."""
    q, k = random(1, KEYS, 2, WIDTH), random(1, KEYS, 2, WIDTH, seed=1)
    few = 0 if full else WIDTH
    for coordinates in ("sums",) if full else ("sums", "centred"):

        def system(keys: torch.Tensor, name: str = coordinates) -> dsf.wrappers.System:
            return inline_attention_recurrence(q, keys, causal=not full, coordinates=name)

        found = verdicts(system(k), "all")[0, 1].tolist()
        assert found == [NO] * few + [YES] * (KEYS - few)
        flat = measures.injectivity(system(on_hyperplane(k)), "all")
        assert (flat.verdict == NO).all()
        assert float(flat.difference.max()) <= COLLIDES
        # the colliding row is one that some query makes: its last entry follows from the others
        if not full and coordinates == "sums":
            pair = measures.collision(system(on_hyperplane(k)), head=1).query_pair.values
            z = on_hyperplane(k)[0, :, 1].sum(0).numpy()
            assert np.allclose(pair[:, -1], (1 - pair[:, :-1] @ z) / KEYS)


@pytest.mark.parametrize("name", ["sigmoid_attention", "forgetting_attention", "path_attention"])
def test_other_rows_get_their_modulus_by_automatic_differentiation(name: str) -> None:
    torch.manual_seed(0)
    layer = dsf.models.registered()[name].small(8).double()
    r, _ = layer.recurrence(random(1, 9, 8))
    found = measures.local_modulus(r, [8])
    holder = r.C.scores if hasattr(r.C, "scores") else r.C
    query = holder.query.detach()
    base, columns = query[0, 8, 1], []

    def row(x: torch.Tensor) -> torch.Tensor:
        changed = query.clone()
        changed[0, 8, 1] = x
        inner = dataclasses.replace(holder, query=changed)
        rows = inner if holder is r.C else dataclasses.replace(r.C, scores=inner)
        return rows.tile(slice(8, 9), slice(0, 9))[0, 1, 0].detach()

    step = 1e-6
    for e in torch.eye(len(base), dtype=torch.float64):
        columns.append((row(base + step * e) - row(base - step * e)) / (2 * step))
    sigma = torch.linalg.svdvals(torch.stack(columns, 1))
    assert float(found[0, 1, 0]) == pytest.approx(float(sigma[-1]), abs=1e-8)
    assert float(found.rounding[0, 1, 0]) == pytest.approx(float(sigma[0]) * 8.9e-16 * (
        len(base) / 4) ** 0.5, rel=0.02)  # fmt: skip
