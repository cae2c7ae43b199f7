"""Coefficient dynamics: every system that the form covers, its own map from small systems."""

import importlib
import pkgutil

import pytest
import torch
from model_laws import assert_near, fresh_input, normal, shaken

import dsf
import dsf.models
from dsf.errors import DsfMemoryError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.models.delta_net import delta_net_recurrence
from dsf.models.forgetting_attention import forgetting_attention_recurrence
from dsf.models.gla import gla_recurrence
from dsf.models.mamba import mamba_recurrence
from dsf.models.mamba2 import mamba2_recurrence
from dsf.models.path_attention import path_attention_recurrence
from dsf.models.sigmoid_attention import sigmoid_attention_recurrence
from dsf.models.softmax_attention import softmax_attention_recurrence
from dsf.normalisers import kernel_sum, separable_system
from dsf.rotary import rotary_tables, rotate
from dsf.transitions import (
    BlockDiagonal,
    Diagonal,
    DiagonalLowRank,
    Householder,
    Identity,
    Scalar,
)
from dsf.wrappers import is_cache

EXACT = 1e-12
WIDTH = 8
COVERED = {
    "softmax_attention", "linear_attention", "normalized_attention", "mamba", "mamba2", "gla",
    "delta_net", "gated_delta_net", "path_attention", "forgetting_attention", "sigmoid_attention",
}  # fmt: skip
"""The rows of the form's own table, by registered name."""
NAMES = sorted(m.name for m in pkgutil.iter_modules(dsf.models.__path__) if m.name[0] != "_")


def heads(length=9, width=4, n=3, batch=2, head=2):
    """n seeded tensors (batch, length, head, width)."""
    return [normal(batch, length, head, width, seed=s) for s in range(n)]


def same_map(form, system, tolerance=EXACT, **options):
    """The weights of the form against the system's own map, which is returned."""
    expected = dsf.materialise(system, **options)
    assert_near("map", form.weights(), expected, tolerance)
    return expected


def by_definition(form, length):
    """alpha from the states of each past token, phi and eta: the printed equations."""
    states = [form.state(j) for j in range(length)]
    q = form.query
    z = torch.stack([(q * x).sum(-1) for x in states], -1).transpose(1, 2)
    z = z.real if form.real_output else z
    weights = form.phi(z).tril() / form.eta().transpose(1, 2)[..., None]
    return z, weights


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_registered_system_is_reproduced_or_refused(name):
    torch.manual_seed(0)
    layer = shaken(importlib.import_module(f"dsf.models.{name}").LAYER.small(WIDTH))
    system, values = layer.recurrence(fresh_input(WIDTH))
    length = values.shape[1]
    try:
        form = dsf.coefficient_dynamics(system, length=length)
    except (DsfUnsupportedError, DsfTypeError):
        assert name not in COVERED
        one = isinstance(system, dsf.Recurrence) and system.n_input == system.n_output == 1
        assert not one or is_cache(system), "every finite state with one input has the form"
        return
    expected = same_map(form, system, length=length)
    assert form.system == name
    z, weights = by_definition(form, length)
    assert_near("responses", z.tril(), form.responses(), EXACT)
    skip = form.weights() - weights
    if form.skip is None:
        assert_near("by definition", weights, expected, EXACT)
    else:
        assert float(skip.tril(-1).abs().max()) < EXACT


# -- the rows of the table ---------------------------------------------------------------------


def test_softmax_and_its_normaliser():
    q, k, v = heads()
    sink = normal(2, seed=9)
    for options in ({}, {"sink": sink}, {"softcap": 1.5, "scale": 0.7}):
        r = softmax_attention_recurrence(q, k, **options)
        form = dsf.coefficient_dynamics(r)
        weights = same_map(form, r)
        assert isinstance(form.A, Identity)
        assert form.A.n_state == 4
        assert (form.readout, form.sums_to_one) == ("exp", True)
        assert_near("b", form.injection, q.new_full((1, 1, 1, 1), options.get("scale", 0.5)), 0)
        y = torch.einsum("bhts,bshp->bthp", weights, v)
        assert_near("output", y, dsf.scan(r, v), EXACT)
        own = form.eta() - (0 if "sink" not in options else sink.exp())
        assert_near("eta", own, form.phi(form.responses()).tril().sum(-1).mT, EXACT)


def test_a_large_softmax_stays_finite():
    q, k, _ = heads()
    form = dsf.coefficient_dynamics(softmax_attention_recurrence(40 * q, 40 * k))
    assert bool(torch.isfinite(form.weights()).all())
    assert bool(torch.isfinite(form.log_eta()).all())


