"""The weights that a trace runs on, compared with those of the checkpoint they came from."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsf.adapters._selection import Chosen, listed
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError

Checkpoint = Mapping[str, Tensor] | str | Path
"""Tensors by name, a safetensors file, or a folder of them."""


def compare_weights(checkpoint: Checkpoint | None, layers: Chosen) -> None:
    """Raise unless every parameter and saved buffer of the layers is the checkpoint's own.

    Equal means bit for bit after the checkpoint's tensor is cast to the weight's dtype. Names may
    differ by a prefix ("model."), in either direction. Nothing is compared without a checkpoint.
    Raises DsfValueError with the names of those that differ in shape or value or are not in the
    checkpoint and the largest absolute difference, and for a file of another kind; DsfTypeError
    for what is neither tensors nor a path. Cost: one reading of these layers' tensors.
    """
    if checkpoint is None:
        return
    if not isinstance(checkpoint, Mapping | str | Path):
        raise DsfTypeError(
            f"dsf.trace: checkpoint: expected a mapping of tensors or a path, got "
            f"{type(checkpoint).__name__}."
        )
    faults: list[str] = []
    worst = 0.0
    with _opened(checkpoint) as tensors:
        for path, (module, _) in layers.items():
            for name, weight in module.state_dict(prefix=f"{path}." if path else "").items():
                if not isinstance(weight, Tensor):  # extra state
                    continue
                saved = _named(tensors, name)
                if saved is None:
                    faults.append(f"{name} (not in the checkpoint)")
                elif saved.shape != weight.shape:
                    faults.append(f"{name} ({tuple(weight.shape)}, saved {tuple(saved.shape)})")
                else:
                    difference = _difference(weight, saved)
                    worst = max(worst, difference)
                    if difference > 0:
                        faults.append(f"{name} ({difference:.3g})")
    if faults:
        raise DsfValueError(
            f"dsf.trace: checkpoint: expected the weights of the traced layers to be those of the "
            f"checkpoint, got {len(faults)} that are not: {listed(faults)}; the largest "
            f"difference is {worst:.3g}. Some releases make A_log and dt_bias anew after loading: "
            f"copy the checkpoint's tensors into the model. Weights that were renamed, joined or "
            f"quantised on loading cannot be compared."
        )


def _difference(weight: Tensor, saved: Tensor) -> float:
    """Largest absolute difference in the weight's dtype; infinite where one alone is NaN."""
    found, expected = weight.detach().cpu(), saved.cpu().to(weight.dtype)
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    wide = torch.complex128 if found.is_complex() else torch.float64
    apart = (found[~same].to(wide) - expected[~same].to(wide)).abs()
    return float(apart.nan_to_num(nan=torch.inf).max())


class _Names:
    """The tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self) -> None:
        self.readers: dict[str, Callable[[], Tensor]] = {}


def _named(tensors: _Names, name: str) -> Tensor | None:
    """The tensor of that name, or of the one name that differs from it by a prefix."""
    reader = tensors.readers.get(name)
    if reader is None:
        found = [
            key for key in tensors.readers
            if key.endswith(f".{name}") or name.endswith(f".{key}")
        ]  # fmt: skip
        if len(found) > 1:
            raise DsfValueError(
                f"dsf.trace: checkpoint: expected one tensor for {name!r}, got {listed(found)}. "
                f"Pass the whole model and the layer's path, not the layer alone."
            )
        if not found:
            return None
        reader = tensors.readers[found[0]]
    return reader()


@contextlib.contextmanager
def _opened(checkpoint: Checkpoint) -> Iterator[_Names]:
    names = _Names()
    if isinstance(checkpoint, Mapping):
        names.readers = {key: _held(tensor) for key, tensor in checkpoint.items()}
        yield names
        return
    with contextlib.ExitStack() as stack:
        for file in _files(Path(checkpoint)):
            from safetensors import safe_open

            opened: Any = stack.enter_context(safe_open(str(file), framework="pt"))
            names.readers |= {key: _read(opened, key) for key in opened.keys()}  # noqa: SIM118
        yield names


def _held(tensor: Any) -> Callable[[], Tensor]:
    if not isinstance(tensor, Tensor):
        raise DsfTypeError(
            f"dsf.trace: checkpoint: expected tensors, got {type(tensor).__name__} among them."
        )
    return lambda: tensor


def _read(opened: Any, key: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(key)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(f.suffix != ".safetensors" or not f.is_file() for f in files):
        raise DsfValueError(
            f"dsf.trace: checkpoint: expected a safetensors file or a folder with some, got "
            f"{str(path)!r}. Other formats are not read: save the weights as safetensors."
        )
    if importlib.util.find_spec("safetensors") is None:
        raise DsfUnsupportedError(
            "dsf.trace: checkpoint: expected safetensors to be installed to read a file. "
            "pip install safetensors, or pass a mapping of tensors."
        )
    return files
