"""What netCDF can hold and what dsf results hold: encoding and decoding, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from dsf.errors import DsfTypeError

KIND = "dsf_encoding"
"""Attr of a variable whose stored form differs: complex64, bool, text, datetime64[ns], ..."""
JSON_ATTRS = "dsf_json_attrs"
"""Attr that lists the attrs stored as JSON text."""

_TAKEN = (
    "_FillValue", "missing_value", "scale_factor", "add_offset", "coordinates", "dtype", "CLASS",
    "NAME", "REFERENCE_LIST", "DIMENSION_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates",
    "_nc3_strict", "_NCProperties", "_Unsigned", "grid_mapping", "content_hash", "dsf_kind",
    "dsf_array", "dsf_name", KIND, JSON_ATTRS,
)  # fmt: skip
"""Attr names that netCDF or this module use themselves; a result's own are stored beside them."""
_OWN = "dsf_own_"
_HALF = {8: np.float32, 16: np.float64}


# -- encoding ----------------------------------------------------------------------------------


def encode(dataset: xr.Dataset) -> xr.Dataset:
    """The same dataset in types that every netCDF reader knows, bit for bit recoverable.

    complex: a last dim `complex` of size 2 (real, imaginary); bool: uint8; text: JSON-escaped (so
    newline, zero byte and unpaired surrogates survive); dates: int64; attrs other than plain str,
    int and float: JSON text. `zlib` and `complevel` in a variable's encoding are kept, for arrays
    that are mostly padding. Raises DsfTypeError on objects, multi-indexes and names with "/".
    """
    variables = {}
    part = "complex" if "complex" not in dataset.dims else "complex_part"
    for name, variable in dataset.variables.items():
        _check_name(str(name))
        if isinstance(dataset.indexes.get(name), _multi_index()):
            raise DsfTypeError(
                f"dsf.results.save: {name}: expected a plain index, got a multi-index. Call "
                f".reset_index({str(name)!r})."
            )
        data, kind = _encode_values(str(name), np.asarray(variable.values))
        dims = (*variable.dims, part) if kind.startswith("complex") else variable.dims
        attrs = encode_attrs(variable.attrs)
        attrs |= {KIND: kind} if kind else {}
        packed = {k: variable.encoding[k] for k in ("zlib", "complevel") if k in variable.encoding}
        variables[name] = xr.Variable(dims, data, attrs, encoding={"_FillValue": None, **packed})
    plain = xr.Dataset(attrs=encode_attrs(dataset.attrs))
    coords = {n: v for n, v in variables.items() if n in dataset.coords}
    plain = plain.assign_coords(coords) if coords else plain
    return plain.assign({n: v for n, v in variables.items() if n not in dataset.coords})


