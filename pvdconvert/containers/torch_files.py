"""Both layouts of ``torch.save``: the zip (torch >= 1.6) and the legacy stream (layouts section 0.1). No torch."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pvdconvert.containers import pickle
from pvdconvert.containers.archive import Archive
from pvdconvert.containers.pickle_names import storage_dtype
from pvdconvert.containers.values import ITEM_SIZE, Malformed, Storage
from pvdconvert.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_VERSION = 1001
MAX_PICKLE = 256 << 20


def read_zip(archive: Archive) -> Any:
    """The object of a torch zip; its tensors stay in the file."""
    where = archive.where
    pickles = sorted((n for n in archive.names() if n.endswith("/data.pkl")), key=lambda n: n.count("/"))
    if not pickles:
        raise InputError(f"{where}: a zip archive without data.pkl: not a torch file")
    if len(pickles) > 1 and pickles[0].count("/") == pickles[1].count("/"):
        raise InputError(f"{where}: a torch zip with two objects: {pickles[0]!r:.60} and {pickles[1]!r:.60}")
    prefix = pickles[0].removesuffix("data.pkl")
    known = set(archive.names())
    order = bytes(archive.read(prefix + "byteorder", 16)) if prefix + "byteorder" in known else b"little"
    storages: dict[str, Any] = {}

    def persistent(pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise Malformed("a reference that is no storage")
        _, kind, key, _, numel = pid[:5]
        dtype = storage_dtype(kind)
        member = f"{prefix}data/{key}"
        if not isinstance(key, str) or member not in known:
            raise Malformed(f"storage {key!r:.40} is not in the archive")
        if dtype is None:
            return kind
        if type(numel) is not int or not 0 <= numel * ITEM_SIZE[dtype] <= archive.size(member):
            raise Malformed(
                f"storage {key!r:.40} holds {archive.size(member)} bytes, {numel!r:.24} x {dtype} are claimed"
            )
        out = storages.setdefault(f"{key}/{dtype}", Storage(dtype, numel, archive.loader(member), order == b"big"))
        return out if out.numel == numel else Storage(dtype, numel, out.load, out.big_endian)

    if archive.size(pickles[0]) > MAX_PICKLE:
        raise InputError(f"{where}: its pickle has {archive.size(pickles[0])} bytes: too large to be a checkpoint")
    return pickle.load(archive.read(pickles[0]), where, 0, persistent)[0]


def read_legacy(data: memoryview, where: str) -> Any:
    """The object of a legacy torch stream: magic, version, system, object, keys, then the storages one by one."""
    magic, at = pickle.load(data, where)
    version, at = pickle.load(data, where, at)
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION:
        raise InputError(f"{where}: not a torch stream of version {LEGACY_VERSION}")
    system, at = pickle.load(data, where, at)
    big = isinstance(system, dict) and system.get("little_endian") is False
    spans: dict[str, tuple[int, int]] = {}  # root key -> first byte, bytes
    roots: dict[str, tuple[str, int]] = {}  # root key -> dtype, elements

    def loader(key: str) -> Callable[[], memoryview]:
        def load() -> memoryview:
            start, size = spans[key]
            return data[start : start + size]

        return load

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return pid[1]  # (class, source file, source): the class stays a name
        if not isinstance(pid, tuple) or len(pid) != 6 or pid[0] != "storage":
            raise Malformed("a reference that is no storage")
        _, kind, key, _, numel, view = pid
        dtype = storage_dtype(kind)
        if dtype is None:
            raise Malformed(f"a storage of type {getattr(kind, 'name', kind)!r:.60}, which is not supported")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Malformed("a storage without a size")
        if roots.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise Malformed(f"storage {key!r:.40} has two sizes or types")
        if numel * ITEM_SIZE[dtype] > len(data):
            raise Malformed(f"storage {key!r:.40} claims {numel} x {dtype}, more than the file has")
        if view is None:
            return Storage(dtype, numel, loader(key), big)
        if not isinstance(view, tuple) or len(view) != 3 or not all(type(v) is int and v >= 0 for v in view[1:]):
            raise Malformed("a malformed view of a storage")
        if view[1] + view[2] > numel:
            raise Malformed(f"a view reaches beyond storage {key!r:.40}")
        return Storage(dtype, view[2], loader(key), big, view[1])

    root, at = pickle.load(data, where, at, persistent)
    keys, at = pickle.load(data, where, at)
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys) or not set(roots) <= set(map(str, keys)):
        raise InputError(f"{where}: the list of storages does not fit the object")
    for key in keys:
        if key not in roots:
            raise InputError(f"{where}: storage {key!r:.40} belongs to nothing")
        dtype, numel = roots[key]
        size = numel * ITEM_SIZE[dtype]
        if at + 8 + size > len(data):
            raise InputError(
                f"{where}: truncated: storage {key!r:.40} needs {size} bytes", hint="download or copy it again"
            )
        stored = struct.unpack(">q" if big else "<q", data[at : at + 8])[0]
        if stored != numel:
            raise InputError(f"{where}: storage {key!r:.40} has {stored} elements, {numel} are claimed")
        spans[key] = (at + 8, size)
        at += 8 + size
    return root
