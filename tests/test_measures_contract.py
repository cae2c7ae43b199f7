"""Every registered measure on every kind of system: labels, axes, batches, no side effects."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dsf
from dsf.axes import AXES
from dsf.errors import DsfError, DsfTypeError
from dsf.transitions import Dense, Diagonal, Identity, Scalar

MEASURES = dsf.measures.registered()
LENGTH = 7
OF_MAPS = [n for n, f in MEASURES.items() if n not in (
    "injectivity", "local_modulus", "memory_half_life", "survival_steps", "n_state",
    "lyapunov_spectrum", "transition_eigenvalues", "monodromy_eigenvalues", "state_product_norm",
    "stability", "degrees_of_freedom", "token_leverage", "taylor_growth")]  # fmt: skip
OF_SOFTMAX = ("degrees_of_freedom", "token_leverage", "taylor_growth")
"""What only queries and keys have; other systems are refused."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def softmax(causal: bool = True) -> dsf.Recurrence:
    rows = dsf.SoftmaxRows(random(2, LENGTH, 4, 3), random(2, LENGTH, 2, 3, seed=1), causal=causal)
    return dsf.Recurrence(Identity(LENGTH), dsf.OneHot(LENGTH, LENGTH), rows, system="softmax")


def diagonal() -> dsf.Recurrence:
    A = Diagonal(-random(2, LENGTH, 4, 3).abs())
    B, C = random(2, LENGTH, 4, 3, 1, seed=1), random(2, LENGTH, 4, 1, 3, seed=2)
    return dsf.Recurrence(A, B, C, random(1, 1, 4, 1, 1, seed=3), system="diagonal")


def complex_pairs() -> dsf.Recurrence:
    A = Diagonal(-random(1, 1, 4, 3).abs(), phase=random(1, 1, 4, 3, seed=1))
    B = random(1, LENGTH, 4, 3, 1, seed=2, dtype=torch.complex128)
    C = random(1, LENGTH, 4, 1, 3, seed=3, dtype=torch.complex128)
    return dsf.Recurrence(A, B, C, real_output=True, system="complex")


def dense() -> dsf.Recurrence:
    A = Dense(random(1, LENGTH, 4, 3, 3) / 3)
    return dsf.Recurrence(
        A, random(2, LENGTH, 4, 3, 1, seed=1), random(2, LENGTH, 1, 1, 3, seed=2), system="dense"
    )


def single() -> dsf.Recurrence:
    A = Scalar(-random(2, LENGTH, 4).abs().float(), n_state=3)
    return dsf.Recurrence(
        A, random(2, LENGTH, 4, 3, 1, seed=1).float(), random(2, LENGTH, 4, 1, 3, seed=2).float(),
        system="single",
    )  # fmt: skip


SYSTEMS = {
    "softmax": softmax(),
    "encoder": dsf.Bidirectional.from_rows(softmax(causal=False)),
    "diagonal": diagonal(),
    "both ways": dsf.Bidirectional(diagonal(), dsf.anticausal(diagonal(), strict=True)),
    "backwards": dsf.anticausal(diagonal()),
    "gated": dsf.Gated(diagonal(), random(2, LENGTH, 4, 2, seed=4)),
    "complex": complex_pairs(),
    "dense": dense(),
    "float32": single(),
}


def arrays(found: xr.DataArray | xr.Dataset) -> list[xr.DataArray]:
    return [found] if isinstance(found, xr.DataArray) else list(found.data_vars.values())


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_labels_what_it_gives(name: str, system: str) -> None:
    if name in OF_SOFTMAX and system not in ("softmax", "encoder"):
        with pytest.raises(DsfTypeError, match="expected a softmax system"):
            MEASURES[name](SYSTEMS[system])
        return
    found = MEASURES[name](SYSTEMS[system])
    for array in arrays(found):
        assert set(array.dims) <= set(AXES)
        assert array.sizes["head"] == 4
        for key in ("method", "units", "precision", "gauge", "system", "dsf_version", "direction"):
            assert key in array.attrs, key
        assert array.attrs["system"] == dsf.wrappers.core(SYSTEMS[system]).system
        assert array.attrs["precision"] == ("float32" if system == "float32" else "float64")
        for value in array.attrs.values():
            assert isinstance(value, str | int | float)


