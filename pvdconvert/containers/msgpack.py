"""MessagePack, decoded within bounds; arrays and blobs stay in the file. Nothing in it is run.

Not the msgpack library's reader, which copies every blob (a snapshot's are most of the file) and cannot leave one
behind. What becomes of what:

nil, bool, int, float   None, bool, int, float
str                     str; bytes that are no UTF-8 are a blob
bin                     a LazyTensor of uint8 [n]
array, map              list, dict; a map's keys are str or int, and stand once
ext 1 (flax)            a LazyTensor: the payload is msgpack itself, (shape, name of the dtype, bytes in C order)
ext 2, ext 3 (flax)     complex; the python number of a numpy scalar (stored like ext 1)
other ext               a Stub "msgpack.extN" whose ``args`` holds the payload

A map with ``__msgpack_chunked_array__`` (flax writes arrays of 2^30 bytes and more so) is one LazyTensor again. Its
``shape`` and ``chunks`` are lists, or maps with the keys "0", "1", ...

Tensors are named in ``Manifest.tensors`` by their keys joined with dots, list entries by their index:
``optimizer.target.params.MLP_0.Dense_0.kernel``, ``snapshot.params_binary``.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers.values import ITEM_SIZE, Malformed, RawTensor, Stub, check_shape
from pvdconvert.errors import InputError

MAX_DEPTH = 40
MAX_VALUES = 1_000_000
MAX_STUB = 4096
CHUNKED = "__msgpack_chunked_array__"
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_NUMBERS = {**_INTEGERS, 0xCA: ">f", 0xCB: ">d"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_BINARY = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_TEXT = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_EXTS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_FIXED_EXTS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


@dataclasses.dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A :class:`~pvdconvert.plugin.LazyTensor` stored as consecutive flat pieces."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[RawTensor, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def numpy(self) -> NDArray[Any]:
        out: NDArray[Any] = np.concatenate([piece.numpy().reshape(-1) for piece in self.pieces]).reshape(self.shape)
        out.flags.writeable = False
        return out


def read(data: memoryview, where: str) -> Any:
    """The one value in ``data``. Raises InputError: truncated, corrupt, too deep or too many values, data after it."""
    reader = _Reader(data, [MAX_VALUES])
    try:
        value = reader.value(0)
        if reader.at != len(data):
            raise Malformed(f"{len(data) - reader.at} bytes follow its end")
    except Malformed as error:
        raise InputError(f"{where}: truncated or corrupt msgpack: {error}", hint="download or copy it again") from error
    return value


class _Reader:
    """``left`` is one number: how many values this reader and those of nested payloads may still make."""

    def __init__(self, data: memoryview, left: list[int]) -> None:
        self.data, self.left, self.at = data, left, 0

    def value(self, depth: int) -> Any:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Malformed(f"more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH} at byte {self.at}")
        tag = self.take(1)[0]
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag <= 0x8F:
            return self.mapping(tag & 0x0F, depth)
        if tag <= 0x9F:
            return self.items(tag & 0x0F, depth)
        if tag <= 0xBF:
            return self.text(tag & 0x1F)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            return self.number(_NUMBERS[tag])
        if tag in _BINARY:
            return _blob(self.take(self.number(_BINARY[tag])))
        if tag in _TEXT:
            return self.text(self.number(_TEXT[tag]))
        if tag in _LISTS:
            return self.items(self.number(_LISTS[tag]), depth)
        if tag in _MAPS:
            return self.mapping(self.number(_MAPS[tag]), depth)
        if tag in _EXTS or tag in _FIXED_EXTS:
            size = _FIXED_EXTS[tag] if tag in _FIXED_EXTS else self.number(_EXTS[tag])
            return self.extension(self.number(">b"), self.take(size), depth)
        raise Malformed(f"byte {self.at - 1} is {tag:#04x}, which begins nothing")

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self.data):
            raise Malformed(f"{count} bytes are claimed at byte {self.at}, {len(self.data) - self.at} are there")
        out = self.data[self.at : end]
        self.at = end
        return out

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, size: int) -> Any:
        raw = self.take(size)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:  # before 2013 there was no bin
            return _blob(raw)

    def room(self, count: int, each: int) -> None:
        """Every entry takes ``each`` bytes at least: a larger count is refused before anything is made for it."""
        if count * each > len(self.data) - self.at or count > self.left[0]:
            raise Malformed(f"{count} entries are claimed at byte {self.at}, {len(self.data) - self.at} bytes are left")

    def items(self, count: int, depth: int) -> list[Any]:
        self.room(count, 1)
        return [self.value(depth + 1) for _ in range(count)]

    def mapping(self, count: int, depth: int) -> Any:
        self.room(count, 2)
        out: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if type(key) not in (str, int):
                raise Malformed(f"a map's key {key!r:.60} is no text")
            if key in out:
                raise Malformed(f"a map's key {key!r:.60} stands twice")
            out[key] = self.value(depth + 1)
        return _joined(out) if out.get(CHUNKED) is True else out

    def extension(self, code: int, payload: memoryview, depth: int) -> Any:
        if code in (1, 2, 3):
            inner = _Reader(payload, self.left)
            try:
                value = inner.value(depth + 1)
            except Malformed:
                value = None  # another program's ext of this number
            if code == 2 and _is(value, (int, float), (int, float)):
                return complex(*value)
            if code != 2 and _is(value, list, str, RawTensor) and inner.at == len(payload):
                array = _array(*value)
                if code == 3 and array is not None and array.dtype != "bfloat16":
                    return array.numpy().item() if array.shape == () else array
                if array is not None:
                    return array
        return Stub(f"msgpack.ext{code}", (bytes(payload[:MAX_STUB]),))


def _is(value: Any, *types: Any) -> bool:
    return type(value) is list and len(value) == len(types) and all(isinstance(v, t) for v, t in zip(value, types))


def _blob(raw: memoryview) -> RawTensor:
    return RawTensor((len(raw),), "uint8", lambda: raw)


def _array(shape: list[Any], dtype: str, raw: RawTensor) -> RawTensor | None:
    """flax's (shape, dtype, bytes); None where the dtype is not a plain number's."""
    if dtype not in ITEM_SIZE:
        return None
    size = check_shape(shape)
    if math.prod(size) * ITEM_SIZE[dtype] != raw.shape[0]:
        raise Malformed(f"an array of shape {list(size)} {dtype} holds {raw.shape[0]} bytes")
    return RawTensor(size, dtype, raw.load)


def _joined(entries: dict[Any, Any]) -> JoinedTensor:
    shape, chunks = _sequence(entries.get("shape")), _sequence(entries.get("chunks"))
    if shape is None or not chunks or not all(isinstance(c, RawTensor) for c in chunks):
        raise Malformed("an array in chunks lacks its shape or its chunks")
    size, dtypes = check_shape(shape), {c.dtype for c in chunks}
    if len(dtypes) != 1 or sum(math.prod(c.shape) for c in chunks) != math.prod(size):
        raise Malformed(f"the chunks of an array of shape {list(size)} do not add up to it")
    return JoinedTensor(size, chunks[0].dtype, tuple(chunks))


def _sequence(value: Any) -> list[Any] | None:
    """A list, or flax's map of "0", "1", ..., or None."""
    if isinstance(value, dict) and list(value) == [str(k) for k in range(len(value))]:
        return list(value.values())
    return value if isinstance(value, list) else None
