"""torch.nn: attention between sequences of unequal length, the fused path, recurrent cells."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
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
from dsf.errors import DsfFidelityError
from dsf.tracing import from_layer, relative_error, trace

DTYPES = [torch.float32, torch.float64]
VALUE = 7
LENGTHS = [(7, 5), (3, 11), (1, 4), (4, 1)]
"""(queries, keys)"""


def _masks(queries: int, keys: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    hidden = torch.zeros(BATCH, keys, dtype=torch.bool)
    hidden[1, keys // 2 + 1 :] = True
    numbers = random_input(dtype, BATCH * HEADS, queries, keys, seed=3)
    lower = ~torch.ones(queries, keys, dtype=torch.bool).tril()
    return [{}, {"attn_mask": lower}, {"attn_mask": numbers}, {"key_padding_mask": hidden},
            {"attn_mask": lower, "key_padding_mask": hidden}]  # fmt: skip


@pytest.mark.parametrize("dtype", [
    torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": VALUE},
    {"batch_first": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_cross_attention_and_its_map_in_every_option(queries, keys, options, dtype):
    module = attention(dtype, **{"batch_first": True, **options})
    given = [random_input(dtype, BATCH, n, width, seed=i) for i, (n, width) in enumerate(
        [(queries, WIDTH), (keys, module.kdim), (keys, module.vdim)])]  # fmt: skip
    if not module.batch_first:
        given = [x.transpose(0, 1) for x in given]
    for mask, need_weights in itertools.product(_masks(queries, keys, dtype), (False, True)):
        layer = from_layer(module, *given, **mask, need_weights=need_weights)
        assert layer.error <= TOLERANCE[dtype]
        assert isinstance(layer.recurrence, dsf.Recurrence)
        assert (layer.attrs["n_key"], layer.attrs["n_query"]) == (keys, queries)
        output, weights = module.eval()(*given, **mask, average_attn_weights=False)
        assert relative_error(layer.output, output) <= TOLERANCE[dtype]
        found = dsf.materialise(layer.recurrence)[..., keys:, :keys]
        assert relative_error(found, weights[..., :keys]) <= TOLERANCE[dtype]


def test_unbatched_crossattention():
    module = attention(torch.float64)
    query, key = (random_input(torch.float64, n, WIDTH, seed=n) for n in (3, 5))
    layer = from_layer(module, query, key, key)
    assert layer.output.shape == (3, WIDTH)
    assert layer.error <= TOLERANCE[torch.float64]


def test_a_decoder_reads_a_longer_memory():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 16, batch_first=True, dtype=torch.float64)
    decoder = nn.TransformerDecoder(layer, 2).eval()
    target, memory = (random_input(torch.float64, BATCH, n, WIDTH, seed=n) for n in (5, 9))
    found = trace(decoder, {"tgt": target, "memory": memory, "tgt_is_causal": True,
                            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(
                                5, dtype=torch.float64)})  # fmt: skip
    assert [name.rsplit(".", 1)[1] for name in found] == 2 * ["self_attn", "multihead_attn"]
    assert all(t.error <= TOLERANCE[torch.float64] for t in found.values())
    assert ["n_key" in t.attrs for t in found.values()] == 2 * [False, True]


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_path_of_an_encoder_layer_is_put_back_and_gives_the_same(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=True, norm_first=norm_first)
    x, during = random_input(torch.float32, BATCH, 6, WIDTH), []
    with torch.no_grad():
        fused = layer.eval()(x)
    hook = layer.register_forward_hook(lambda m, a, out: during.append(out))
    (found,) = trace(layer, x).values()
    hook.remove()
    assert found.error <= TOLERANCE[torch.float32]
    assert relative_error(during[0], fused) <= TOLERANCE[torch.float32]
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert torch.equal(layer(x), fused)


# -- cells -------------------------------------------------------------------------------------

CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}),
         (nn.RNNCell, {"nonlinearity": "relu"})]  # fmt: skip
UNITS, FEATURES = 7, 5


def _cell(kind: type[nn.RNNCellBase], dtype: torch.dtype, **options) -> nn.RNNCellBase:
    torch.manual_seed(0)
    return kind(FEATURES, UNITS, dtype=dtype, **options)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_cells_with_and_without_batch_bias_and_state(kind, options, bias, dtype):
    cell = _cell(kind, dtype, bias=bias, **options)
    for lead, started in itertools.product(((3,), ()), (False, True)):
        x, h = random_input(dtype, *lead, FEATURES), random_input(dtype, *lead, UNITS, seed=1)
        state = (h, random_input(dtype, *lead, UNITS, seed=2)) if kind is nn.LSTMCell else h
        layer = from_layer(cell, x, state) if started else from_layer(cell, x)
        assert layer.error <= TOLERANCE[dtype]
        assert layer.output.shape == (*lead, UNITS)
        assert layer.system == kind.__name__.removesuffix("Cell").lower()
        assert layer.attrs["mode"] == layer.recurrence.mode == "exact_along_trajectory"


def test_a_cell_in_a_loop_gives_a_trace_for_each_call_that_chain():
    cell = _cell(nn.LSTMCell, torch.float64)
    whole = nn.LSTM(FEATURES, UNITS, batch_first=True, dtype=torch.float64)
    for name, parameter in cell.named_parameters():
        whole.get_parameter(f"{name}_l0").data = parameter.data

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state, out = None, []
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
                out.append(state[0])
            return torch.stack(out, 1)

    x = random_input(torch.float64, 3, 4, FEATURES)
    found = trace(Loop(), x)
    assert list(found) == ["cell", "cell#2", "cell#3", "cell#4"]
    together = torch.stack([layer.output for layer in found.values()], 1)
    assert relative_error(together, whole(x)[0]) <= TOLERANCE[torch.float64]
    state = None
    for layer in found.values():
        r = layer.recurrence
        assert isinstance(r, dsf.Recurrence)
        if state is not None:
            assert r.initial_state is not None
            assert relative_error(r.initial_state, state) <= TOLERANCE[torch.float64]
        _, state = dsf.scan(r, layer.values, return_state=True)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_wrong_weights_of_a_cell_fail_the_gate(kind):
    cell = _cell(kind, torch.float32)
    spoil_after_the_pass(cell, "weight_ih", 1.1)
    with pytest.raises(DsfFidelityError):
        from_layer(cell, random_input(torch.float32, 3, FEATURES))
