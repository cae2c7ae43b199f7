"""The laws of the core, each a function that takes a structure or a system and asserts.

Errors are measured in units: elementwise |error| / (u * M), u the unit round-off and M the same
scan run on absolute values. It is scale-free, and no cancellation in the reference hides a fault.
"""

from __future__ import annotations

import torch
from structures import Draw
from torch import Tensor
from torch.utils import _pytree as pytree

import dsf
from dsf.transitions import Dense, DiagonalLowRank, Householder, Transition
from dsf.transitions._base import mm
from dsf.wrappers import System, total_length

UNITS = {torch.float32: 16, torch.float64: 32}
"""Scans and maps against the float64 loop; in float64 the loop's own rounding counts as well."""
MATRIX_UNITS = 16
"""One product of two transitions against the product of their matrices. Decays multiply as sums
of logarithms, whose rounding grows with their size: 1e-30 adds 69 units (see `log_units`)."""
BASIS_RTOL = 1e-9
"""A map after a change of basis, float64, well-conditioned bases."""
ADJOINT_RTOL = 1e-12
"""Inner products, float64."""

ROUND_OFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


# -- the error unit ----------------------------------------------------------------------------


def absolute_matrix(A: Transition) -> Tensor:
    """|A|, or for differences (diagonal minus low rank) the sum of both absolute values."""
    if isinstance(A, Householder):
        A = A.widen()
    if isinstance(A, DiagonalLowRank):
        return torch.diag_embed(A.decay().abs()) + A.left.abs() @ A.right.abs().mT
    return A.as_dense().abs()


def magnitude(r: dsf.Recurrence, values: Tensor) -> tuple[Tensor, Tensor]:
    """M of the output and of the last state: the system of absolute values, float64."""
    r = r.dense_factors().to(torch.float64)
    size = r.replace(
        A=Dense(absolute_matrix(r.A).double()), B=r.B.abs(), C=r.C.abs(),
        D=None if r.D is None else r.D.abs(), real_output=False,
        initial_state=None if r.initial_state is None else r.initial_state.abs(),
    )  # fmt: skip
    return dsf.scan(size, values.abs().double(), "reference", return_state=True)