def test_separable_attention_shows_its_normaliser():
    phi, psi = (x.abs() + 0.1 for x in heads(n=2))
    eta = kernel_sum(phi, psi)
    for gauge, A in (("identity", Identity), ("dsf", Scalar)):
        r = separable_system(phi, psi, eta.log(), gauge=gauge)
        if gauge == "identity":
            form = dsf.coefficient_dynamics(r, normaliser=eta)
            assert_near("q", form.query, phi, EXACT)
            assert_near("eta", form.eta(), eta, EXACT)
        else:
            form = dsf.coefficient_dynamics(r, injection=1 / eta)
            assert_near("k", form.key, psi, EXACT)
        assert isinstance(form.A, A)
        weights = same_map(form, r)
        assert_near("rows", weights.sum(-1), torch.ones_like(weights.sum(-1)), EXACT)


def test_state_space_models_show_their_step():
    step = torch.nn.functional.softplus(normal(2, 9, 3))
    b, c = normal(2, 9, 1, 4, seed=1), normal(2, 9, 1, 4, seed=2)
    D = normal(3, seed=3)
    r = mamba2_recurrence(step, -torch.ones(3).double(), b, c, D)
    form = dsf.coefficient_dynamics(r, injection=step)
    assert isinstance(form.A, Scalar)
    assert_near("k", form.key, b.expand(-1, -1, 3, -1), EXACT)
    same_map(form, r)
    A = -torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.1
    r = mamba_recurrence(step, A, b[:, :, 0], c[:, :, 0], D)
    form = dsf.coefficient_dynamics(r, injection=step)
    assert isinstance(form.A, Diagonal)
    same_map(form, r)


def test_delta_rule_collapses_to_the_recurrent_state():
    q, k, v = heads()
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.sigmoid(normal(2, 9, 2, seed=5))
    r = delta_net_recurrence(q, k, beta)
    form = dsf.coefficient_dynamics(r, injection=beta)
    assert isinstance(form.A, Householder)
    assert_near("k", form.key, k, EXACT)
    same_map(form, r)
    summed = sum(form.state(j)[..., None] * v[:, j, None, :, None] for j in range(9))
    y, state = dsf.scan(form.collapsed(), v, return_state=True)
    assert_near("state", summed[:, -1], state, EXACT)
    assert_near("output", y, dsf.scan(r, v), EXACT)


def test_path_attention_with_and_without_gates():
    q, k, w = heads()
    w = torch.nn.functional.normalize(w, dim=-1)
    beta = 2 * torch.sigmoid(normal(2, 9, 2, seed=5))
    log_f = torch.nn.functional.logsigmoid(normal(2, 9, 2, seed=6))
    for gate, A, n in ((None, Householder, 4), (log_f, DiagonalLowRank, 6)):
        r = path_attention_recurrence(q, k, w, beta, log_decay=gate)
        form = dsf.coefficient_dynamics(r)
        assert isinstance(form.A, A)
        assert form.A.n_state == n
        same_map(form, r)


def test_forgetting_attention_and_alibi_take_two_more_coordinates():
    q, k, _ = heads()
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    alibi = (-slopes).expand(2, 9, 2)
    for log_f in (torch.nn.functional.logsigmoid(normal(2, 9, 2, seed=6)), alibi):
        r = forgetting_attention_recurrence(q, k, log_f, sink=normal(2, seed=8))
        form = dsf.coefficient_dynamics(r)
        assert form.A.n_state == 6
        assert_near("log f", form.A.as_dense()[..., 4, 5], log_f, EXACT)
        same_map(form, r)
    lag = torch.arange(9.0)[:, None] - torch.arange(9.0)
    bias = (-slopes[:, None, None] * lag.clamp(min=0))[None]
    biased = softmax_attention_recurrence(q, k, bias=bias, sink=normal(2, seed=8))
    assert_near("ALiBi", form.weights(), dsf.materialise(biased), EXACT)
    lost = alibi.clone()
    lost[:, 3] = -torch.inf
    shut = forgetting_attention_recurrence(q, k, lost)
    with pytest.raises(DsfValueError, match="gates above zero"):
        dsf.coefficient_dynamics(shut)


@pytest.mark.parametrize("pairing", ["half", "neighbour"])
@pytest.mark.parametrize("rotated", [6, 4])
def test_rotary_positions_are_a_rotation_in_the_transition(pairing, rotated):
    q, k = heads(width=6, n=2)
    tables = rotary_tables(9, rotated, pairing=pairing, start=3)
    r = softmax_attention_recurrence(*(rotate(x, *tables, pairing) for x in (q, k)))
    form = dsf.coefficient_dynamics(r, rotation=tables, pairing=pairing)
    assert isinstance(form.A, BlockDiagonal)
    same_map(form, r)
    assert_near("q before the turn", form.query.sort(-1)[0], q.sort(-1)[0], EXACT)
    A = form.A.as_dense()
    eye = torch.eye(6, dtype=torch.float64).expand_as(A)
    assert_near("orthogonal", A @ A.mT, eye, EXACT)
    assert_near("constant", A[:, 1:-1], A[:, 2:], EXACT)


