"""Result files: netCDF written whole or not at all, sealed with a hash that reading checks."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xarray as xr

from dsf.errors import DsfIntegrityError, DsfTypeError, DsfUnsupportedError
from dsf.hostile_files import refuse_hostile
from dsf.memory import FREE_SHARE, available_bytes
from dsf.netcdf import content_hash, decode, encode
from dsf.result_files import (
    checked_bytes,
    exists_error,
    mismatch_error,
    publish,
    seal,
    sweep_once,
    sweep_orphans,
    sync_folder,
    temporary_name,
)

__all__ = ["Result", "completed", "load", "save", "sweep_orphans"]

Result = xr.DataArray | xr.Dataset | xr.DataTree
"""What can be saved."""

_LOCK = threading.RLock()  # HDF5 crashes when two threads enter it


def save(
    data: Result, path: str | os.PathLike[str], *, overwrite: bool = False, sweep: bool = True
) -> Path:
    """Write a result to a netCDF file that exists whole or not at all, and return its path.

    Written to a temporary name in the same folder, synced, sealed with the blake2b hash of its
    bytes (after the HDF5 part, which other readers ignore) beside a `content_hash` in attrs,
    renamed, and the folder synced: once this returns, the file survives the death of the process,
    and of the machine as far as the disk honours a sync. Values, dims, coordinates, attrs come
    back from `load` bit for bit, complex numbers, NaN payloads, None and nested attrs included.

    Parameters
    ----------
    data: DataArray, Dataset or DataTree. Lazy data is computed.
    path: where; the folder must exist.
    overwrite: replace an existing file; otherwise it is refused and left as it is.
    sweep: on the first save into a folder remove temporary files of writers that have died.

    Raises DsfUnsupportedError without the `io` extra, DsfTypeError on what netCDF cannot hold,
    DsfValueError if the file is there, OSError (disk full, read-only) with the old file intact.
    """
    _require_h5netcdf("save")
    target = Path(path)
    groups, attrs = _groups(data)
    encoded = {name: encode(group) for name, group in groups.items()}
    encoded["/"].attrs.update(attrs)
    encoded["/"].attrs["content_hash"] = content_hash(encoded)
    if not overwrite and target.exists():
        raise exists_error(target)
    if sweep:
        sweep_once(target.parent)
    temporary = target.parent / temporary_name(target.name)
    try:
        with _LOCK:
            _write_groups(temporary, encoded)
        seal(temporary)
        publish(temporary, target, overwrite)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)
    return target


def load(path: str | os.PathLike[str], *, max_memory: int | None = None) -> Any:
    """The result that `save` wrote: DataArray, Dataset or DataTree, in memory.

    The seal is checked over the whole file before anything is parsed, then every object is
    checked before its data is read: files that link or store data elsewhere, ask for plug-in
    filters, hold objects, or declare more than `max_memory` bytes (default 80 % of what is free)
    are refused; nothing in a file is ever run. Last, the content hash is checked.

    Raises DsfUnsupportedError without the `io` extra; FileNotFoundError; DsfIntegrityError, which
    names the file with the hash expected and found, on damage and on files dsf did not write.
    """
    _require_h5netcdf("load")
    source = Path(path)
    cap = int(FREE_SHARE * available_bytes()) if max_memory is None else max_memory
    raw = checked_bytes(source, cap)
    import h5py

    with _LOCK, _one_file(source, raw) as memory:
        with h5py.File(memory, "r") as file:
            refuse_hostile(file, source.name, cap)
            names = ["/", *_group_names(file)]
        encoded = {name: _read_group(memory, name) for name in names}
    found, expected = content_hash(encoded), encoded["/"].attrs.get("content_hash")
    if found != expected:
        raise mismatch_error(source, str(expected), found)
    return _result(encoded)


def completed(path: str | os.PathLike[str]) -> bool:
    """Whether a whole, undamaged result is there: what a resumed run may skip.

    The hash decides, not the file's existence, so that a truncated or altered file counts as not
    done. Cost: one reading of the file.
    """
    try:
        checked_bytes(Path(path), None)
    except (DsfIntegrityError, FileNotFoundError, NotADirectoryError):
        return False
    return True


# -- writing -----------------------------------------------------------------------------------


def _groups(data: Result) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """Datasets by group path, and what tells `load` how to put them together."""
    if isinstance(data, xr.DataArray):
        name = "data" if data.name is None else str(data.name)
        if name in data.coords:
            name = "data"
        own = {"dsf_kind": "DataArray", "dsf_array": name}
        if data.name is not None:
            own["dsf_name"] = str(data.name)
        bare = data.rename(name).to_dataset() if name != data.name else data.to_dataset()
        return {"/": bare}, own
    if isinstance(data, xr.Dataset):
        return {"/": data}, {"dsf_kind": "Dataset"}
    if isinstance(data, xr.DataTree):
        nodes = {node.path: node.to_dataset(inherit=False) for node in data.subtree}
        return nodes, {"dsf_kind": "DataTree"}
    raise DsfTypeError(
        f"dsf.results.save: data: expected an xarray DataArray, Dataset or DataTree, got "
        f"{type(data)}. Tensors go to safetensors."
    )


def _write_groups(path: Path, groups: dict[str, xr.Dataset]) -> None:
    mode = "w"
    for name, dataset in groups.items():
        dataset.to_netcdf(path, mode=mode, engine="h5netcdf", group=None if name == "/" else name)  # type: ignore[call-overload]
        mode = "a"


# -- reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_file(path: Path, raw: bytes) -> Iterator[io.BytesIO]:
    """The checked bytes as a file; what HDF5 cannot parse is an integrity error too."""
    try:
        yield io.BytesIO(raw)
    except DsfIntegrityError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected a netCDF file, got one that cannot be read "
            f"({type(error).__name__}). The file was not used."
        ) from error


def _group_names(file: Any) -> list[str]:
    import h5py

    names: list[str] = []
    file.visititems(
        lambda name, item: names.append(f"/{name}") if isinstance(item, h5py.Group) else None
    )
    return names


def _read_group(memory: io.BytesIO, name: str) -> xr.Dataset:
    memory.seek(0)
    with xr.open_dataset(
        memory, engine="h5netcdf", group=None if name == "/" else name, mask_and_scale=False,
        decode_times=False, decode_timedelta=False, concat_characters=False, cache=False,
    ) as opened:  # fmt: skip
        return opened.load()


def _result(encoded: dict[str, xr.Dataset]) -> Result:
    attrs = encoded["/"].attrs
    kind, name = attrs.pop("dsf_kind", "Dataset"), attrs.pop("dsf_array", None)
    own_name = attrs.pop("dsf_name", None)
    attrs.pop("content_hash", None)
    groups = {path: decode(dataset) for path, dataset in encoded.items()}
    if kind == "DataTree":
        return xr.DataTree.from_dict(groups)
    root = groups["/"]
    return root[name].rename(own_name) if kind == "DataArray" else root


# -- messages ----------------------------------------------------------------------------------


def _require_h5netcdf(function: str) -> None:
    try:
        import h5netcdf  # noqa: F401
    except ImportError:
        raise DsfUnsupportedError(
            f"dsf.results.{function}: expected the extra `io` (h5netcdf), got none installed. Run "
            f"pip install 'dsf-torch[io]'."
        ) from None
