"""torch.nn's attention and recurrent modules against their recurrences, in every option."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch_layers import (
    BATCH,
    HEADS,
    TOLERANCE,
    WIDTH,
    attention,
    random_input,
    spoil_after_the_pass,
)

import dsf
from dsf.errors import DsfFidelityError, DsfTypeError, DsfValueError
from dsf.models.rnn import recurrences_of as elman_runs
from dsf.models.rnn import rnn_recurrence
from dsf.tracing import from_layer, relative_error, trace

DTYPES = [torch.float32, torch.float64]
WRONG = 1e-3
LENGTH = 7


def _input(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return random_input(dtype, *(shape or (BATCH, LENGTH, WIDTH)), seed=seed)


def _causal(dtype: torch.dtype | None = None) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return hidden if dtype is None else torch.zeros(LENGTH, LENGTH, dtype=dtype).masked_fill(
        hidden, -torch.inf)  # fmt: skip


def _padding(dtype: torch.dtype | None = None) -> Tensor:
    hidden = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    hidden[1, -3:] = True
    return hidden if dtype is None else torch.zeros(BATCH, LENGTH, dtype=dtype).masked_fill(
        hidden, -torch.inf)  # fmt: skip


def _masks(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    general = _input(dtype, BATCH * HEADS, LENGTH, LENGTH, seed=3)
    return {
        "none": {},
        "bool": {"attn_mask": _causal()},
        "float": {"attn_mask": _causal(dtype)},
        "bias": {"attn_mask": _input(dtype, LENGTH, LENGTH, seed=2)},
        "bool 3-D": {"attn_mask": (general > 0.5) & ~torch.eye(LENGTH, dtype=torch.bool)},
        "float 3-D": {"attn_mask": general},
        "padding": {"key_padding_mask": _padding()},
        "padding and bool": {"attn_mask": _causal(), "key_padding_mask": _padding()},
        "padding and float": {"attn_mask": _causal(dtype), "key_padding_mask": _padding()},
        "float padding": {"key_padding_mask": _padding(dtype)},
    }[kind]


MASKS = ["none", "bool", "float", "bias", "bool 3-D", "float 3-D", "padding", "padding and bool",
         "padding and float", "float padding"]  # fmt: skip
OPTIONS: dict[str, dict] = {
    "plain": {}, "no bias": {"bias": False}, "slots": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "slots and zero": {"add_bias_kv": True, "add_zero_attn": True},
    "own widths": {"kdim": WIDTH, "vdim": 7}, "time first": {"batch_first": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_and_its_map_in_every_option(option, mask, dtype):
    module = attention(dtype, **{"batch_first": True, **OPTIONS[option]})
    x = _input(dtype)
    value = x if module.vdim == WIDTH else _input(dtype, BATCH, LENGTH, module.vdim, seed=4)
    x, value = (x, value) if module.batch_first else (x.transpose(0, 1), value.transpose(0, 1))
    given: dict = _masks(mask, dtype)
    for need_weights in (False, True) if dtype == torch.float64 else (True,):
        given["need_weights"] = need_weights
        layer = from_layer(module, x, x, value, **given)
        assert layer.error <= TOLERANCE[dtype]
        output, weights = module.eval()(x, x, value, **given, average_attn_weights=False)
        assert torch.equal(layer.output, output)
    # slots that are no tokens come behind the tokens, and are no columns of the map
    found = dsf.materialise(layer.recurrence)
    assert relative_error(found, weights[..., :LENGTH]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("option", ["plain", "slots", "zero"])
def test_causal_hint_without_weights_goes_by_position(option):
    module = attention(torch.float64, batch_first=True, **OPTIONS[option])
    x = _input(torch.float64)
    layer = from_layer(
        module, x, x, x, attn_mask=_causal(), is_causal=True, need_weights=False)  # fmt: skip
    assert isinstance(layer.recurrence, dsf.Recurrence)
    assert layer.error <= TOLERANCE[torch.float64]


def test_unbatched_input():
    module = attention(torch.float64)
    x = _input(torch.float64, LENGTH, WIDTH)
    layer = from_layer(module, x, x, x, key_padding_mask=_padding()[1], need_weights=False)
    assert layer.output.shape == (LENGTH, WIDTH)
    assert layer.error <= TOLERANCE[torch.float64]


def test_causal_masks_give_a_causal_system_and_others_a_bidirectional_one():
    module, x = attention(torch.float32, batch_first=True), _input(torch.float32)
    for kind in MASKS:
        system = from_layer(module, x, x, x, **_masks(kind, torch.float32)).recurrence
        causal = kind in ("bool", "float", "padding and bool", "padding and float")
        assert isinstance(system, dsf.Recurrence if causal else dsf.Bidirectional), kind


def test_a_row_that_sees_nothing_is_zero_without_weights():
    module, x = attention(torch.float64, batch_first=True), _input(torch.float64)
    hidden = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    hidden[4] = True
    layer = from_layer(module, x, x, x, attn_mask=hidden, need_weights=False)
    assert float(dsf.materialise(layer.recurrence)[:, :, 4].abs().max()) == 0
    with pytest.raises(DsfFidelityError, match="NaN"):
        from_layer(module, x, x, x, attn_mask=hidden, need_weights=True)


def test_cross_attention_of_equal_lengths_has_one_axis_of_time():
    module, x = attention(torch.float64, batch_first=True), _input(torch.float64)
    other = _input(torch.float64, seed=5)
    layer = from_layer(module, x, other, other)
    assert layer.error <= TOLERANCE[torch.float64]
    assert isinstance(layer.recurrence, dsf.Bidirectional)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inside_an_encoder_with_padding(dtype):
    """Whose fused path, and nested tensors, would hide the layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True, dtype=dtype)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    found = trace(encoder, {"src": _input(dtype), "src_key_padding_mask": _padding()})
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [layer.layer for layer in found.values()] == [0, 1]
    assert all(layer.error <= TOLERANCE[dtype] for layer in found.values())


