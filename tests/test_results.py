"""Result files: round trips bit for bit, damage and hostile files refused."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dsf
from dsf import results
from dsf.errors import DsfIntegrityError, DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.result_files import seal

h5py = pytest.importorskip("h5py", reason="the io extra")

N_DAMAGED = 100
STRANGE_NAN = np.array([0x7FF8000000000123], dtype=np.uint64).view(np.float64)[0]
STRANGE_TEXT = ["line\nbreak\t", "zero\0byte", "lone \ud800 surrogate", '"\\é日', ""]


def everything() -> xr.Dataset:
    key = {"key": np.arange(5), "key_token": ("key", STRANGE_TEXT)}
    return xr.Dataset(
        {
            "wide": (("head", "key"), np.array([[1 + 2j, complex(-0.0, STRANGE_NAN), 0, 1j, -1]])),
            "narrow": ("head", np.array([1 - 1j], np.complex64)),
            "flag": ("key", [True, False, True, True, False]),
            "half": ("key", np.array([1, -0.0, np.inf, 1e-7, np.nan], np.float16)),
            "real": ("key", np.array([STRANGE_NAN, -0.0, 5e-324, np.inf, 1.0])),
            "single": ("key", np.arange(5, dtype=np.float32)),
            "date": ("key", np.array(["2026-01-01"] * 4 + ["NaT"], "datetime64[ns]")),
            "large": ("key", np.array([2**63, 1, 2, 3, 4], np.uint64)),
            "swapped": ("key", np.arange(5, dtype=">f8")),
            "empty": (("nothing", "key"), np.zeros((0, 5))),
            "scalar": ((), np.int8(-3)),
        },
        coords=key,
        attrs={
            "none": None, "yes": True, "nested": {"x": [1, 2.5, None, (1, 2)], "y": 3j},
            "count": 3, "number": 0.1, "text": "été", "blank": "", "lone": "\udfff",
            "big": 2**80, "units": "days since 2000-01-01", "coordinates": "mine",
            "_FillValue": 7.0, "content_hash": "mine too",
        },
    )  # fmt: skip


def assert_same(a: xr.Dataset, b: xr.Dataset) -> None:
    assert list(a.data_vars) == list(b.data_vars)
    assert set(a.coords) == set(b.coords)
    for name in a.variables:
        x, y = a[name], b[name]
        assert (x.dims, x.dtype, x.shape) == (y.dims, y.dtype, y.shape), name
        assert x.values.tobytes() == y.values.tobytes(), name
        assert x.attrs == y.attrs
    assert a.attrs == b.attrs
    assert [type(v) for v in a.attrs.values()] == [type(v) for v in b.attrs.values()]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sealed") / "good.nc"
    return results.save(everything(), path).read_bytes()


def test_a_dataset_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = results.save(everything(), tmp_path / "all.nc")
    assert_same(everything(), results.load(path))
    assert os.listdir(tmp_path) == ["all.nc"]
    assert results.completed(path)


@pytest.mark.parametrize("name", ["wide", "key_token", None])
def test_an_array_comes_back_with_its_name(tmp_path: Path, name: str | None) -> None:
    array = everything()[name or "real"].rename(name)
    back = results.load(results.save(array, tmp_path / "array.nc"))
    assert isinstance(back, xr.DataArray)
    assert back.identical(array)
    assert back.name == name


def test_a_tree_comes_back(tmp_path: Path) -> None:
    full = everything()
    tree = xr.DataTree.from_dict({"/": full[["wide"]], "/maps": full[["real"]], "/maps/deep":
                                  full[["flag"]].drop_vars("key_token")})  # fmt: skip
    back = results.load(results.save(tree, tmp_path / "tree.nc"))
    assert isinstance(back, xr.DataTree)
    assert back.identical(tree)


def test_measures_survive_the_file(tmp_path: Path) -> None:
    q = torch.randn(1, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = dsf.Recurrence(dsf.transitions.Identity(6), dsf.OneHot(6, 6), dsf.SoftmaxRows(q, q))
    for i, measure in enumerate(dsf.measures.registered().values()):
        found = measure(r)
        assert results.load(results.save(found, tmp_path / f"{i}.nc")).identical(found)


def test_other_readers_open_the_file(tmp_path: Path) -> None:
    path = results.save(everything()[["single", "real"]], tmp_path / "open.nc")
    with xr.open_dataset(path, engine="h5netcdf") as opened:
        assert np.array_equal(opened["single"].values, np.arange(5, dtype=np.float32))


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = results.save(everything(), tmp_path / "one.nc")
    before = path.read_bytes()
    with pytest.raises(DsfValueError, match=r"one\.nc, which exists"):
        results.save(everything()[["scalar"]], path)
    assert path.read_bytes() == before
    results.save(everything()[["scalar"]], path, overwrite=True)
    assert list(results.load(path).data_vars) == ["scalar"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results.save(everything(), tmp_path / "kept.nc")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.save(everything()[["scalar"]], path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["kept.nc"]


@pytest.mark.parametrize("value", [object(), {1, 2}, {1: "x"}])
def test_attrs_without_a_faithful_form_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DsfTypeError, match=r"attrs: odd: expected"):
        results.save(xr.Dataset(attrs={"odd": value}), tmp_path / "x.nc")
    assert not list(tmp_path.iterdir())


def test_objects_and_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DsfTypeError, match="Objects are not stored"):
        results.save(xr.Dataset({"o": ("x", np.array([{}], dtype=object))}), tmp_path / "x.nc")
    with pytest.raises(TypeError, match=r"Tensors go to safetensors|Type-check error"):
        results.save(torch.zeros(2), tmp_path / "x.nc")  # type: ignore[arg-type]


# -- damage ------------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path: Path, sealed: bytes) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.nc"
    for size in [0, 1, 8, len(sealed) - 1, *rng.integers(9, len(sealed), N_DAMAGED)]:
        path.write_bytes(sealed[:size])
        assert not results.completed(path)
        with pytest.raises(DsfIntegrityError, match=r"cut\.nc"):
            results.load(path)


def test_every_flipped_bit_is_refused(tmp_path: Path, sealed: bytes) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "flip.nc"
    for place in rng.integers(0, 8 * len(sealed), N_DAMAGED):
        raw = bytearray(sealed)
        raw[place // 8] ^= 1 << (place % 8)
        path.write_bytes(raw)
        assert not results.completed(path)
        with pytest.raises(DsfIntegrityError, match=r"flip\.nc"):
            results.load(path)


def test_the_content_hash_stands_when_the_seal_was_renewed(tmp_path: Path) -> None:
    path = results.save(everything()[["single"]], tmp_path / "resealed.nc")
    path.write_bytes(path.read_bytes()[:-45])
    with h5py.File(path, "r+") as file:
        file["single"][0] = 17
    seal(path)
    assert results.completed(path)
    with pytest.raises(DsfIntegrityError, match=r"resealed\.nc: expected hash [0-9a-f]{32}"):
        results.load(path)


def test_a_missing_file_is_not_completed(tmp_path: Path) -> None:
    assert not results.completed(tmp_path / "none.nc")
    with pytest.raises(FileNotFoundError):
        results.load(tmp_path / "none.nc")


# -- hostile files -----------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["DSF_CANARY"],)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_are_refused_and_not_run(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("DSF_CANARY", str(canary))
    path = tmp_path / "model.nc"
    path.write_bytes(pickle.dumps(Payload(), protocol))
    with pytest.raises(DsfIntegrityError, match=r"model\.nc: expected"):
        results.load(path)
    path.write_bytes(b"PK\x03\x04" + pickle.dumps(Payload(), protocol))
    with pytest.raises(DsfIntegrityError, match="archive"):
        results.load(path)
    assert not canary.exists()


def hostile(path: Path, kind: str) -> Path:
    with h5py.File(path, "w") as file:
        if kind == "external":
            secret = path.parent / "secret.txt"
            secret.write_bytes(b"private bytes here")
            file.create_dataset("x", (18,), "u1", external=[(str(secret), 0, 18)])
        elif kind == "link":
            file["x"] = h5py.ExternalLink("other.nc", "/x")
        elif kind == "soft":
            file["x"] = h5py.SoftLink("/y")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3,), "f8")
            layout[:] = h5py.VirtualSource("other.nc", "x", (3,))
            file.create_virtual_dataset("x", layout)
        elif kind == "bomb":
            file.create_dataset("x", (2**44,), "f8", chunks=(2**10,))
        elif kind == "reference":
            file.create_dataset("x", (1,), h5py.ref_dtype)
        elif kind == "compound":
            file.create_dataset("x", (1,), np.dtype([("a", "f8"), ("b", "i4")]))
        elif kind == "loop":
            file.create_group("x")
            file["x/again"] = file["x"]
    seal(path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("external", "another file"), ("link", "link to elsewhere"), ("soft", "link to elsewhere"),
        ("virtual", "virtual data"), ("bomb", "declared bytes"), ("reference", "type object"),
        ("compound", "type"), ("loop", "linked twice"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_before_data(tmp_path: Path, kind: str, said: str) -> None:
    path = hostile(tmp_path / "bad.nc", kind)
    with pytest.raises(DsfIntegrityError, match=said):
        results.load(path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    path = results.save(everything(), tmp_path / "real.nc")
    (tmp_path / "link.nc").symlink_to(path)
    with pytest.raises(DsfIntegrityError, match="a link or a folder"):
        results.load(tmp_path / "link.nc")


def test_a_file_above_the_cap_is_refused(tmp_path: Path) -> None:
    path = results.save(everything(), tmp_path / "big.nc")
    with pytest.raises(DsfIntegrityError, match="at most 1000 bytes"):
        results.load(path, max_memory=1000)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(DsfUnsupportedError, match=r"dsf-torch\[io\]"):
        results.save(everything(), tmp_path / "x.nc")
