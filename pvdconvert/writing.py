"""Nothing half-written under the final name: temporary file, reload, compare, rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.errors import OutputError, PvdError, RequestError
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import Registry


def check_target(path: Path, *, force: bool) -> None:
    """Refuse before any work: exists without ``force``, is a folder, folder missing or not writable."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder", hint="name a file with -o")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists", hint="--force overwrites it")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist", hint=f"mkdir -p {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot write into {folder}: {error.strerror}", hint="choose another -o") from error


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of ``path``; whatever stands there at the end is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: tuples are lists."""
    return json.loads(json.dumps(value, default=str))


def write_checked(parts: Parts, path: Path, format_name: str, registry: Registry, same: Sequence[str] = ()) -> int:
    """Write ``parts`` in a layout, read them back, compare bit for bit, and only then rename. Returns the bytes.

    ``same`` names configuration keys that must read back as they are. Raises OutputError where the disk refuses or
    what was read back differs, RequestError where one of ``same`` does; nothing is left behind.
    """
    code = registry.format(format_name)
    try:
        with temporary_beside(path) as temporary:
            code.write(parts, temporary)
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            size = temporary.stat().st_size
            back = _compare(parts, temporary, path, format_name, registry)
            for key in same:
                if plain(back.config.get(key)) != plain(parts.config.get(key)):
                    raise RequestError(
                        f"{path}: {format_name}: a field of {key} = {parts.config.get(key)!r:.60} would read back as "
                        f"{back.config.get(key)!r:.60}"
                    )
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}", hint="choose another -o") from error
    return size


def _compare(parts: Parts, temporary: Path, path: Path, format_name: str, registry: Registry) -> Parts:
    from pvdconvert.containers import open_manifest

    try:
        back = registry.format(format_name).read(open_manifest(temporary), ReadOptions())
    except PvdError as error:
        raise OutputError(f"{path}: what was written cannot be read back: {error}") from error
    if back.architecture != parts.architecture:
        raise OutputError(f"{path}: read back as {back.architecture!r}, written as {parts.architecture!r}")
    for name, tensor in parts.tensors.items():
        ours = tensor.numpy()
        if name not in back.tensors:
            raise OutputError(f"{path}: tensor {name!r} is missing from what was written")
        theirs = back.tensors[name].numpy()
        if theirs.shape != ours.shape or not np.array_equal(theirs, ours):
            raise OutputError(f"{path}: tensor {name!r} reads back differently", hint="is the disk sound?")
    return back


def byte_count(tensors: Mapping[str, Any]) -> int:
    """Bytes of torch tensors."""
    return sum(int(v.numel() * v.element_size()) for v in tensors.values())
