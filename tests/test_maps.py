"""Maps: tiles, labels, gates, several inputs, and the refusal of what does not fit."""

from __future__ import annotations

import laws
import pytest
import torch
from structures import STRUCTURES, Draw, recurrence, values_for

import dsf
from dsf.errors import DsfMemoryError, DsfShapeError, DsfTypeError, DsfValueError
from dsf.maps import span
from dsf.memory import available_bytes
from dsf.transitions import Identity

names = pytest.mark.parametrize("name", STRUCTURES)
MAP_RTOL = 1e-12
"""Maps in float64 against products written out."""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.to(b.dtype), b, rtol=MAP_RTOL, atol=MAP_RTOL)


@names
def test_entries_are_the_products_of_the_equation(name):
    """M_tj = C_t A_t ... A_{j+1} B_j + [t = j] D_t, entry by entry."""
    r = recurrence(name, 1, length=5)
    A = r.dense_transition().expand(2, 5, 3, 4, 4).to(torch.complex128)
    B, C = r.B.to(A.dtype), r.C.to(A.dtype)
    weights = dsf.materialise(r)
    assert weights.shape == (2, 3, 5, 5)
    for t in range(5):
        for j in range(5):
            expected = torch.zeros(2, 3, dtype=A.dtype)
            if j <= t:
                carried = B[:, j]
                for i in range(j + 1, t + 1):
                    carried = A[:, i] @ carried
                expected = (C[:, t] @ carried)[..., 0, 0]
                expected = expected + (r.D[:, 0, :, 0, 0] if t == j else 0)
            assert close(weights[:, :, t, j].to(A.dtype), expected)


@names
def test_tiles_are_parts_of_the_map(name):
    r = recurrence(name, 2, length=9)
    laws.tiles_are_parts_of_the_map(r)
    laws.tiles_are_parts_of_the_map(dsf.anticausal(r))
    laws.tiles_are_parts_of_the_map(dsf.anticausal(r, strict=True))
    laws.tiles_are_parts_of_the_map(recurrence(name, 2, length=9, n_input=2, n_output=3))


def test_maps_longer_than_one_block_of_keys():
    r = recurrence("diagonal", 3, batch=1, head=1, length=300)
    weights = dsf.materialise(r)
    tile = dsf.materialise(r, slice(250, 300), slice(240, 280))
    assert close(tile, weights[:, :, 250:300, 240:280])
    u = values_for(r, 3, batch=1, head=1)
    assert close(laws.apply_map(weights, u), dsf.scan(r, u))
    assert torch.equal(weights, weights.tril())


def test_a_tile_never_touches_the_steps_outside():
    """Steps outside the tile may hold anything: only keys .. queries are run."""
    r = recurrence("diagonal", 4, length=12)
    B = r.B.clone()
    B[:, :4] = torch.nan
    B[:, 8:] = torch.nan
    broken = r.replace(B=B)
    tile = dsf.materialise(broken, slice(5, 8), slice(4, 7), allow_nonfinite=True)
    assert close(tile, dsf.materialise(r)[:, :, 5:8, 4:7])


def test_time_invariant_systems_take_their_length_from_the_call():
    r = recurrence("diagonal", 5, time_invariant=True)
    weights = dsf.materialise(r, length=6)
    assert weights.shape == (2, 3, 6, 6)
    for lag in range(6):  # a Toeplitz matrix
        diagonal = weights.diagonal(-lag, dim1=2, dim2=3)
        assert close(diagonal, diagonal[..., :1].expand_as(diagonal))
    assert dsf.materialise(r).shape == (2, 3, 1, 1)
    laws.tiles_are_parts_of_the_map(r, 6)
    laws.tiles_are_parts_of_the_map(dsf.anticausal(r, strict=True), 6)
    with pytest.raises(DsfValueError, match="length: expected 7, got 6"):
        dsf.materialise(recurrence("diagonal"), length=6)


def test_the_initial_state_has_no_part_in_the_map():
    r = recurrence("dense", 6, initial=4)
    assert torch.equal(dsf.materialise(r), dsf.materialise(r.replace(initial_state=None)))


def test_float32_systems_have_float32_maps_and_half_ones_too():
    r = recurrence("diagonal", 7)
    assert dsf.materialise(r.to(torch.float32)).dtype == torch.float32
    assert dsf.materialise(r.to(torch.bfloat16)).dtype == torch.float32
    assert dsf.materialise(r, backend="reference").dtype == torch.float64


