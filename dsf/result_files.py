"""Files that exist whole or not at all: temporary names, seals, renames, orphans."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

from dsf.errors import DsfIntegrityError, DsfValueError

_SEAL = b"\ndsf-blake2b:"
_SEAL_BYTES = len(_SEAL) + 32
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PICKLES = (b"\x80", b"PK\x03\x04", b"\x93NUMPY")
_TEMPORARY = re.compile(r"^\..*\.dsf-([0-9a-f]{8})-(\d+)-[0-9a-f]+\.tmp$")
_SWEPT: set[tuple[int, Path]] = set()


def sweep_orphans(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files of writers on this machine that have died; returns their paths.

    Those of living processes and of other machines that share the folder are left alone.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()):
        found = _TEMPORARY.match(path.name)
        if found and found[1] == _machine() and not _alive(int(found[2])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def seal(path: Path) -> None:
    """Append the blake2b hash of a file's bytes to it, and sync it to the disk."""
    with path.open("r+b") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(2**20):
            digest.update(block)
        file.write(_SEAL + digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename; without `overwrite` by a hard link, which fails if the name has been taken since."""
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise exists_error(target) from None
    except OSError:  # a file system without hard links
        if target.exists():
            raise exists_error(target) from None
        os.replace(temporary, target)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(name: str) -> str:
    """A hidden name that says whose it is: machine and process, so that orphans can be told."""
    return f".{name[:100]}.dsf-{_machine()}-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def _machine() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sweep_once(folder: Path) -> None:
    """`sweep_orphans` at a process's first write into a folder."""
    key = (os.getpid(), folder.resolve())
    if key not in _SWEPT:
        sweep_orphans(folder)
        _SWEPT.add(key)


def checked_bytes(path: Path, cap: int | None) -> bytes:
    """The HDF5 part of a sealed file, read once and only if the seal holds."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected a regular file, got a link or a folder. "
            f"Pass the real path."
        )
    size = path.stat().st_size
    if cap is not None and size > cap:
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected at most {cap} bytes, got {size}. Raise "
            f"max_memory= if you trust it."
        )
    raw = path.read_bytes()
    if raw.startswith(_PICKLES):
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected netCDF, got a pickle, an archive or a NumPy "
            f"file. Pickles can run code; dsf does not open them."
        )
    if not raw.startswith(_HDF5):
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected a netCDF file written by dsf, got something "
            f"else or its first bytes are damaged. The file was not used."
        )
    body, tail = raw[:-_SEAL_BYTES], raw[-_SEAL_BYTES:]
    if not tail.startswith(_SEAL):
        raise DsfIntegrityError(
            f"dsf.results.load: {path.name}: expected a seal at the end, got none: the file is "
            f"cut short, or dsf did not write it. Rerun what made it."
        )
    found = hashlib.blake2b(body, digest_size=16).hexdigest()
    if tail[len(_SEAL) :] != found.encode():
        raise mismatch_error(path, tail[len(_SEAL) :].decode(errors="replace"), found)
    return body


def exists_error(path: Path) -> DsfValueError:
    """What to raise where a file is in the way."""
    return DsfValueError(
        f"dsf.results.save: path: expected a new file, got {path.name}, which exists. Pass "
        f"overwrite=True to replace it."
    )


def mismatch_error(path: Path, expected: str, found: str) -> DsfIntegrityError:
    """What to raise where the content has another hash than the seal says."""
    return DsfIntegrityError(
        f"dsf.results.load: {path.name}: expected hash {expected[:32]}, got {found}. The file is "
        f"damaged and was not used; rerun what made it."
    )
