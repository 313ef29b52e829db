"""Write ``.npz`` files that numpy opens without pickle: equal arrays give equal bytes. No torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import OutputError, RequestError


def write(path: Path, arrays: Mapping[str, NDArray[Any]], *, deflate: frozenset[str] | set[str] = frozenset()) -> None:
    """Save ``arrays`` by name, in this order, little-endian; members named in ``deflate`` are compressed.

    Raises RequestError for object arrays, OutputError where the disk refuses.
    """
    try:
        with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                if array.dtype.kind not in "fiubSU":
                    raise RequestError(f"{path}: array {name!r} of type {array.dtype} cannot be written without pickle")
                little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
                info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                info.create_system = 3
                info.external_attr = 0o644 << 16
                if name in deflate:
                    info.compress_type = zipfile.ZIP_DEFLATED
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(little))
                with archive.open(info, "w", force_zip64=little.nbytes >= 1 << 31) as member:
                    member.write(header.getvalue())
                    member.write(little.reshape(-1).view(np.uint8).data if little.size else b"")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
