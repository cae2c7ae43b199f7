"""The chunked scans: exact for every decay, both ways, at every length and chunk boundary."""

from __future__ import annotations

from collections.abc import Callable

import laws
import pytest
import torch
from decays import FAMILIES, decay_parts
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dsf
from dsf.recurrence import Recurrence
from dsf.scanning import loop
from dsf.transitions import Dense, Diagonal, DiagonalLowRank, Householder, Identity, Scalar, Shift
from dsf.transitions._base import Transition

LIMIT = 16.0
"""Units, float32, both ways; M from the scan, or its gradient, on absolute values."""
CHUNK = 8
LENGTHS = (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5, 31, 53)
N = 4

families = pytest.mark.parametrize("family", FAMILIES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1).to(dtype)


def scalar(family: str, lead: tuple[int, int, int], dtype: torch.dtype) -> Transition:
    return Scalar(*decay_parts(family, lead, 1, dtype), n_state=N)


def diagonal(family: str, lead: tuple[int, int, int], dtype: torch.dtype) -> Transition:
    return Diagonal(*decay_parts(family, (*lead, N), 2, dtype))


def low_rank(family: str, lead: tuple[int, int, int], dtype: torch.dtype) -> Transition:
    """A gated delta rule: diag(a) - beta a k k^T with unit k."""
    parts = decay_parts(family, (*lead, N), 3, dtype)
    k = unit(*lead, N, seed=4, dtype=dtype)
    left = normal(*lead, 1, seed=5, dtype=dtype).sigmoid() * k * parts[0].exp()
    return DiagonalLowRank(*parts, left=left[..., None], right=k[..., None])


def householder(_: str, lead: tuple[int, int, int], dtype: torch.dtype) -> Transition:
    strength = 2 * normal(*lead, seed=6, dtype=dtype).sigmoid()
    return Householder(strength, unit(*lead, N, seed=7, dtype=dtype))


def rank_two(family: str, lead: tuple[int, int, int], dtype: torch.dtype) -> Transition:
    left, right = (0.3 * normal(*lead, N, 2, seed=s, dtype=dtype) for s in (8, 9))
    return DiagonalLowRank(*decay_parts(family, (*lead, N), 3, dtype), left=left, right=right)


Builder = Callable[[str, tuple[int, int, int], torch.dtype], Transition]
GATED: dict[str, tuple[Builder, int]] = {
    "scalar": (scalar, 3), "diagonal": (diagonal, 3), "elementwise": (diagonal, 1),
    "scalar_elementwise": (scalar, 1), "low_rank": (low_rank, 3),
}  # fmt: skip
"""Form -> (builder, channels): with one channel the diagonal form goes step by step."""
FORMS: dict[str, tuple[Builder, int, str]] = {
    "identity": (lambda *_: Identity(N), 3, "one"),
    **{name: (build, p, "sudden_drops") for name, (build, p) in GATED.items()},
    **{f"{name}_complex": (*GATED[name], "complex_damped") for name in GATED if "_el" not in name},
    **{
        f"{name}_signed": (*GATED[name], "alternating_sign") for name in GATED if "_el" not in name
    },
    "householder": (householder, 3, "one"),
    "rank_two": (rank_two, 3, "half"),
    "shift": (lambda *_: Shift(N, 2), 3, "one"),
}
forms = pytest.mark.parametrize("form", FORMS)


def system(
    form: str, length: int, *, family: str | None = None, dtype: torch.dtype = torch.float64,
    n_input: int = 1, n_output: int = 1, initial: bool = True, seed: int = 0,
    a: tuple[int, int, int] | None = None, b: tuple[int, int, int] | None = None,
    c: tuple[int, int, int] | None = None,
) -> tuple[Recurrence, Tensor]:  # fmt: skip
    """One system and its values; a, b, c give other leading axes to A, B, C."""
    build, channels, default = FORMS[form]
    full = (2, length, 3)
    A = build(family or default, a or full, dtype)
    B = normal(*(b or full), N, n_input, seed=seed + 10, dtype=dtype)
    C = normal(*(c or full), n_output, N, seed=seed + 11, dtype=dtype)
    h0 = normal(2, 3, N, channels, seed=seed + 12, dtype=dtype) if initial else None
    shape = (*full, channels) if n_input == 1 else (*full, n_input, channels)
    return Recurrence(A, B, C, None, h0), normal(*shape, seed=seed + 13, dtype=dtype)


