"""Writes what ``torch.load(..., weights_only=True)`` opens, without torch: equal content gives equal bytes.

The zip of torch >= 1.6: ``data.pkl`` (protocol 2), ``byteorder``, ``data/0`` ..., ``version``; stored, 64-byte aligned.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import OutputError, RequestError

_STORAGES = {
    "float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage",
    "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage",
    "bool": "BoolStorage",
}  # fmt: skip
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Numpy:
    """An array that is written as numpy's own pickle, for programs that expect no tensor there (uint8 only)."""

    array: NDArray[np.uint8]


def write(path: Path, value: Any, name: str = "archive") -> None:
    """Save ``value``: nested dict, OrderedDict (as state_dicts are), list, tuple, None, bool, int, float, str, arrays
    (as tensors) and :class:`Numpy`.

    Raises RequestError for anything else, OutputError where the disk refuses.
    """
    arrays: list[NDArray[Any]] = []
    try:
        text = b"\x80\x02" + b"".join(_pickle(value, arrays)) + b"."
    except RecursionError as error:
        raise RequestError(f"{path}: the values to write are nested too deep") from error
    try:
        with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, f"{name}/data.pkl", text)
            _add(archive, f"{name}/byteorder", b"little")
            for key, array in enumerate(arrays):
                little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
                _add(archive, f"{name}/data/{key}", little.reshape(-1).view(np.uint8).data if little.size else b"")
            _add(archive, f"{name}/version", b"3\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _add(archive: zipfile.ZipFile, name: str, payload: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    assert archive.fp is not None
    # Local header: 30 bytes, the name, and an extra field "FB" of padding, as torch's own writer does. Large members
    # get zip64 sizes there instead (zipfile adds them), which moves the payload by 20 bytes.
    wide = len(payload) >= 1 << 31
    start = archive.fp.tell() + 30 + len(name.encode()) + 4 + 20 * wide
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=wide) as file:
        file.write(payload)


def _pickle(value: Any, arrays: list[NDArray[Any]]) -> Iterator[bytes]:
    if value is None:
        yield b"N"
    elif value is True or value is False:
        yield b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            yield struct.pack("<ci", b"J", value)
        else:
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            yield struct.pack("<cB", b"\x8a", len(raw)) + raw
    elif isinstance(value, float):
        yield struct.pack(">cd", b"G", value)
    elif isinstance(value, str):
        raw = value.encode()
        yield struct.pack("<cI", b"X", len(raw)) + raw
    elif isinstance(value, dict):
        yield b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
        yield b"("
        for key, inner in value.items():
            yield from _pickle(key, arrays)
            yield from _pickle(inner, arrays)
        yield b"u"
    elif isinstance(value, list):
        yield b"]("
        for inner in value:
            yield from _pickle(inner, arrays)
        yield b"e"
    elif isinstance(value, tuple):
        yield b"("
        for inner in value:
            yield from _pickle(inner, arrays)
        yield b"t"
    elif isinstance(value, np.ndarray) and str(value.dtype) in _STORAGES:
        yield from _tensor(value, arrays)
    elif isinstance(value, Numpy) and value.array.dtype == np.uint8:
        yield from _numpy(value.array)
    else:
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise RequestError(
            f"a torch file cannot hold {what}", hint="convert it to a plain number, text or float32 array"
        )


def _tensor(array: NDArray[Any], arrays: list[NDArray[Any]]) -> Iterator[bytes]:
    """``torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())``."""
    strides, step = [], 1
    for n in reversed(array.shape):
        strides.append(step)
        step *= max(n, 1)
    key = str(len(arrays))
    arrays.append(array)
    yield b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
    yield _STORAGES[str(array.dtype)].encode() + b"\n"
    for item in (key, "cpu", array.size):
        yield from _pickle(item, [])
    yield b"tQK\x00"
    yield from _pickle(tuple(array.shape), [])
    yield from _pickle(tuple(reversed(strides)), [])
    yield b"\x89ccollections\nOrderedDict\n)RtR"


def _numpy(array: NDArray[np.uint8]) -> Iterator[bytes]:
    """What ``pickle`` makes of a uint8 array: ``_reconstruct`` and the state; bytes as latin-1 text (protocol 2)."""
    yield b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    yield from _pickle((0,), [])
    yield from _bytes(b"b")
    yield b"tR("
    yield from _pickle(1, [])
    yield from _pickle(tuple(array.shape), [])
    yield b"cnumpy\ndtype\n("
    for item in ("u1", False, True):
        yield from _pickle(item, [])
    yield b"tR"
    yield from _pickle((3, "|", None, None, None, -1, -1, 0), [])
    yield b"b\x89"
    yield from _bytes(array.tobytes())
    yield b"tb"


def _bytes(data: bytes) -> Iterator[bytes]:
    yield b"c_codecs\nencode\n"
    yield from _pickle((data.decode("latin-1"), "latin1"), [])
    yield b"R"
