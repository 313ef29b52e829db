"""Files mapped read-only into memory: nothing is read before it is asked for."""

from __future__ import annotations

import mmap
from pathlib import Path

from pvdconvert.errors import InputError


def map_file(path: Path) -> memoryview:
    """The bytes of ``path``, read-only. Raises InputError where it is missing, a device, unreadable or empty."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder", hint="check the path")
        if not path.is_file():
            raise InputError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # mmap of nothing
        raise InputError(f"{path}: the file is empty", hint="download or copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