def both(r: Recurrence, u: Tensor, chunk: int | None = CHUNK, **options: bool) -> tuple:
    return dsf.scan(r, u, "chunked", return_state=True, chunk=chunk, **options)


# -- the 12 families ---------------------------------------------------------------------------


@families
@pytest.mark.parametrize("form", GATED)
@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_outputs_are_exact_for_every_decay(form, family, chunk):
    r, u = system(form, 197, family=family, dtype=torch.float32)
    y, state = both(r, u, chunk)
    y0, state0 = dsf.scan(r, u, "reference", return_state=True)
    size, state_size = laws.magnitude(r, u)
    assert laws.units(y, y0, size, torch.float32) <= LIMIT
    assert laws.units(state, state0, state_size, torch.float32) <= LIMIT


def gradients(run: Callable, r: Recurrence, u: Tensor, cotangent: tuple) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten(r)
    inputs = [x.detach().clone() for x in [*leaves, u]]
    signs = (r.A.sign,) if getattr(r.A, "sign", None) is not None else ()
    wanted = [i for i, x in enumerate([*leaves, u]) if not any(x is s for s in signs)]
    for i in wanted:
        inputs[i].requires_grad_()
    y, state = run(pytree.tree_unflatten(inputs[:-1], spec), inputs[-1])
    loss = (y * cotangent[0].to(y.dtype)).sum() + (state * cotangent[1].to(state.dtype)).sum()
    return list(torch.autograd.grad(loss.real, [inputs[i] for i in wanted]))


def absolute_loop(r: Recurrence, u: Tensor) -> tuple[Tensor, Tensor]:
    """The scan of absolute values as a function of the parameters: its gradients are their M."""
    h0 = r.initial_state
    assert h0 is not None
    A = r.A
    if isinstance(A, DiagonalLowRank):
        modulus = torch.diag_embed(torch.exp(A.log_decay))
        A = Dense(modulus + A.left @ A.right.mT)
    elif isinstance(A, Householder):
        k = A.direction
        eye = torch.eye(N, dtype=k.dtype)
        A = Dense(eye + A.write_strength[..., None, None] * k[..., None] * k[..., None, :])
    elif isinstance(A, Scalar):
        A = Scalar(A.log_decay, n_state=N)
    elif isinstance(A, Diagonal):
        A = Diagonal(A.log_decay)
    y, state = loop(A, r.B, r.C, u.unsqueeze(3), h0)
    return y.squeeze(3), state


def absolute(r: Recurrence) -> Recurrence:
    """Absolute values of everything but the logarithms of decays; no sign, no phase."""
    A = r.A
    if isinstance(A, DiagonalLowRank):
        A = DiagonalLowRank(A.log_decay, left=A.left.abs(), right=A.right.abs())
    elif isinstance(A, Householder):
        A = Householder(A.write_strength.abs(), A.direction.abs())
    elif isinstance(A, Scalar):
        A = Scalar(A.log_decay, n_state=N)
    elif isinstance(A, Diagonal):
        A = Diagonal(A.log_decay)
    h0 = r.initial_state
    return r.replace(A=A, B=r.B.abs(), C=r.C.abs(), initial_state=None if h0 is None else h0.abs())


@families
@pytest.mark.parametrize("form", GATED)
def test_gradients_are_exact_for_every_decay(form, family):
    """Of log_decay too: at 1e-20 its gradient is that small, and no larger ones may hide it.

    The gradient of a phase has the M of that of the logarithm: both are Re or Im of a da.
    """
    r, u = system(form, 83, family=family, dtype=torch.float32)
    wide, wide_u = r.to(torch.float64), u.double()
    y, state = both(r, u, 32)
    g = (normal(*y.shape, seed=20, dtype=torch.float32),
         normal(*state.shape, seed=21, dtype=torch.float32))  # fmt: skip
    found = gradients(lambda r, u: both(r, u, 32), r, u, g)
    expected = gradients(
        lambda r, u: dsf.scan(r, u, "reference", return_state=True), wide, wide_u, g)  # fmt: skip
    sizes = gradients(absolute_loop, absolute(wide), wide_u.abs(), tuple(x.abs() for x in g))
    if r.A.is_complex:
        sizes.insert(1, sizes[0])
    for x, x0, m in zip(found, expected, sizes, strict=True):
        assert laws.units(x, x0, m, torch.float32) <= LIMIT