def units(found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units of `dtype`; infinite where an error stands on a size of zero."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = (found.to(expected.dtype) - expected).abs().double()
    unit = ROUND_OFF[torch.zeros(0, dtype=dtype).real.dtype] * size.double()
    tiny = torch.finfo(torch.float32).tiny if dtype in (torch.float32, torch.complex64) else 0.0
    ratio = torch.where(error <= tiny, 0.0, error / unit)
    return float(ratio.max()) if ratio.numel() else 0.0


def assert_close(
    found: Tensor, expected: Tensor, size: Tensor, r: dsf.Recurrence, values: Tensor
) -> None:
    """Within UNITS of the precision that system and values are given in."""
    kind = torch.zeros(0, dtype=torch.promote_types(r.dtype, values.dtype)).real.dtype
    worst = units(found, expected, size, kind)
    assert worst <= UNITS[kind], worst


def log_units(A: Transition) -> float:
    """Largest finite |log_decay|: so many units a product in logarithms may lose."""
    log = getattr(A, "log_decay", torch.zeros(1))
    return float(log.masked_fill(log == -torch.inf, 0).abs().max())


# -- transitions -------------------------------------------------------------------------------


def product_is_matrix_product(later: Transition, earlier: Transition) -> None:
    """`later.after(earlier)` is the product of the two matrices, whatever the structures."""
    product = later.after(earlier)
    expected = later.as_dense().to(torch.complex128) @ earlier.as_dense().to(torch.complex128)
    size = absolute_matrix(later).double() @ absolute_matrix(earlier).double()
    found = product.as_dense().to(torch.complex128)
    shape = torch.broadcast_shapes(found.shape, expected.shape)
    dtypes = [t.dtype for t in [*later.tensors(), *earlier.tensors()]] or [torch.float64]
    worst = units(found.expand(shape), expected.expand(shape), size.expand(shape), dtypes[0])
    assert worst <= MATRIX_UNITS + log_units(later) + log_units(earlier), worst


def apply_is_matrix_product(A: Transition, state: Tensor) -> None:
    """`apply` and `apply_transposed` are products with the matrix and its transpose."""
    matrix = A.as_dense().to(torch.complex128)
    size = absolute_matrix(A).double()
    h, kind = state.to(torch.complex128), state.dtype
    for found, m, s in [(A.apply(state), matrix, size),
                        (A.apply_transposed(state), matrix.mT, size.mT)]:  # fmt: skip
        expected = m @ h
        found = found.to(torch.complex128).expand_as(expected)
        worst = units(found, expected, (s @ h.abs()).expand(expected.shape), kind)
        assert worst <= MATRIX_UNITS, worst


def widening_keeps_the_matrix(A: Transition) -> None:
    """Every step from a structure to Dense leaves the matrix alone."""
    expected = A.as_dense()
    while not isinstance(A, Dense):
        wider = A.widen()
        assert wider.generality > A.generality
        found = wider.as_dense()
        assert torch.allclose(found.to(expected.dtype), expected, rtol=1e-6, atol=1e-6)
        A = wider


# -- scan, step, map ---------------------------------------------------------------------------


def apply_map(weights: Tensor, values: Tensor) -> Tensor:
    """The map times the values, in the axes of a scan's output."""
    wide = torch.promote_types(weights.dtype, values.dtype)
    weights, values = weights.to(wide), values.to(wide)
    if weights.ndim == 6:  # output, input
        u = values if values.ndim == 5 else values.unsqueeze(3)
        y = torch.einsum("bhtjoi,bjhip->bthop", weights, u)
        return y.squeeze(3) if y.shape[3] == 1 else y
    if weights.ndim == 5:  # channel
        return torch.einsum("bhptj,bjhp->bthp", weights, values)
    return torch.einsum("bhtj,bjhp->bthp", weights, values)


def scan_matches_reference(r: dsf.Recurrence, values: Tensor, chunk: int | None = None) -> None:
    """Output and last state of the fast path, against the float64 loop."""
    y, state = dsf.scan(r, values, return_state=True, chunk=chunk)
    y0, state0 = dsf.scan(r, values, "reference", return_state=True)
    size, state_size = magnitude(r, values)
    assert_close(y, y0, size, r, values)
    assert_close(state, state0, state_size, r, values)


def map_times_values_is_scan(r: dsf.Recurrence, values: Tensor) -> None:
    """materialise then multiply = scan (zero initial state), and nothing above the diagonal."""
    start = r.replace(initial_state=None)
    weights = dsf.materialise(start, length=values.shape[1])
    size, _ = magnitude(start, values)
    y = apply_map(weights, values)
    assert_close(y, dsf.scan(start, values, "reference"), size, r, values)
    above = torch.ones(weights.shape[2:4], dtype=torch.bool).triu(1)
    assert bool((weights[:, :, above] == 0).all())


def steps_are_scan(r: dsf.Recurrence, values: Tensor) -> None:
    """One token at a time, the state handed on, gives the scan's output and state."""
    y0, state0 = dsf.scan(r, values, "reference", return_state=True)
    state, outputs = r.initial_state, []
    for t in range(values.shape[1]):
        y, state = dsf.step(r.time_slice(t, t + 1), values[:, t], state)
        outputs.append(y)
    size, state_size = magnitude(r, values)
    assert_close(torch.stack(outputs, 1), y0, size, r, values)
    assert_close(state, state0, state_size, r, values)


def no_token_sees_the_future(system: System, values: Tensor, backend: str = "auto") -> None:
    """New values from step k on leave the outputs before k as they are, bit for bit."""
    before = dsf.scan(system, values, backend)
    k = values.shape[1] // 2
    changed = values.clone()
    changed[:, k:] = 3 - 2 * changed[:, k:]
    after = dsf.scan(system, changed, backend)
    assert torch.equal(before[:, :k], after[:, :k])
    assert not torch.equal(before[:, k:], after[:, k:])


def doubling_doubles(r: dsf.Recurrence, values: Tensor, backend: str = "auto") -> None:
    """u and h_0 times 2 give y and h_L times 2, and zeros give zeros, bit for bit."""
    h0 = r.initial_state
    y, state = dsf.scan(r, values, backend, return_state=True)
    twice = r if h0 is None else r.replace(initial_state=2 * h0)
    y2, state2 = dsf.scan(twice, 2 * values, backend, return_state=True)
    assert torch.equal(y2, 2 * y)
    assert torch.equal(state2, 2 * state)
    silent = dsf.scan(r.replace(initial_state=None), torch.zeros_like(values), backend)
    assert torch.equal(silent, torch.zeros_like(silent))


def slices_make_the_whole(r: dsf.Recurrence, values: Tensor, cut: int) -> None:
    """Two slices with the state handed over, or joined again, are the whole."""
    y, state = dsf.scan(r, values, "reference", return_state=True)
    head, tail = dsf.slice_time(r, 0, cut), dsf.slice_time(r, cut, r.length)
    y1, s1 = dsf.scan(head, values[:, :cut], "reference", return_state=True)
    after = tail.replace(initial_state=s1)
    y2, s2 = dsf.scan(after, values[:, cut:], "reference", return_state=True)
    assert torch.equal(torch.cat([y1, y2], 1), y)
    assert torch.equal(s2, state)
    joined = dsf.concatenate_time([head, tail])
    size, _ = magnitude(r, values)
    assert_close(dsf.scan(joined, values, "reference"), y, size, joined, values)


def tiles_are_parts_of_the_map(system: System, length: int | None = None) -> None:
    """Every tile equals the slice of the whole map."""
    whole = dsf.materialise(system, length=length)
    axis = 3 if whole.ndim in (5, 7) else 2  # a channel axis stands before
    n = total_length(system) if length is None else length
    size = whole.abs().amax().clamp(min=1e-300)
    for rows, cols in [((0, n), (0, 1)), ((n // 2, n), (1, n)), ((n - 1, n), (0, n)),
                       ((0, 2), (n - 2, n)), ((1, 1), (0, n)), ((0, n), (2, 2))]:  # fmt: skip
        tile = dsf.materialise(system, slice(*rows), slice(*cols), length=length)
        part = whole.narrow(axis, rows[0], rows[1] - rows[0])
        part = part.narrow(axis + 1, cols[0], cols[1] - cols[0])
        assert tile.shape == part.shape
        if tile.numel():
            assert (
                float((tile - part).abs().max() / size)
                <= UNITS[torch.float64] * ROUND_OFF[torch.float64]
            )


def basis_leaves_the_map_alone(r: dsf.Recurrence, seed: int = 0) -> None:
    """Random bases, one per step: other A_t, the same output for the same initial state."""
    d = Draw(seed)
    eye = torch.eye(r.n_state, dtype=torch.float64)
    basis = eye + 0.2 * d.normal(1, r.length + 1, 1, r.n_state, r.n_state)
    changed = dsf.change_of_basis(r, basis)
    assert changed.gauge == "changed"
    before, after = dsf.materialise(r), dsf.materialise(changed)
    assert torch.allclose(after, before.to(after.dtype), rtol=BASIS_RTOL, atol=BASIS_RTOL)
    if r.length > 1:
        moved = changed.A.as_dense() - r.A.as_dense()
        assert float(moved.abs().max()) > 1e-3


def adjoint_identity(r: dsf.Recurrence, values: Tensor) -> None:
    """<y(u), g> = <u, y*(g)>, with y* run backwards on transposed coefficients.

    lambda_t = A_{t+1}^T lambda_{t+1} + C_t^T g_t,   y*_t = B_t^T lambda_t + D_t^T g_t.
    """
    r = r.dense_factors().replace(initial_state=None)
    y = dsf.scan(r, values, "reference")
    g = y.real.cos() + 0.5
    wide_g = g if r.n_output > 1 else g.unsqueeze(3)
    costate, back = None, []
    for t in reversed(range(values.shape[1])):
        now = r.time_slice(t, t + 1)
        costate = None if costate is None else r.A.at(t + 1).apply_transposed(costate)
        read = mm(now.C[:, 0].mT, wide_g[:, t])
        costate = read if costate is None else costate + read
        direct = 0 if now.D is None else mm(now.D[:, 0].mT, wide_g[:, t])
        back.append(mm(now.B[:, 0].mT, costate) + direct)
    u = values if r.n_input > 1 else values.unsqueeze(3)
    error = (y * g).sum() - (u * torch.stack(back[::-1], 1)).sum()
    assert float(error.abs()) <= ADJOINT_RTOL * float((y * g).abs().sum())


# -- transforms --------------------------------------------------------------------------------


def derivatives_are_right(
    r: dsf.Recurrence, values: Tensor, backend: str = "auto", *, every_entry: bool = False
) -> None:
    """gradcheck and gradgradcheck with respect to every coefficient, the state and the values.

    Along random directions, or for every entry of the Jacobian.
    """
    leaves, spec = pytree.tree_flatten(r)
    inputs = [x.detach().clone().requires_grad_() for x in [*leaves, values]]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        system = pytree.tree_unflatten(list(tensors[:-1]), spec)
        return dsf.scan(system, tensors[-1], backend, return_state=True)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=not every_entry)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=not every_entry)


def vmap_is_a_loop(systems: list[dsf.Recurrence], values: list[Tensor]) -> None:
    """vmap over stacked systems gives each one's own scan."""
    stacked = pytree.tree_map(lambda *xs: torch.stack(xs), *systems)
    together = torch.func.vmap(dsf.scan)(stacked, torch.stack(values))
    for i, (r, u) in enumerate(zip(systems, values, strict=True)):
        assert torch.allclose(together[i], dsf.scan(r, u), rtol=1e-12, atol=1e-12)


def compiles_in_one_graph(r: dsf.Recurrence, values: Tensor, compiler: str = "eager") -> None:
    """torch.compile(fullgraph=True) gives what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(dsf.scan, fullgraph=True, backend=compiler)
    assert torch.allclose(compiled(r, values), dsf.scan(r, values), rtol=1e-12, atol=1e-12)
