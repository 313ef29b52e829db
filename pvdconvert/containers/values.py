"""The inert values that decoded files are made of. Nothing here runs code from a file; numpy only, no torch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Buffer = memoryview
ITEM_SIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of an element, for every dtype name that a LazyTensor may carry."""

MAX_RANK = 16


class Malformed(Exception):
    """A file that contradicts itself; containers turn it into an InputError that names the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function that a pickle mentions. It is never looked up."""

    name: str


class Stub:
    """What a pickle builds with a name that we do not know: recorded, never called.

    ``args`` of the call, ``state`` it was given, ``items`` appended, ``entries`` set (dict subclasses).
    """

    __slots__ = ("args", "entries", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []
        self.entries: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def is_module(self) -> bool:
        """Whether this is a pickled torch module: such a file holds code by reference, not only numbers."""
        return isinstance(self.state, dict) and "_parameters" in self.state and "_modules" in self.state


def check_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape of bounded rank made of non-negative ints, or Malformed."""
    if not isinstance(shape, (tuple, list)) or len(shape) > MAX_RANK:
        raise Malformed("a tensor's shape is not a short tuple")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise Malformed(f"a tensor's shape {list(shape)[:MAX_RANK]!r:.80} is impossible")
    return tuple(shape)


def decode(raw: Buffer, dtype: str, count: int, *, offset: int = 0, big_endian: bool = False) -> NDArray[Any]:
    """``count`` elements from element ``offset`` of ``raw``, read-only, in native order; bfloat16 as float32.

    A view of ``raw`` wherever it is aligned and needs no conversion.
    """
    stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    if big_endian:
        stored = stored.newbyteorder(">")
    out: NDArray[Any] = np.frombuffer(raw, dtype=stored, count=count, offset=offset * stored.itemsize)
    if dtype == "bfloat16":
        out = (out.astype(np.uint32) << 16).view(np.float32)
    elif big_endian or not out.flags.aligned:
        out = out.astype(out.dtype.newbyteorder("="), copy=True)
    out.flags.writeable = False
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class RawTensor:
    """A :class:`~pvdconvert.plugin.LazyTensor` that lies contiguously in C (or Fortran) order in a buffer."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Buffer]
    big_endian: bool = False
    fortran: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def numpy(self) -> NDArray[Any]:
        flat = decode(self.load(), self.dtype, math.prod(self.shape), big_endian=self.big_endian)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A torch storage: ``numel`` elements of ``dtype``, read by ``load``."""

    dtype: str
    numel: int
    load: Callable[[], Buffer]
    big_endian: bool = False
    base: int = 0
    """First element, for legacy storages that are views of another."""


@dataclasses.dataclass(frozen=True, slots=True)
class StridedTensor:
    """A torch tensor: a strided view of a storage, proven to stay inside of it before it exists."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def checked(cls, storage: Storage, offset: Any, shape: Any, stride: Any, dtype: str | None = None) -> StridedTensor:
        """Raises Malformed unless every element lies in ``storage`` and no broadcast makes it larger than that."""
        size = check_shape(shape)
        if not isinstance(stride, (tuple, list)) or len(stride) != len(size):
            raise Malformed(f"a tensor of shape {list(size)} has strides for another rank")
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in stride) or type(offset) is not int or offset < 0:
            raise Malformed(f"a tensor of shape {list(size)} has an impossible stride or offset")
        dtype = dtype or storage.dtype
        if dtype != storage.dtype:
            have = storage.numel * ITEM_SIZE[storage.dtype] // ITEM_SIZE[dtype]
            storage = Storage(dtype, have, storage.load, storage.big_endian)
        count = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else offset
        if last >= storage.numel + (count == 0) or count > storage.numel:
            raise Malformed(
                f"a tensor of shape {list(size)}, stride {list(stride)}, offset {offset} does not fit in its storage "
                f"of {storage.numel} elements"
            )
        return cls(storage, offset, size, tuple(stride), dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def numpy(self) -> NDArray[Any]:
        s = self.storage
        count = math.prod(self.shape)
        if count == 0:
            return np.zeros(self.shape, "float32" if self.dtype == "bfloat16" else self.dtype)
        span = 1 + sum((n - 1) * k for n, k in zip(self.shape, self.stride))
        flat = decode(s.load(), self.dtype, span, offset=s.base + self.offset, big_endian=s.big_endian)
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, tuple(k * flat.itemsize for k in self.stride), writeable=False
        )
        if view.flags.c_contiguous:
            return view
        out: NDArray[Any] = np.ascontiguousarray(view)
        out.flags.writeable = False
        return out


class DType:
    """A numpy dtype as a pickle describes it; ``kind`` "O" holds python values, ``name`` is None for the exotic."""

    __slots__ = ("big_endian", "kind", "size")

    def __init__(self, descr: str) -> None:
        found = re.fullmatch(r"([<>|=]?)([?biufcSUO])(\d{0,5})", descr)
        order, kind, size = found.groups() if found else ("", "V", "0")
        self.kind = "b" if kind == "?" else kind
        self.size = int(size or (1 if kind == "?" else 8))
        if kind == "b":  # "b1" is bool, as is "?"; a signed byte is "i1"
            self.kind = "b" if self.size == 1 else "V"
        self.big_endian = order == ">"

    @property
    def name(self) -> str | None:
        """The name of the element type, or None if it is not a plain number."""
        kinds = {"b": "bool", "i": f"int{8 * self.size}", "u": f"uint{8 * self.size}", "f": f"float{8 * self.size}",
                 "c": f"complex{8 * self.size}"}  # fmt: skip
        name = kinds.get(self.kind, "")
        return name if name in ITEM_SIZE else None


class Array:
    """A numpy array in a pickle: a LazyTensor if its elements are numbers, else ``items`` (object arrays)."""

    __slots__ = ("_tensor", "items")

    def __init__(self) -> None:
        self._tensor: RawTensor | None = None
        self.items: list[Any] | None = None

    def fill(self, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
        """What ``ndarray.__setstate__`` would be given."""
        size = check_shape(shape)
        if not isinstance(dtype, DType):
            raise Malformed("an array without a dtype")
        count = math.prod(size)
        if dtype.kind == "O":
            if not isinstance(data, list) or len(data) != count:
                raise Malformed(f"an object array of shape {list(size)} holds another number of entries")
            self.items = data
            return
        if dtype.name is None:
            self.items = []
            return
        if isinstance(data, str):  # python 2 wrote bytes as text
            data = data.encode("latin1", "replace")
        if not isinstance(data, bytes) or len(data) != count * ITEM_SIZE[dtype.name]:
            raise Malformed(f"an array of shape {list(size)} {dtype.name} holds another number of bytes")
        raw = memoryview(data)
        self._tensor = RawTensor(size, dtype.name, lambda: raw, dtype.big_endian, bool(fortran))

    @property
    def tensor(self) -> RawTensor | None:
        return self._tensor