# -- shapes ------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(form, length):
    r, u = system(form, length)
    y, state = both(r, u)
    y0, state0 = dsf.scan(r, u, "reference", return_state=True)
    size, state_size = laws.magnitude(r, u)
    assert laws.units(y, y0, size, torch.float64) <= laws.UNITS[torch.float64]
    assert laws.units(state, state0, state_size, torch.float64) <= laws.UNITS[torch.float64]


@forms
@pytest.mark.parametrize(("sizes", "chunk"), [((1, 2), 3), ((2, 1), CHUNK), ((3, 2), 64)])
def test_several_inputs_and_outputs(form, sizes, chunk):
    r, u = system(form, 21, n_input=sizes[0], n_output=sizes[1])
    y, state = both(r, u, chunk)
    y0, state0 = dsf.scan(r, u, "reference", return_state=True)
    size, state_size = laws.magnitude(r, u)
    assert laws.units(y, y0, size, torch.float64) <= laws.UNITS[torch.float64]
    assert laws.units(state, state0, state_size, torch.float64) <= laws.UNITS[torch.float64]


@forms
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["a", "b", "c", "ab", "bc", "abc"])
def test_shared_axes_of_size_one(form, axis, which):
    """A, B, C time-invariant, or shared by batch or heads, each alone and together."""
    lead = [2, 21, 3]
    lead[axis] = 1
    r, u = system(form, 21, **{w: tuple(lead) for w in which})  # type: ignore[arg-type]
    y, state = both(r, u)
    y0, state0 = dsf.scan(r, u, "reference", return_state=True)
    size, state_size = laws.magnitude(r, u)
    assert laws.units(y, y0, size, torch.float64) <= laws.UNITS[torch.float64]
    assert laws.units(state, state0, state_size, torch.float64) <= laws.UNITS[torch.float64]


