"""Every registered system keeps the contract of model_laws.py: a new model file needs no edit."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from model_laws import (
    ALONE_ATOL,
    CAUSAL_LAWS,
    LAWS,
    assert_near,
    fresh_input,
    mixed_by_map,
    normal,
    shaken,
)

import dsf.models
from dsf.errors import DsfValueError
from dsf.models._mixer import SequenceMixer
from dsf.wrappers import core

WIDTH = 8
NAMES = sorted(m.name for m in pkgutil.iter_modules(dsf.models.__path__) if m.name[0] != "_")


@pytest.fixture(scope="module")
def layers():
    """One shaken small layer a system, built when first asked for."""
    built: dict[str, SequenceMixer] = {}

    def get(name: str) -> SequenceMixer:
        if name not in built:
            torch.manual_seed(0)
            kind = importlib.import_module(f"dsf.models.{name}").LAYER
            built[name] = shaken(kind.small(WIDTH))
        return built[name]

    return get


@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_law(name, law, layers):
    law(layers(name), fresh_input(WIDTH))


@pytest.mark.parametrize("law", CAUSAL_LAWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_causal_law(name, law, layers):
    layer = layers(name)
    assert layer.is_causal, "the small layer of every system is causal"
    law(layer, fresh_input(WIDTH))


@pytest.mark.parametrize("name", NAMES)
def test_labels(name, layers):
    layer = layers(name)
    assert isinstance(layer, SequenceMixer)
    assert layer.system == name
    assert list(layer.equations) == ["A", "B", "C", "D"]
    assert all(isinstance(text, str) and text for text in layer.equations.values())
    assert layer.source
    facts = layer.facts(WIDTH, 5)
    assert list(facts) == ["structure", "states", "normaliser", "exact"]
    assert all(facts.values())
    system, _ = layer.recurrence(fresh_input(WIDTH))
    assert core(system).system == name
    assert core(system).gauge


@pytest.mark.parametrize("name", NAMES)
def test_the_system_is_also_a_function_of_projected_tensors(name):
    function = getattr(importlib.import_module(f"dsf.models.{name}"), f"{name}_recurrence", None)
    assert inspect.isfunction(function), f"{name}_recurrence: expected in dsf/models/{name}.py"
    assert function.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_single_token_and_long_batch(name, layers):
    for x in (fresh_input(WIDTH, length=1), fresh_input(WIDTH, length=3, batch=5)):
        assert layers(name)(x).shape == x.shape


@pytest.mark.parametrize("channel", [1, 3])
def test_a_gate_of_one_or_all_channels_is_mixed_by_its_map(channel, layers):
    system, _ = layers("softmax_attention").recurrence(fresh_input(WIDTH))
    gate, u = normal(2, 11, 4, channel, seed=1), normal(2, 11, 4, 3, seed=2)
    whole = dsf.gated(gate, system)
    assert isinstance(whole, dsf.Gated)
    with torch.no_grad():
        assert_near("gate", mixed_by_map(whole, u), dsf.scan(whole, u), ALONE_ATOL)


def test_registry_lists_every_file():
    assert list(dsf.models.registered()) == NAMES


def test_build_gives_the_small_layer_or_the_given_options():
    name = NAMES[0]
    kind = dsf.models.registered()[name]
    assert type(dsf.models.build(name, WIDTH)) is kind
    with pytest.raises(DsfValueError, match="expected one of"):
        dsf.models.build("no_such_system", WIDTH)