@pytest.mark.parametrize("channel", [1, 5])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 3)])
def test_gates_multiply_rows(channel, sizes):
    r = recurrence("diagonal", 8, n_input=sizes[0], n_output=sizes[1])
    gate = Draw(9).normal(2, 7, 3, channel)
    system = dsf.Gated(r, gate)
    inner = dsf.materialise(r)
    weights = dsf.materialise(system)
    rest = (1,) * (inner.ndim - 3)
    if channel == 1:
        assert close(weights, gate[..., 0].transpose(1, 2).reshape(2, 3, 7, *rest) * inner)
    else:
        assert weights.shape == (2, 3, 5, *inner.shape[2:])
        wide = gate.permute(0, 2, 3, 1).reshape(2, 3, 5, 7, *rest)
        assert close(weights, wide * inner[:, :, None])
    u = values_for(r, 8)
    y = dsf.scan(system, u)
    plain = dsf.scan(r, u)
    assert close(y, (gate if plain.ndim == 4 else gate[:, :, :, None]) * plain)
    laws.tiles_are_parts_of_the_map(system)


# -- labels ------------------------------------------------------------------------------------


def test_attention_map_carries_tokens_and_labels():
    r = recurrence("diagonal", 10, length=4).replace(system="demo", gauge="mine")
    tokens = ["the", "cat", "the", "."]
    array = dsf.attention_map(r, slice(1, 4), slice(0, 2), tokens=tokens, layer=3)
    assert array.dims == ("batch", "head", "query", "key")
    assert array["query"].values.tolist() == [1, 2, 3]
    assert array["key"].values.tolist() == [0, 1]
    assert array["query_token"].values.tolist() == ["cat", "the", "."]
    assert array["key_token"].values.tolist() == ["the", "cat"]
    assert array.attrs["system"] == "demo"
    assert array.attrs["structure"] == "diagonal"
    assert array.attrs["gauge"] == "mine"
    assert array.attrs["mode"] == "exact"
    assert array.attrs["precision"] == "float64"
    assert array.attrs["direction"] == "causal"
    assert array.attrs["layer"] == 3
    assert array.attrs["dsf_version"] == dsf.__version__
    tile = dsf.materialise(r, slice(1, 4), slice(0, 2))
    assert torch.equal(torch.from_numpy(array.values), tile)


def test_attention_map_names_channels_inputs_and_directions():
    r = recurrence("diagonal", 11, n_input=2, n_output=3)
    assert dsf.attention_map(r).dims == ("batch", "head", "query", "key", "output", "input")
    one = recurrence("diagonal", 11)
    gated = dsf.Gated(one, torch.ones(1, 7, 1, 4))
    array = dsf.attention_map(gated)
    assert array.dims == ("batch", "head", "channel", "query", "key")
    assert array.attrs["gated"] == 1
    assert dsf.attention_map(dsf.anticausal(one)).attrs["direction"] == "anticausal"
    both = dsf.Bidirectional(one, dsf.anticausal(one, strict=True))
    assert dsf.attention_map(both).attrs["direction"] == "bidirectional"


def test_attention_map_wants_one_text_per_position():
    with pytest.raises(DsfShapeError, match="tokens: expected 7 texts, got 2"):
        dsf.attention_map(recurrence("diagonal"), tokens=["a", "b"])


# -- what is refused ---------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_it_is_allocated():
    length = 300_000
    q = torch.zeros(1, 1, 1, 1).expand(1, length, 1, 1)
    softmax = dsf.Recurrence(Identity(length), dsf.OneHot(length, length), dsf.SoftmaxRows(q, q))
    with pytest.raises(DsfMemoryError, match=r"query=300000, key=300000\) float32 needs 335 GiB"):
        dsf.materialise(softmax)
    assert dsf.materialise(softmax, slice(7, 8), slice(0, 4)).shape == (1, 1, 1, 4)


def test_the_cap_can_be_set_and_is_named():
    r = recurrence("diagonal")  # 2 x 3 x 7 x 7 x 8 bytes
    with pytest.raises(DsfMemoryError, match="max_memory") as caught:
        dsf.materialise(r, max_memory=2351)
    assert "queries= and keys=" in str(caught.value)
    assert dsf.materialise(r, max_memory=2352).shape == (2, 3, 7, 7)
    with pytest.raises(MemoryError):
        dsf.attention_map(r, max_memory=10)


def test_free_memory_is_a_positive_number():
    assert 2**20 < available_bytes() < 2**62


def test_only_contiguous_ranges_within_the_length():
    r = recurrence("diagonal")
    assert dsf.materialise(r, range(2, 4), range(0, 3)).shape == (2, 3, 2, 3)
    assert dsf.materialise(r, slice(-2, None), slice(0, 100)).shape == (2, 3, 2, 7)
    for bad in (slice(0, 7, 2), range(0, 9), range(-2, 3)):
        with pytest.raises(DsfValueError, match="queries: expected a contiguous range"):
            dsf.materialise(r, bad)
        with pytest.raises(DsfValueError, match="keys: expected a contiguous range"):
            dsf.materialise(r, None, bad)
    for asked in ([1, 2], 3):
        with pytest.raises(DsfTypeError, match="f: keys: expected a slice or a range"):
            span("f", "keys", asked, 9)
    assert span("f", "keys", None, 3) == range(3)