@forms
def test_strided_inputs(form):
    """Transposed, sliced and shifted storage gives bit for bit what contiguous storage gives."""
    r, u = system(form, 21)

    def scatter(x: Tensor) -> Tensor:
        wide = torch.full((*[2 * s + 1 for s in x.shape],), torch.nan, dtype=x.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view

    strided = pytree.tree_map(scatter, r)
    for found, expected in zip(both(strided, scatter(u)), both(r, u), strict=True):
        assert torch.equal(found, expected)


@forms
def test_sixteen_bit_inputs_are_computed_in_float32(form):
    r, u = system(form, 40, dtype=torch.float32)
    r16 = pytree.tree_map(lambda x: x.to(torch.bfloat16), r)
    u16 = u.to(torch.bfloat16)
    r32 = pytree.tree_map(lambda x: x.to(torch.float32), r16)
    y = dsf.scan(r16, u16, "chunked")
    y32 = dsf.scan(r32, u16.float(), "chunked")
    assert torch.equal(y, y32.to(y.dtype))


@forms
def test_many_chunks(form):
    """More chunks than the state is handed over in one product."""
    r, u = system(form, 85)
    y, state = both(r, u, 2)
    y0, state0 = dsf.scan(r, u, "reference", return_state=True)
    size, state_size = laws.magnitude(r, u)
    assert laws.units(y, y0, size, torch.float64) <= laws.UNITS[torch.float64]
    assert laws.units(state, state0, state_size, torch.float64) <= laws.UNITS[torch.float64]


@forms
def test_real_systems_take_complex_values(form):
    r, u = system(form, 21, initial=False)
    y = dsf.scan(r, torch.complex(u, 2 * u), "chunked", chunk=CHUNK)
    expected = (1 + 2j) * dsf.scan(r, u, "chunked", chunk=CHUNK)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_no_low_rank_part_is_a_diagonal():
    r, u = system("diagonal", 21)
    y = dsf.scan(r.replace(A=r.A.widen()), u, "chunked", chunk=CHUNK)
    assert torch.equal(y, dsf.scan(r, u, "chunked", chunk=CHUNK))


# -- causality ---------------------------------------------------------------------------------


def spoil(r: Recurrence, u: Tensor, what: str, k: int, value: float) -> tuple[Recurrence, Tensor]:
    def late(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, k:] = value
        return x

    if what == "values":
        return r, late(u)
    if what == "A":
        value = 2.0 if value == 1e30 else value  # a logarithm of 1e30 would be no decay
        return r.replace(A=r.A.map_tensors(late)), u
    return r.replace(**{what: late(getattr(r, what))}), u


@forms
@pytest.mark.parametrize("what", ["values", "A", "B", "C"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, -2.5])
@pytest.mark.parametrize("k", [5, 16])
def test_the_past_does_not_see_the_future(form, what, value, k):
    """Whatever comes from step k on, in a chunk or at its edge, earlier outputs keep all bits."""
    r, u = system(form, 21, dtype=torch.float32)
    after, u_after = spoil(r, u, what, k, value)
    y = dsf.scan(r, u, "chunked", chunk=CHUNK)
    y_after = dsf.scan(after, u_after, "chunked", chunk=CHUNK, allow_nonfinite=True)
    assert torch.equal(y[:, :k], y_after[:, :k])


@forms
def test_nan_stays_in_its_batch_head_and_channel(form):
    r, u = system(form, 21)
    last = u.shape[-1] - 1
    y, _ = both(r, u)
    spoiled = u.clone()
    spoiled[1, 10, 2, last] = torch.nan
    y1, state1 = both(r, spoiled, allow_nonfinite=True)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 10:, 2, last] = True
    if form == "shift":  # forgets after two steps
        reached[1, 12:, 2, last] = False
    assert torch.equal(y1.isnan(), reached)
    assert torch.equal(y1[~reached], y[~reached])
    if form != "shift":
        assert bool(state1[1, 2, :, last].isnan().all())


def test_infinite_logs_of_zero_are_not_faults():
    r, u = system("diagonal", 21, family="zero_or_one")
    y = dsf.scan(r, u, "chunked", chunk=CHUNK)
    assert bool(torch.isfinite(y).all())


# -- derivatives and transforms ----------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in FORMS if not f.endswith("signed")])
def test_derivatives(form):
    """gradcheck and gradgradcheck, float64, over chunk boundaries."""
    r, u = system(form, 7)
    if not isinstance(r.A, Identity | Householder | Shift) and not r.A.is_complex:
        # differences of a decay of e^-60 are nothing to test with
        r = r.replace(A=FORMS[form][0]("half", (2, 7, 3), torch.float64))
    leaves, spec = pytree.tree_flatten(r)
    inputs = [x[:1].detach().clone().requires_grad_() for x in [*leaves, u]]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return both(pytree.tree_unflatten(list(tensors[:-1]), spec), tensors[-1], 4)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@forms
def test_vmap(form):
    systems = [system(form, 13, seed=s) for s in range(3)]
    stacked = pytree.tree_map(lambda *xs: torch.stack(xs), *systems)
    together = torch.func.vmap(lambda r, u: both(r, u))(*stacked)
    for i, (r, u) in enumerate(systems):
        for found, expected in zip(together, both(r, u), strict=True):
            assert torch.allclose(found[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form", ["identity", "scalar", "diagonal", "elementwise", "low_rank", "householder", "shift"]
)
@pytest.mark.usefixtures("unchecked")
def test_compiles_in_one_graph(form):
    r, u = system(form, 19)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(r, u), both(r, u), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


# -- memory ------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("form", ["identity", "scalar", "diagonal", "elementwise", "low_rank"])
def test_no_tensor_grows_faster_than_the_length(form):
    sizes = []
    for length in (1024, 4096):
        r, u = system(form, length)
        with Largest() as seen:
            dsf.scan(r, u, "chunked")
        sizes.append(seen.numel)
    assert sizes[1] <= 4 * sizes[0]
