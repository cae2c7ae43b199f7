"""The laws of scan and step, for every structure. (The chunked forms have their own file.)"""

from __future__ import annotations

import laws
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structures import SMOOTH, STRUCTURES, Draw, complex_structure, recurrence, values_for
from torch.utils import _pytree as pytree

import dsf
from dsf.scanning import loop
from dsf.transitions import Dense, Diagonal, DiagonalLowRank, Householder, Identity, Scalar

names = pytest.mark.parametrize("name", STRUCTURES)
backends = pytest.mark.parametrize("backend", ["auto", "reference"])
LENGTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33]) | st.integers(1, 24)
SEEDS = st.integers(0, 10_000)


@given(
    name=st.sampled_from(list(STRUCTURES)), length=LENGTHS, seed=SEEDS, shared=st.booleans(),
    invariant=st.booleans(), initial=st.sampled_from([0, 1, 5]), single=st.booleans(),
    sizes=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
    chunk=st.sampled_from([None, 1, 5, 16]),
)  # fmt: skip
def test_fast_scans_match_the_loop(
    name, length, seed, shared, invariant, initial, single, sizes, chunk
):
    """Any structure, lengths around powers of two, size-1 axes, chunk boundaries anywhere."""
    r = recurrence(
        name, seed, length=length, n_input=sizes[0], n_output=sizes[1], initial=initial,
        shared=shared, time_invariant=invariant, dtype=torch.float32 if single else torch.float64,
    )  # fmt: skip
    laws.scan_matches_reference(r, values_for(r, seed, length=length), chunk)


@given(
    name=st.sampled_from(list(STRUCTURES)), length=st.integers(1, 12), seed=SEEDS,
    shared=st.booleans(), invariant=st.booleans(), single=st.booleans(),
    sizes=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
)  # fmt: skip
def test_maps_and_steps_match_the_loop(name, length, seed, shared, invariant, single, sizes):
    """materialise then multiply = scan = repeated step."""
    r = recurrence(
        name, seed, length=length, n_input=sizes[0], n_output=sizes[1], initial=5, shared=shared,
        time_invariant=invariant, dtype=torch.float32 if single else torch.float64,
    )  # fmt: skip
    u = values_for(r, seed, length=length)
    laws.map_times_values_is_scan(r, u)
    laws.steps_are_scan(r, u)


@names
def test_reference_is_the_equation_written_out(name):
    r = recurrence(name, 1, n_input=2, n_output=3, initial=5)
    u = values_for(r, 1)
    y, state = dsf.scan(r, u, "reference", return_state=True)
    A = r.A.as_dense().expand(2, 7, 3, 4, 4).to(torch.complex128)
    B, C, D = (x.to(torch.complex128) for x in (r.B, r.C, r.D))
    h = r.initial_state.to(torch.complex128)
    for t in range(7):
        h = A[:, t] @ h + B[:, t] @ u[:, t].to(h.dtype)
        expected = C[:, t] @ h + D[:, 0] @ u[:, t].to(h.dtype)
        assert torch.allclose(y[:, t].to(h.dtype), expected, rtol=1e-13, atol=1e-13)
    assert torch.allclose(state.to(h.dtype), h, rtol=1e-13, atol=1e-13)


@names
@backends
def test_no_token_sees_the_future(name, backend):
    r = recurrence(name, 2, length=21)
    laws.no_token_sees_the_future(r, values_for(r, 2), backend)


@names
@backends
def test_doubling_doubles(name, backend):
    r = recurrence(name, 3, length=21, initial=5)
    laws.doubling_doubles(r, values_for(r, 3), backend)


@names
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_slices_make_the_whole(name, cut):
    r = recurrence(name, 4, initial=5)
    laws.slices_make_the_whole(r, values_for(r, 4), cut)


@names
def test_adjoint_identity(name):
    for n_input, n_output in [(1, 1), (2, 3)]:
        r = recurrence(name, 5, n_input=n_input, n_output=n_output)
        laws.adjoint_identity(r, values_for(r, 5))


