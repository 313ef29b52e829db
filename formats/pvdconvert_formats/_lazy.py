"""Lazy tensors made of others, and texts beside a checkpoint. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest, yaml_config
from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, LazyTensor

MAX_TEXT = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A float32 LazyTensor of ``shape`` that ``make`` computes when it is asked for."""

    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]
    dtype: str = "float32"

    def numpy(self) -> NDArray[Any]:
        out = np.ascontiguousarray(self.make(), dtype=self.dtype)
        assert out.shape == self.shape
        return out


def zeros(*shape: int) -> ArrayTensor:
    """float32 zeros: a bias that the file's program does not have."""
    return ArrayTensor(np.zeros(shape, np.float32))


def need(source: Mapping[str, LazyTensor], key: str, shape: Sequence[int | None], where: str) -> LazyTensor:
    """Tensor ``key`` if it is floating-point and of ``shape`` (None = any). Raises InputError."""
    tensor = source.get(key)
    if tensor is None:
        raise InputError(f"{where}: tensor {key!r} is missing", hint="is the file complete?")
    fits = len(tensor.shape) == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape))
    if not fits or "float" not in tensor.dtype or 0 in tensor.shape:
        expected = "[" + ", ".join("*" if n is None else str(n) for n in shape) + "]"
        raise InputError(f"{where}: tensor {key!r} is {tensor.dtype} {list(tensor.shape)}, expected float {expected}")
    return tensor


def text_near(manifest: Manifest, names: Sequence[str], given: Path | None) -> tuple[str, str] | None:
    """(path, text) of ``given``, or of the first of ``names`` in the checkpoint's folder or the one above it.

    Raises InputError where the file is not UTF-8 text of at most 1 MB; None where there is none.
    """
    folder = manifest.folder
    places = [given] if given is not None else [f / name for f in (folder, folder.parent) for name in names]
    for path in places:
        if given is None and (not path.is_file() or path.is_symlink()):
            continue
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_TEXT + 1)
            if len(raw) > MAX_TEXT:
                raise InputError(f"{path}: more than {MAX_TEXT} bytes: not the settings of a checkpoint")
            return str(path), raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from error
    return None


def yaml_near(manifest: Manifest, names: Sequence[str], given: Path | None) -> dict[str, Any]:
    """The table of settings in ``given`` or beside the checkpoint (:func:`text_near`), {} where there is none.

    Raises InputError where that file is no YAML table (:func:`pvdconvert.containers.yaml_config.load`).
    """
    found = text_near(manifest, names, given)
    if found is None:
        return {}
    settings = yaml_config.load(found[1], found[0])
    if not isinstance(settings, dict):
        raise InputError(f"{found[0]}: not a table of settings")
    return settings
