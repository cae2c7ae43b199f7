"""Every message of the core, word for word: what was expected, what came, what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from structures import Draw, recurrence, values_for

import dsf
from dsf import errors

R = recurrence("diagonal")
U = values_for(R)


def _with(values: torch.Tensor, number: float) -> torch.Tensor:
    changed = values.clone()
    changed[0, 0, 0, 0] = number
    return changed


GOLDEN = {
    "system": (
        lambda: dsf.scan("mamba", U), errors.DsfTypeError,
        "dsf.scan: system: expected dsf.Recurrence, Anticausal, Bidirectional or Gated, got "
        "<class 'str'>."),
    "values of another kind": (
        lambda: dsf.scan(R, [1.0]), errors.DsfTypeError,
        "dsf.scan: values: expected torch.Tensor, got <class 'list'>."),
    "integer values": (
        lambda: dsf.scan(R, U.long()), errors.DsfTypeError,
        "dsf.scan: values: expected a floating dtype, got torch.int64. Call .double()."),
    "complex values": (
        lambda: dsf.scan(R.replace(real_output=True), U + 0j), errors.DsfTypeError,
        "dsf.scan: values: expected real values, got torch.complex128; the recurrence takes the "
        "real part (real_output=True). Pass values.real and values.imag one by one."),
    "length of values": (
        lambda: dsf.scan(R, U[:, :5]), errors.DsfShapeError,
        "dsf.scan: values: expected axes (batch=2, time=7, head=3, input=1, channel=any), got "
        "(2, 5, 3, 5); sizes are fixed by the recurrence. The input axis may be left out when it "
        "is 1."),
    "axes of values": (
        lambda: dsf.scan(R, U[0]), errors.DsfShapeError,
        "dsf.scan: values: expected axes (batch=2, time=7, head=3, input=1, channel=any), got "
        "(7, 3, 5); sizes are fixed by the recurrence. The input axis may be left out when it "
        "is 1."),
    "inputs of values": (
        lambda: dsf.scan(recurrence("diagonal", n_input=2), U), errors.DsfShapeError,
        "dsf.scan: values: expected axes (batch=2, time=7, head=3, input=2, channel=any), got "
        "(2, 7, 3, 5); sizes are fixed by the recurrence. The input axis may be left out when it "
        "is 1."),
    "channels of the initial state": (
        lambda: dsf.scan(recurrence("diagonal", initial=4), U), errors.DsfShapeError,
        "dsf.scan: initial_state: expected channel=5, got 4; channel is fixed by the values."),
    "device of values": (
        lambda: dsf.scan(R, U.to("meta")), errors.DsfShapeError,
        "dsf.scan: values: expected on cpu like the recurrence, got meta. Call .to(device)."),
    "NaN in the values": (
        lambda: dsf.scan(R, _with(U, torch.nan)), errors.DsfValueError,
        "dsf.scan: values: expected finite numbers, got 1 NaN or infinite of 210. Pass "
        "allow_nonfinite=True to keep them."),
    "infinity in the values": (
        lambda: dsf.scan(R, _with(U, torch.inf)), errors.DsfValueError,
        "dsf.scan: values: expected finite numbers, got 1 NaN or infinite of 210. Pass "
        "allow_nonfinite=True to keep them."),
    "minus infinity in the values": (
        lambda: dsf.scan(R, _with(U, -torch.inf)), errors.DsfValueError,
        "dsf.scan: values: expected finite numbers, got 1 NaN or infinite of 210. Pass "
        "allow_nonfinite=True to keep them."),
    "NaN in a coefficient": (
        lambda: dsf.scan(R.replace(B=_with(R.B, torch.nan)), U), errors.DsfValueError,
        "dsf.scan: B: expected finite numbers, got 1 NaN or infinite of 168. Pass "
        "allow_nonfinite=True to keep them."),
    "NaN in the gate": (
        lambda: dsf.scan(dsf.Gated(R, torch.full((1, 1, 1, 5), torch.nan)), U),
        errors.DsfValueError,
        "dsf.scan: gate: expected finite numbers, got 5 NaN or infinite of 5. Pass "
        "allow_nonfinite=True to keep them."),
    "shape of a coefficient": (
        lambda: dsf.scan(R.replace(B=torch.ones(2, 7, 3, 8, 1)), U), errors.DsfShapeError,
        "dsf.scan: B: expected axes (batch=2, time=7, head=3, state=4, input=1), got "
        "(2, 7, 3, 8, 1); state is fixed by A."),
    "dtype of a coefficient": (
        lambda: dsf.scan(R.replace(C=R.C.int()), U), errors.DsfTypeError,
        "dsf.scan: C: expected a floating dtype, got torch.int32. Call .double()."),
    "later half of both ways": (
        lambda: dsf.scan(
            dsf.Bidirectional(R, dsf.anticausal(recurrence("dense", length=6))), U),
        errors.DsfShapeError,
        "dsf.scan: values: expected axes (batch=2, time=6, head=3, input=1, channel=any), got "
        "(2, 7, 3, 5); sizes are fixed by the recurrence. The input axis may be left out when it "
        "is 1."),
    "backend": (
        lambda: dsf.scan(R, U, "numpy"), errors.DsfValueError,
        "dsf.scan: backend: expected auto, reference, chunked or triton, got 'numpy'."),
    "chunk": (
        lambda: dsf.scan(R, U, chunk=0), errors.DsfValueError,
        "dsf.scan: chunk: expected a positive length, got 0."),
    "no kernel": (
        lambda: dsf.scan(R, U, "triton"), errors.DsfUnsupportedError,
        "dsf.scan: backend: the kernels need CUDA tensors, the values are on cpu. Use "
        "backend='chunked'."),
    "step of several tokens": (
        lambda: dsf.step(R, U[:, 0]), errors.DsfShapeError,
        "dsf.step: values: expected axes (batch=2, time=7, head=3, input=1, channel=any), got "
        "(2, 1, 3, 5); sizes are fixed by the recurrence. The input axis may be left out when it "
        "is 1."),
    "step backwards": (
        lambda: dsf.step(dsf.anticausal(R), U[:, 0]), errors.DsfTypeError,
        "dsf.step: system: expected a causal dsf.Recurrence, gated or not, got "
        "<class 'dsf.wrappers.Anticausal'>."),
    "step with a NaN": (
        lambda: dsf.step(R.time_slice(0, 1), U[:, 0] * torch.nan), errors.DsfValueError,
        "dsf.step: values: expected finite numbers, got 30 NaN or infinite of 30. Pass "
        "allow_nonfinite=True to keep them."),
    "map of something else": (
        lambda: dsf.materialise(torch.ones(2)), errors.DsfTypeError,
        "dsf.materialise: system: expected dsf.Recurrence, Anticausal, Bidirectional or Gated, "
        "got <class 'torch.Tensor'>."),
    "map with a NaN": (
        lambda: dsf.materialise(R.replace(C=R.C * torch.nan)), errors.DsfValueError,
        "dsf.materialise: C: expected finite numbers, got 168 NaN or infinite of 168. Pass "
        "allow_nonfinite=True to keep them."),
    "map too large": (
        lambda: dsf.materialise(R, max_memory=100), errors.DsfMemoryError,
        "dsf.materialise: map: (batch=2, head=3, query=7, key=7) float64 needs 2.19e-06 GiB, the "
        "cap is 9.31e-08 GiB (max_memory). Ask for a tile with queries= and keys=, or raise "
        "max_memory=."),
    "precision": (
        lambda: R.to(torch.complex64), errors.DsfTypeError,
        "dsf.Recurrence.to: target: expected a real floating dtype, got torch.complex64. Complex "
        "fields take the complex dtype of the same precision."),
    "axis names": (
        lambda: dsf.axes.to_xarray(torch.ones(2), ["tokens"], name="x"), errors.DsfShapeError,
        f"dsf.to_xarray: dims: expected 1 different names out of {dsf.axes.AXES}, got "
        "('tokens',)."),
    "sparse numbers": (
        lambda: dsf.axes.to_numpy(torch.ones(2, 2).to_sparse()), errors.DsfTypeError,
        "dsf.to_numpy: tensor: expected a dense tensor with data, got layout torch.sparse_coo on "
        "cpu. Call .to_dense() or load the data first."),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_messages_word_for_word(case, unchecked):
    call, kind, message = GOLDEN[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
    assert type(caught.value) is kind


def test_nonfinite_numbers_pass_when_asked_for():
    y = dsf.scan(R, _with(U, torch.nan), allow_nonfinite=True)
    assert bool(y[0, :, 0, 0].isnan().all())
    assert bool(y[1].isfinite().all())


PARENTS = {
    errors.DsfValueError: ValueError, errors.DsfShapeError: ValueError,
    errors.DsfTypeError: TypeError, errors.DsfMemoryError: MemoryError,
    errors.DsfIntegrityError: OSError, errors.DsfFidelityError: RuntimeError,
    errors.DsfUnsupportedError: NotImplementedError,
}  # fmt: skip


@pytest.mark.parametrize("kind", PARENTS)
def test_errors_keep_a_standard_parent_and_can_be_copied(kind):
    assert issubclass(kind, PARENTS[kind])
    assert issubclass(kind, errors.DsfError)
    again = copy.deepcopy(kind("what, expected, got"))
    assert type(again) is kind
    assert str(again) == "what, expected, got"


# -- tensor to xarray --------------------------------------------------------------------------


def test_tensors_become_labelled_arrays():
    x = Draw(1).normal(2, 3).requires_grad_()
    array = dsf.axes.to_xarray(x, ["query", "key"], name="x", attrs={"flag": True, "none": None,
                               "nested": {"a": 1}})  # fmt: skip
    assert array.dims == ("query", "key")
    assert array.attrs["flag"] == 1
    assert array.attrs["nested"] == '{"a": 1}'
    assert "none" not in array.attrs
    assert array.attrs["precision"] == "float64"
    half = dsf.axes.to_xarray(x.detach().to(torch.bfloat16), ["query", "key"], name="x")
    assert half.dtype == "float32"
    assert half.attrs["precision"] == "bfloat16"
    turned = torch.complex(x.detach(), x.detach()).conj()
    assert dsf.axes.to_numpy(turned)[0, 0].imag == -float(x.detach()[0, 0])
