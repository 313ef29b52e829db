"""safetensors, read lazily and written deterministically. No torch, no other library.

Layout: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the raw tensors.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.containers.values import ITEM_SIZE, Malformed, RawTensor, check_shape
from pvdconvert.errors import InputError, OutputError
from pvdconvert.plugin import LazyTensor

MAX_HEADER = 32 << 20
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
_NAMES = {v: k for k, v in _DTYPES.items()}


def looks_like(data: memoryview) -> bool:
    """Whether ``data`` begins as a safetensors file does."""
    if len(data) < 10:
        return False
    return 2 <= struct.unpack("<Q", data[:8])[0] <= 1 << 32 and bytes(data[8:10]) in (b'{"', b"{}", b"{ ", b"{\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def read(data: memoryview, where: str) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """(tensors, metadata). Raises InputError naming what is wrong with the header or with a tensor."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER, len(data) - 8):
        raise InputError(f"{where}: truncated or corrupt: a safetensors header of {size} bytes in {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + size]).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        meta = header.pop("__metadata__", {})
        if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
            raise ValueError("__metadata__ is not a table of strings")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: corrupt safetensors header: {error}") from error
    body = data[8 + size :]
    spans, tensors = [], {}
    for name, entry in header.items():
        try:
            dtype, shape = _DTYPES[entry["dtype"]], check_shape(entry["shape"])
            start, end = entry["data_offsets"]
            if not (type(start) is type(end) is int and 0 <= start <= end <= len(body)):
                raise Malformed(f"offsets {start} .. {end} lie outside of the {len(body)} bytes of data")
            if end - start != math.prod(shape) * ITEM_SIZE[dtype]:
                raise Malformed(f"{end - start} bytes for {list(shape)} {dtype}")
        except (Malformed, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: tensor {name!r:.80}: {error}", hint="the file is damaged") from error
        spans.append((start, end, name))
        tensors[name] = RawTensor(shape, dtype, _slicer(body, start, end))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise InputError(f"{where}: tensors {first!r:.60} and {second!r:.60} overlap")
    return tensors, dict(meta)


def _slicer(body: memoryview, start: int, end: int) -> Any:
    return lambda: body[start:end]


def write(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write ``path``; equal content gives equal bytes. Raises OutputError where the disk refuses."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    # Wide types first, as the format's own writer does, so that every tensor stays aligned to its element.
    names = sorted(tensors, key=lambda n: (-ITEM_SIZE[tensors[n].dtype], n))
    for name in names:
        t = tensors[name]
        dtype = "float32" if t.dtype == "bfloat16" else t.dtype  # numpy has no bfloat16: reading widened it, exactly
        size = math.prod(t.shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for name in names:
                array = tensors[name].numpy()
                array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
                file.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