def test_tables_that_do_not_rotate_are_refused():
    q, k = heads(width=6, n=2)
    tables = rotary_tables(9, 6, tables="release")
    r = softmax_attention_recurrence(*(rotate(x, *tables) for x in (q, k)))
    with pytest.raises(DsfValueError, match="do not rotate"):
        dsf.coefficient_dynamics(r, rotation=tables)


def test_sigmoid_attention_has_no_normaliser():
    q, k, _ = heads()
    r = sigmoid_attention_recurrence(q, k, offset=-1.5)
    form = dsf.coefficient_dynamics(r)
    assert (form.readout, form.offset) == ("sigmoid", -1.5)
    assert bool((form.eta() == 1).all())
    same_map(form, r)


# -- what the form is for ----------------------------------------------------------------------


def test_the_past_may_be_permuted_only_where_nothing_turns():
    q, k, w = heads(batch=1)
    order = torch.tensor([3, 0, 4, 1, 2, 5, 6, 7, 8])
    shuffled = k[:, order]
    beta, log_a = torch.full((1, 9, 2), 0.7).double(), torch.full((1, 9, 2, 4), -0.3).double()
    makers = {
        "softmax": (softmax_attention_recurrence, True),
        "delta": (lambda q, k: delta_net_recurrence(q, k, beta), False),
        "gla": (lambda q, k: gla_recurrence(q, k, log_a), False),
        "path": (lambda q, k: path_attention_recurrence(q, k, w / w.norm(dim=-1, keepdim=True),
                                                        beta), False),
    }  # fmt: skip
    for name, (make, invariant) in makers.items():
        one, two = (dsf.coefficient_dynamics(make(q, x)).weights()[:, :, 8] for x in (k, shuffled))
        off = float((one[..., order] - two).abs().max())
        assert off < EXACT if invariant else off > 1e-3, name


@torch.no_grad()
def test_the_scale_keeps_the_variance_of_a_response_at_one():
    q, k, _ = heads(length=400, width=16, batch=1)
    form = dsf.coefficient_dynamics(softmax_attention_recurrence(q, k))
    past = torch.ones(400, 400, dtype=torch.bool).tril()
    assert abs(float(form.responses()[..., past].var()) - 1) < 0.05


def test_what_is_not_of_the_form_is_refused():
    q, k, _ = heads()
    for options in ({"window": 3}, {"bias": q.new_zeros(1, 1, 9, 9)},
                    {"key_mask": torch.ones(2, 9, dtype=torch.bool)}):  # fmt: skip
        with pytest.raises(DsfUnsupportedError, match="expected causal rows over all past keys"):
            dsf.coefficient_dynamics(softmax_attention_recurrence(q, k, **options))
    with pytest.raises(DsfTypeError, match=r"expected a causal dsf.Recurrence"):
        dsf.coefficient_dynamics(softmax_attention_recurrence(q, k, causal=False))
    r = softmax_attention_recurrence(q, k)
    with pytest.raises(DsfUnsupportedError, match="whose rows fix both"):
        dsf.coefficient_dynamics(r, normaliser=torch.ones(1, 1, 1).double())
    with pytest.raises(DsfUnsupportedError, match="rows of type ExplicitRows"):
        dsf.coefficient_dynamics(r.replace(C=dsf.ExplicitRows(dsf.materialise(r))))
    wide = dsf.Recurrence(Identity(4), normal(1, 9, 1, 4, 2), normal(1, 9, 1, 1, 4))
    with pytest.raises(DsfUnsupportedError, match="one input and one output"):
        dsf.coefficient_dynamics(wide)
    linear = delta_net_recurrence(q, k, torch.ones(2, 9, 2).double())
    with pytest.raises(DsfValueError, match="injection: expected no zeros"):
        dsf.coefficient_dynamics(linear, injection=torch.zeros(1, 1, 1).double())
    with pytest.raises(DsfUnsupportedError, match="log_eta: expected readout='exp'"):
        dsf.coefficient_dynamics(linear).log_eta()
    with pytest.raises(DsfMemoryError):
        dsf.coefficient_dynamics(linear).weights(max_memory=100)


def test_no_token_and_gradients():
    q, k, _ = heads(length=0)
    assert dsf.coefficient_dynamics(softmax_attention_recurrence(q, k)).weights().shape[-2:] == (
        0,
        0,
    )
    q, k, _ = (x.requires_grad_() for x in heads(length=3, batch=1, width=2))

    def weights(q, k):
        return dsf.coefficient_dynamics(softmax_attention_recurrence(q, k)).weights()

    assert torch.autograd.gradcheck(weights, (q, k), fast_mode=True)
