"""``.npy`` and ``.npz``: headers parsed here, plain arrays mapped, object arrays through our reader of pickles."""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable
from typing import Any

from pvdconvert.containers import pickle
from pvdconvert.containers.archive import Archive
from pvdconvert.containers.values import ITEM_SIZE, Array, DType, Malformed, RawTensor, Stub, check_shape
from pvdconvert.errors import InputError

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
MAX_TEXT = 1 << 20


def _header(data: memoryview, where: str) -> tuple[DType, bool, tuple[int, ...], int]:
    """(dtype, fortran order, shape, first byte of the payload)."""
    try:
        version = data[6]
        size, at = struct.unpack("<H", data[8:10])[0] if version == 1 else struct.unpack("<I", data[8:12])[0], 0
        at = 10 if version == 1 else 12
        if version not in (1, 2, 3) or size > MAX_HEADER or at + size > len(data):
            raise Malformed(f"npy header of version {version} and {size} bytes")
        header = ast.literal_eval(bytes(data[at : at + size]).decode("utf-8").strip())
        descr = header["descr"]
        return (
            DType(descr if isinstance(descr, str) else "V"),
            bool(header["fortran_order"]),
            check_shape(header["shape"]),
            at + size,
        )
    except Malformed as error:
        raise InputError(f"{where}: {error}") from error
    except (
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        SyntaxError,
        struct.error,
        RecursionError,
        MemoryError,
    ) as error:
        raise InputError(f"{where}: the npy header is truncated or corrupt") from error


def read_npy(
    data: memoryview, where: str, load: Callable[[], memoryview] | None = None, size: int | None = None
) -> Any:
    """A LazyTensor, a list (object arrays), or a Stub (text and structured types).

    ``data`` needs to hold the header only if ``load`` reads the whole of ``size`` bytes.
    """
    dtype, fortran, shape, start = _header(data, where)
    whole = load or (lambda: data)
    if dtype.kind == "O":
        value, _ = pickle.load(whole(), where, start)
        if not isinstance(value, Array) or value.items is None:
            raise InputError(f"{where}: an object array that holds something else")
        return value.items
    if dtype.name is None and dtype.kind in "SU":
        return _texts(whole()[start:], dtype, shape, where)
    if dtype.name is None:
        return Stub("numpy.void")
    need = start + math.prod(shape) * ITEM_SIZE[dtype.name]
    have = len(data) if size is None else size
    if need > have:
        raise InputError(f"{where}: truncated: {need} bytes needed for {list(shape)} {dtype.name}, {have} there")
    return RawTensor(shape, dtype.name, lambda: whole()[start:need], dtype.big_endian, fortran)


def _texts(raw: memoryview, dtype: DType, shape: tuple[int, ...], where: str) -> Any:
    """Text in an array: a str, or a list of them."""
    width = dtype.size * (4 if dtype.kind == "U" else 1)
    count = math.prod(shape)
    if not 0 < count * width <= min(len(raw), MAX_TEXT):
        raise InputError(f"{where}: truncated or impossible: {list(shape)} texts of {dtype.size} characters")
    codec = ("utf-32-be" if dtype.big_endian else "utf-32-le") if dtype.kind == "U" else "latin1"
    texts = [bytes(raw[k * width : (k + 1) * width]).decode(codec, "replace").rstrip("\0") for k in range(count)]
    return texts if shape else texts[0]


def read_npz(archive: Archive) -> dict[str, Any]:
    """name -> value of every ``.npy`` member; only headers are read."""
    out: dict[str, Any] = {}
    for name in archive.names():
        if name.endswith(".npy"):
            head = archive.read(name, MAX_HEADER + 16)
            where = f"{archive.where}:{name}"
            if bytes(head[:6]) != NPY_MAGIC:
                raise InputError(f"{where}: not an npy array")
            out[name.removesuffix(".npy")] = read_npy(head, where, archive.loader(name), archive.size(name))
    return out