def test_inside_a_decoder():
    torch.manual_seed(0)
    decoder = nn.TransformerDecoderLayer(WIDTH, 4, 16, batch_first=True, dtype=torch.float64)
    x = _input(torch.float64)
    found = trace(decoder, {"tgt": x, "memory": x.flip(1), "tgt_mask": _causal()})
    assert [type(t.recurrence) for t in found.values()] == [dsf.Recurrence, dsf.Bidirectional]


def test_wrong_weights_fail_the_gate():
    x = _input(torch.float32)
    module = attention(torch.float32, batch_first=True)

    def spoil(m, args, output) -> None:
        with torch.no_grad():
            m.in_proj_weight[:WIDTH].mul_(1.1)

    module.register_forward_hook(spoil)
    with pytest.raises(DsfFidelityError, match=r"expected the recurrence to reproduce .* 1e-05"):
        from_layer(module, x, x, x)


# -- recurrent modules -------------------------------------------------------------------------

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
UNITS, FEATURES, PROJECTED = 7, 5, 4
FORMS = ["batch", "unbatched", "packed", "initial", "packed initial"]


def _recurrent(kind: str, dtype: torch.dtype, layers: int, **options) -> nn.RNNBase:
    torch.manual_seed(0)
    dropout = 0.3 if layers > 1 else 0.0
    return KINDS[kind](FEATURES, UNITS, layers, dtype=dtype, dropout=dropout, **options)


def _arguments(module: nn.RNNBase, form: str, dtype: torch.dtype) -> tuple:
    if form == "unbatched":
        return (_input(dtype, LENGTH, FEATURES),)
    shape = (BATCH, LENGTH) if module.batch_first else (LENGTH, BATCH)
    x = _input(dtype, *shape, FEATURES)
    lengths = torch.tensor([LENGTH - 4, LENGTH])
    packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    start = packed if form.startswith("packed") else x
    if not form.endswith("initial"):
        return (start,)
    n = module.num_layers * (2 if module.bidirectional else 1)
    hidden = _input(dtype, n, BATCH, module.proj_size or UNITS, seed=1)
    if isinstance(module, nn.LSTM):
        return start, (hidden, _input(dtype, n, BATCH, UNITS, seed=2))
    return start, hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_modules_in_every_option(kind, form, dtype):
    special = {"LSTM": {"proj_size": PROJECTED}, "RNN": {"nonlinearity": "relu"}, "GRU": {}}[kind]
    stacks = itertools.product((1, 2), (False, True))
    for (layers, both), first in zip(stacks, itertools.cycle((False, True)), strict=False):
        extra = special if both else {"bias": False}
        module = _recurrent(kind, dtype, layers, bidirectional=both, batch_first=first, **extra)
        given = _arguments(module, form, dtype)
        found = trace(module, given)
        assert len(found) == layers * (1 + both)
        assert all(t.error <= TOLERANCE[dtype] for t in found.values())
        with torch.no_grad():  # torch has another kernel for LSTMs when gradients are wanted
            output = module.eval()(*given)[0]
        if not isinstance(output, Tensor):
            output = pad_packed_sequence(output, batch_first=True)[0]
        last = [t.output for t in found.values() if t.layer == layers - 1]
        assert torch.equal(torch.cat(last, -1), output)