def decode(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset that `encode` was given."""
    variables, coords = {}, {}
    for name, variable in dataset.variables.items():
        attrs = dict(variable.attrs)
        kind = attrs.pop(KIND, "")
        values = _decode_values(np.asarray(variable.values), kind)
        dims = variable.dims[:-1] if kind.startswith("complex") else variable.dims
        target = coords if name in dataset.coords else variables
        target[name] = xr.Variable(dims, values, decode_attrs(attrs))
    return xr.Dataset(variables, coords, decode_attrs(dataset.attrs))


def _multi_index() -> type:
    import pandas

    return pandas.MultiIndex


def _check_name(name: str) -> None:
    if not name or "/" in name or "\0" in name or name != name.strip() or not _is_plain(name):
        raise DsfTypeError(
            f"dsf.results.save: name: expected text without '/', got {name!r}; netCDF cannot hold "
            f"it."
        )


def _encode_values(name: str, values: np.ndarray) -> tuple[np.ndarray, str]:
    kind = values.dtype.kind
    if kind in "iuf" and values.dtype.itemsize <= 8:
        return values, "" if values.dtype.isnative else str(values.dtype)
    if kind == "c" and values.dtype.itemsize <= 16:
        parts = np.ascontiguousarray(values)[..., None].view(_HALF[values.dtype.itemsize])
        return parts.reshape(*values.shape, 2), str(values.dtype)
    if kind == "b":
        return values.astype(np.uint8), "bool"
    if kind in "mM":
        return values.astype(values.dtype.newbyteorder("=")).view(np.int64), str(values.dtype)
    if kind == "U" or (kind == "O" and all(isinstance(x, str) for x in values.flat)):
        escaped = np.array([json.dumps(str(x))[1:-1] for x in values.flat], dtype=object)
        return escaped.reshape(values.shape), "text" if kind == "U" else "object text"
    raise DsfTypeError(
        f"dsf.results.save: {name}: expected numbers, booleans, dates or text, got dtype "
        f"{values.dtype}. Objects are not stored."
    )


def _decode_values(values: np.ndarray, kind: str) -> np.ndarray:
    if not kind:
        return values
    if kind.startswith("complex"):
        return np.ascontiguousarray(values).view(kind).reshape(values.shape[:-1])
    if kind == "bool":
        return values.astype(bool)
    if kind in ("text", "object text"):
        texts = [json.loads(f'"{_as_text(x)}"') for x in values.flat]
        dtype = np.str_ if kind == "text" else object
        return np.array(texts, dtype=dtype).reshape(values.shape)
    if kind.startswith(("datetime64", "timedelta64")):
        return values.astype(np.int64).view(kind)
    return values.astype(kind)


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# -- attrs -------------------------------------------------------------------------------------


def encode_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Plain str, int and float as they are; everything else as JSON text, listed in one attr."""
    out: dict[str, Any] = {}
    as_json = []
    for name, value in attrs.items():
        key = str(name)
        _check_name(key)
        if key in _TAKEN or key.startswith(_OWN):
            key = _OWN + key
        plain = _plain(value)
        if plain is None:
            plain = json.dumps(_tagged(key, value))
            as_json.append(key)
        out[key] = plain
    if as_json:
        out[JSON_ATTRS] = json.dumps(as_json)
    return out


def decode_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """What `encode_attrs` was given, NumPy scalars as Python ones."""
    own = {str(n): v.item() if isinstance(v, np.generic) else v for n, v in attrs.items()}
    as_json = json.loads(own.pop(JSON_ATTRS, "[]"))
    return {
        n.removeprefix(_OWN): _untagged(json.loads(v)) if n in as_json else v
        for n, v in own.items()
    }


def _plain(value: Any) -> Any:
    """The value in netCDF's own types, or None if it has no faithful form there."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, str):
        return str(value) if value and _is_plain(value) else None
    if isinstance(value, int | np.integer):
        return np.int64(value) if -(2**63) <= int(value) < 2**63 else None
    if isinstance(value, float | np.floating):
        return np.float64(value)
    return None


def _is_plain(text: str) -> bool:
    if "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tagged(name: str, value: Any) -> Any:
    """JSON that remembers tuples, complex numbers, arrays and keys that are no text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return {"__array__": str(value.dtype), "values": _tagged(name, value.tolist())}
    if isinstance(value, np.generic):
        return _tagged(name, value.item())
    if isinstance(value, complex):
        return {"__complex__": [value.real, value.imag]}
    if isinstance(value, list):
        return [_tagged(name, v) for v in value]
    if isinstance(value, tuple):
        return {"__tuple__": [_tagged(name, v) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"__dict__": {k: _tagged(name, v) for k, v in value.items()}}
    raise DsfTypeError(
        f"dsf.results.save: attrs: {name}: expected text, numbers, None or lists and dicts of "
        f"them, got {type(value)}."
    )


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        return np.array(_untagged(value["values"]), dtype=value["__array__"])
    if "__complex__" in value:
        return complex(*value["__complex__"])
    if "__tuple__" in value:
        return tuple(_untagged(value["__tuple__"]))
    return {k: _untagged(v) for k, v in value["__dict__"].items()}


# -- content -----------------------------------------------------------------------------------


def content_hash(groups: Mapping[str, xr.Dataset]) -> str:
    """blake2b of names, dims, dtypes, values and attrs of encoded datasets, order-free."""
    digest = hashlib.blake2b(digest_size=16)

    def add(text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)

    for path in sorted(groups):
        dataset = groups[path]
        add(path)
        add(_attr_text(dataset.attrs))
        for name in sorted(map(str, dataset.variables)):
            variable = dataset.variables[name]
            values = np.asarray(variable.values)
            add(f"{name} {name in dataset.coords} {variable.dims} {values.shape}")
            add(_attr_text(variable.attrs))
            if values.dtype.kind in "OUS":
                for x in values.flat:
                    add(_as_text(x))
            else:
                little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
                add(little.dtype.str)
                digest.update(little.tobytes())
    return digest.hexdigest()


def _attr_text(attrs: Mapping[Any, Any]) -> str:
    plain = {str(n): v.item() if isinstance(v, np.generic) else v for n, v in attrs.items()}
    return json.dumps({n: v for n, v in plain.items() if n != "content_hash"}, sort_keys=True)