@pytest.mark.parametrize("name", OF_MAPS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_map_at_hand_gives_the_same_as_its_system(name: str, system: str) -> None:
    found = MEASURES[name](SYSTEMS[system])
    given = MEASURES[name](dsf.attention_map(SYSTEMS[system]))
    assert found.dims == given.dims
    near = {"rtol": 1e-4, "atol": 1e-5} if system == "float32" else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(found.values, given.values, **near)


@pytest.mark.parametrize("name", [n for n in OF_MAPS if "block" in inspect.signature(
    MEASURES[n]).parameters])  # fmt: skip
@pytest.mark.parametrize("system", ["softmax", "gated", "backwards"])
def test_tiles_are_invisible(name: str, system: str) -> None:
    whole = MEASURES[name](SYSTEMS[system]).values
    for block in (4, LENGTH + 3):
        np.testing.assert_allclose(
            MEASURES[name](SYSTEMS[system], block=block).values, whole, rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("name", MEASURES)
def test_a_sample_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    r = diagonal()
    alone = r.replace(A=r.A.map_tensors(lambda x: x[1:]), B=r.B[1:], C=r.C[1:])
    if name in OF_SOFTMAX:
        r = softmax()
        alone = r.replace(C=dsf.SoftmaxRows(r.C.query[1:], r.C.key[1:]))
    for a, b in zip(arrays(MEASURES[name](r)), arrays(MEASURES[name](alone)), strict=True):
        if "batch" in a.dims and a.dtype.kind == "f":
            np.testing.assert_allclose(a.values[1:], b.values, rtol=1e-10, atol=1e-13)


def test_token_coordinates_are_kept() -> None:
    labelled = dsf.attention_map(softmax(), tokens=[f"t{i}" for i in range(LENGTH)])
    assert list(dsf.measures.row_sum(labelled).query_token.values)[:2] == ["t0", "t1"]


def test_a_time_invariant_system_needs_only_a_length() -> None:
    r = dsf.Recurrence(
        Diagonal(-random(1, 1, 2, 3).abs()), random(1, 1, 2, 3, 1), random(1, 1, 2, 1, 3)
    )
    spread = r.replace(B=r.B.expand(-1, 20, -1, -1, -1))
    for name in ("row_sum", "epsilon_rank", "effective_rank", "effective_horizon"):
        a, b = MEASURES[name](r, length=20), MEASURES[name](spread)
        np.testing.assert_allclose(a.values, b.values, rtol=1e-12)
    assert int(dsf.measures.injectivity(r, length=20).verdict[0, 0, 0]) == 1


def test_other_things_are_refused_by_name() -> None:
    for name, measure in MEASURES.items():
        with pytest.raises(TypeError, match=r"expected a dsf system|Type-check error"):
            measure(np.zeros((3, 3)))
        with pytest.raises((DsfTypeError, TypeError)):
            measure(None)
        assert name in dir(dsf.measures)


def test_a_new_measure_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peaks.py").write_text(
        "from dsf.measures._maps import open_map, whole_map\n"
        "__all__ = ['peak']\n"
        "def peak(system):\n"
        "    source = open_map(system)\n"
        "    return source.result(whole_map(source).amax((-2, -1)), (), 'peak', units='1')\n"
        "MEASURES = (peak,)\n"
    )
    monkeypatch.setattr(dsf.measures, "__path__", [*dsf.measures.__path__, str(tmp_path)])
    assert "peak" in dsf.measures.registered()
    found = dsf.measures.peak(softmax())
    assert found.values.max() == 1
    assert found.attrs["system"] == "softmax"
    sys.modules.pop("dsf.measures.peaks")


def test_an_unknown_measure_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = dsf.measures.colour


def test_memory_is_refused_before_it_is_taken() -> None:
    """Outputs by channel have no sketch: the whole map, which does not fit."""
    far = dsf.Recurrence(Identity(2), random(1, 400_000, 1, 2, 1), random(1, 1, 1, 1, 2))
    far = dsf.Gated(far, torch.ones(1, 1, 1, 2, dtype=torch.float64).expand(1, 400_000, 1, 2))
    for name in ("effective_rank", "stable_rank"):
        with pytest.raises(DsfError, match="GiB"):
            MEASURES[name](far)


def test_the_measures_load_nothing_heavy() -> None:
    code = (
        "import dsf.measures, sys; dsf.measures.registered();"
        "print([m for m in ('matplotlib', 'triton', 'transformers', 'h5netcdf', 'sympy') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_function_hides_behind_its_module() -> None:
    """`dsf.measures.principles` is the function: files have names of their own."""
    names = [name for module in dsf.measures._modules() for name in module.__all__]
    assert len(names) == len(set(names))
    for name in names:
        assert not inspect.ismodule(getattr(dsf.measures, name)), name
