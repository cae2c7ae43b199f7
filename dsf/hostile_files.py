"""Refuse an HDF5 file that could read other files, run a plug-in or fill the memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsf.errors import DsfIntegrityError

_PLAIN_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32"}
_MOST_OBJECTS = 10_000


def refuse_hostile(file: Any, name: str, cap: int) -> None:
    """Walk an open h5py file before any data is read; raise DsfIntegrityError on what could harm.

    Refused: links out of the file and soft links, data stored in other files, virtual data sets,
    filters other than HDF5's own, types other than numbers and text, more than 10,000 objects, a
    declared size above `cap` bytes.
    """
    import h5py
    from h5py import h5o  # type: ignore[attr-defined]

    def stop(what: str, path: str) -> None:
        raise DsfIntegrityError(
            f"dsf.results.load: {name}: expected a dsf result, got {what} at {path!r}. The file "
            f"was not used."
        )

    total, count, queue, seen = 0, 0, [("", file)], set()
    while queue:
        path, group = queue.pop()
        for key in group:
            count += 1
            here = f"{path}/{key}"
            if count > _MOST_OBJECTS:
                stop(f"more than {_MOST_OBJECTS} objects", here)
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                stop("a link to elsewhere", here)
            item = group[key]
            address = h5o.get_info(item.id).addr
            if address in seen:
                stop("an object that is linked twice", here)
            seen.add(address)
            if isinstance(item, h5py.Group):
                queue.append((here, item))
                continue
            if not isinstance(item, h5py.Dataset):
                stop("a stored type", here)
            total += _check_dataset(item, here, stop)
            if total > cap:
                stop(f"{total} declared bytes, more than the cap of {cap},", here)


def _check_dataset(item: Any, path: str, stop: Any) -> int:
    """Declared bytes of one data set after its storage, filters and type have been checked."""
    import h5py
    from h5py import h5d  # type: ignore[attr-defined]

    plist = item.id.get_create_plist()
    if plist.get_external_count():
        stop("data stored in another file", path)
    if plist.get_layout() == h5d.VIRTUAL:
        stop("virtual data from other files", path)
    for i in range(plist.get_nfilters()):
        if plist.get_filter(i)[0] not in _PLAIN_FILTERS:
            stop("data behind a plug-in filter", path)
    text = h5py.check_string_dtype(item.dtype) is not None
    if not (text or item.dtype.kind in "biuf"):
        stop(f"values of type {item.dtype}", path)
    return int(np.prod(item.shape or (1,), dtype=object)) * max(item.dtype.itemsize, 1)