def test_names_layers_and_directions_of_a_stack():
    module = nn.ModuleDict({"rnn": _recurrent("LSTM", torch.float32, 2, bidirectional=True)})
    module.forward = lambda x: module["rnn"](x)[0]
    x = _input(torch.float32, LENGTH, BATCH, FEATURES)
    found = trace(module, x)
    assert list(found) == ["rnn.l0", "rnn.l0_reverse", "rnn.l1", "rnn.l1_reverse"]
    assert [t.layer for t in found.values()] == [0, 0, 1, 1]
    assert isinstance(found["rnn.l1_reverse"].recurrence, dsf.Anticausal)
    assert {t.system for t in found.values()} == {"lstm"}
    assert {t.attrs["mode"] for t in found.values()} == {"exact_along_trajectory"}
    one = from_layer(module, layer="rnn.l1_reverse", inputs=x)
    assert one.name == "rnn.l1_reverse"
    assert list(trace(module, x, ["rnn.l0"])) == ["rnn.l0"]
    with pytest.raises(DsfValueError, match=r"expected one layer, got 4: 'l0'"):
        from_layer(module["rnn"], x)
    with pytest.raises(DsfValueError, match=r"'rnn.l7'"):
        trace(module, x, ["rnn.l7"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_needs_no_name(kind):
    module = _recurrent(kind, torch.float64, 1, batch_first=True)
    x = _input(torch.float64, BATCH, LENGTH, FEATURES)
    layer = from_layer(module, x)
    assert layer.name == "l0"
    assert relative_error(layer.output, module(x)[0]) <= TOLERANCE[torch.float64]
    assert layer.recurrence.mode == "exact_along_trajectory"
    y = dsf.scan(layer.recurrence, layer.values, "reference")
    assert relative_error(layer.readout(y), layer.output) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_recurrent_weights_fail_the_gate(kind):
    module = _recurrent(kind, torch.float32, 1)
    spoil_after_the_pass(module, "weight_hh_l0", 1.1)
    with pytest.raises(DsfFidelityError):
        from_layer(module, _input(torch.float32, LENGTH, BATCH, FEATURES))


def test_elman_gains_at_zero_and_the_jacobian_of_relu():
    """f(a)/a is f'(0) at a = 0, and for relu the frozen gains are the Jacobian."""
    module = _recurrent("RNN", torch.float64, 1, bias=False, batch_first=True)
    zeros = torch.zeros(1, 3, FEATURES, dtype=torch.float64)
    frozen = from_layer(module, zeros).recurrence
    assert torch.equal(frozen.A.matrix[0, 0, 0], module.weight_hh_l0)
    module = _recurrent("RNN", torch.float64, 1, nonlinearity="relu", batch_first=True)
    (run,) = elman_runs(module, _input(torch.float64, 1, LENGTH, FEATURES))
    tangent = run.linearize()
    assert tangent.mode == "linearised"
    assert relative_error(run.system.A.as_dense(), tangent.A.as_dense()) <= 1e-15
    curved = _recurrent("RNN", torch.float64, 1, batch_first=True)
    (run,) = elman_runs(curved, _input(torch.float64, 1, LENGTH, FEATURES))
    assert relative_error(run.system.A.as_dense(), run.linearize().A.as_dense()) > WRONG


def test_elman_matrices_that_would_not_fit_are_refused():
    gain = torch.zeros(1, 1, 1).expand(1, 2**20, 2**20)
    with pytest.raises(MemoryError, match=r"needs .* GiB"):
        rnn_recurrence(gain, torch.zeros(1, 1).expand(2**20, 2**20))


def test_inputs_of_the_wrong_kind_are_refused():
    with pytest.raises(DsfTypeError, match="input"):
        from_layer(_recurrent("GRU", torch.float32, 1))