def _padded(r: dsf.Recurrence, extra: int) -> dsf.Recurrence | None:
    """The system with `extra` steps of A = I, B = 0 at the end, where its structure has I."""
    fill = {"log_decay": 0.0, "sign": 1.0, "phase": 0.0, "left": 0.0, "right": 0.0,
            "write_strength": 0.0, "direction": 0.0}  # fmt: skip

    def pad(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        return torch.cat([x, torch.full_like(x[:, :extra], value)], 1)

    if isinstance(r.A, Scalar | Diagonal | DiagonalLowRank | Householder):
        tensors = {n: pad(x, fill[n]) for n in r.A.own_axes if (x := getattr(r.A, n)) is not None}
        size = {"n_state": r.A.n_state} if isinstance(r.A, Scalar) else {}
        A = type(r.A)(**tensors, **size)
    elif isinstance(r.A, Dense):
        eye = torch.eye(4, dtype=r.A.matrix.dtype).expand_as(r.A.matrix[:, :extra])
        A = Dense(torch.cat([r.A.matrix, eye], 1))
    elif isinstance(r.A, Identity):
        A = r.A
    else:
        return None
    return r.replace(A=A, B=pad(r.B), C=pad(r.C))


@names
def test_identity_padding_leaves_the_state(name):
    """Bit for bit in the loop; the chunked forms may sum in another order."""
    r = recurrence(name, 6, initial=5)
    longer = _padded(r, 4)
    if longer is None:
        assert name.startswith(("block", "shift"))
        return
    u = values_for(r, 6)
    padded_u = torch.cat([u, 9 * u[:, :4]], 1)
    _, state = dsf.scan(r, u, "reference", return_state=True)
    _, kept = dsf.scan(longer, padded_u, "reference", return_state=True)
    assert torch.equal(kept, state)
    _, fast = dsf.scan(longer, padded_u, return_state=True)
    assert torch.allclose(fast, kept, rtol=1e-13, atol=1e-13)


def test_a_zero_decay_forgets_everything():
    r = recurrence("diagonal", 7, length=9, initial=5)
    log_decay = r.A.log_decay.clone()
    log_decay[:, 4] = -torch.inf
    r = r.replace(A=Diagonal(log_decay))
    u = values_for(r, 7)
    other = u.clone()
    other[:, :4] = 1e6
    for backend in ("auto", "reference"):
        assert torch.equal(dsf.scan(r, u, backend)[:, 4:], dsf.scan(r, other, backend)[:, 4:])


# -- transforms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives(name):
    r = recurrence(name, 8, batch=1, length=3, head=1, initial=1)
    laws.derivatives_are_right(r, values_for(r, 8, batch=1, head=1, channel=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_entry_by_entry(name):
    r = recurrence(name, 8, batch=1, length=3, head=1, initial=1)
    u = values_for(r, 8, batch=1, head=1, channel=1)
    laws.derivatives_are_right(r, u, every_entry=True)


@names
def test_vmap(name):
    systems = [recurrence(name, seed, initial=5) for seed in (9, 19)]
    if len({pytree.tree_structure(r) for r in systems}) > 1:
        systems = [systems[0], pytree.tree_map(lambda x: 0.5 * x, systems[0])]
    laws.vmap_is_a_loop(systems, [values_for(r, i) for i, r in enumerate(systems)])


ONE_OF_EACH = ["identity", "scalar", "diagonal_complex", "householder", "diagonal_low_rank",
               "block_diagonal", "shift", "dense"]  # fmt: skip


@pytest.mark.parametrize("name", [
    n if n in ONE_OF_EACH else pytest.param(n, marks=pytest.mark.slow) for n in STRUCTURES
])  # fmt: skip
def test_compiles_in_one_graph(name):
    r = recurrence(name, 10, length=5)
    laws.compiles_in_one_graph(r, values_for(r, 10))


@pytest.mark.slow
def test_compiles_ahead_of_time():
    r = recurrence("diagonal", 11, length=5)
    laws.compiles_in_one_graph(r, values_for(r, 11), "aot_eager")


# -- shapes, dtypes, edges ---------------------------------------------------------------------


@names
@backends
def test_nothing_in_nothing_out(name, backend):
    for batch, length in [(2, 0), (0, 3), (0, 0)]:
        r = recurrence(name, 12, batch=batch, length=length, initial=5)
        u = values_for(r, 12, batch=batch, length=length)
        y, state = dsf.scan(r, u, backend, return_state=True)
        assert y.shape == (batch, length, 3, 5)
        assert state.shape == (batch, 3, 4, 5)
        if length == 0:
            assert torch.equal(state.real, r.initial_state)


def test_values_give_batch_head_and_time_where_the_system_leaves_them_open():
    r = recurrence("diagonal", 13, batch=1, head=1, time_invariant=True, direct=False)
    y, state = dsf.scan(r, Draw(1).normal(5, 6, 4, 2), return_state=True)
    assert y.shape == (5, 6, 4, 2)
    assert state.shape == (5, 4, 4, 2)
    y = dsf.scan(recurrence("diagonal", 13), Draw(1).normal(1, 7, 1, 2))
    assert y.shape == (2, 7, 3, 2)


def test_output_has_the_promoted_dtype_and_the_state_32_bits_at_least():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        r = recurrence("diagonal", 14).to(dtype)
        y, state = dsf.scan(r, values_for(r, 14), return_state=True)
        assert y.dtype == dtype
        assert state.dtype == torch.promote_types(dtype, torch.float32)
        exact = dsf.scan(r, values_for(r, 14), "reference")
        assert exact.dtype == torch.float64
        assert torch.allclose(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    r = recurrence("diagonal", 14)
    assert dsf.scan(r, values_for(r, 14).float()).dtype == torch.float64


def test_sixteen_bit_decays_are_exponentiated_in_32_bits():
    """A decay of exp(-2^-8) over 256 steps: rounded to bfloat16 it would be off by 30 %."""
    log_decay = torch.full((1, 1, 1), -(2.0**-8), dtype=torch.bfloat16)
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    r = dsf.Recurrence(Scalar(log_decay, n_state=1), one, one,
                       initial_state=torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))  # fmt: skip
    _, state = dsf.scan(r, torch.zeros(1, 256, 1, 1, dtype=torch.bfloat16), return_state=True)
    assert abs(float(state) - torch.exp(torch.tensor(-1.0)).item()) < 1e-5


@names
def test_real_output_is_the_real_part(name):
    if not complex_structure(name):
        return
    r = recurrence(name, 15, n_input=2, n_output=3, initial=5)
    u = values_for(r, 15)
    taken = r.replace(real_output=True)
    for backend in ("auto", "reference"):
        full, real = dsf.scan(r, u, backend), dsf.scan(taken, u, backend)
        assert not real.is_complex()
        assert torch.equal(real, full.real)
    y0, state = taken.initial_state, taken.initial_state
    for t in range(7):
        y0, state = dsf.step(taken.time_slice(t, t + 1), u[:, t], state)
    assert torch.allclose(y0, dsf.scan(taken, u)[:, -1], rtol=1e-12, atol=1e-12)
    weights = dsf.materialise(taken)
    assert not weights.is_complex()
    zero_start = dsf.scan(taken.replace(initial_state=None), u)
    assert torch.allclose(laws.apply_map(weights, u), zero_start, rtol=1e-12, atol=1e-12)


def test_loop_is_what_a_structure_without_a_fast_path_runs():
    r = recurrence("block_diagonal", 16)
    u = values_for(r, 16)[:, :, :, None]
    state = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for found, expected in zip(
        r.A.scan_chunked(r.B, r.C, u, state), loop(r.A, r.B, r.C, u, state), strict=True
    ):
        assert torch.equal(found, expected)
