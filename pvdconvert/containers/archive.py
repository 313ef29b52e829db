"""Zip archives of checkpoints (torch, npz), read in place. Nothing is ever extracted to a path."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

from pvdconvert.errors import InputError, UnsafeError

MAX_DIRECTORY = 8 << 20
MAX_RATIO = 100
ALWAYS_ALLOWED = 256 << 20
_DAMAGED = "the zip archive is truncated or corrupt"


class Archive:
    """The members of the zip file ``data``; stored ones are views of it, deflated ones are inflated within bounds.

    Raises InputError for damage, overlaps, duplicates, encryption and bombs; UnsafeError for names that leave it.
    """

    def __init__(self, data: memoryview, where: str) -> None:
        self._data, self.where = data, where
        self._check_directory_size()
        try:
            with zipfile.ZipFile(_View(data)) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, IndexError) as error:
            raise InputError(f"{where}: {_DAMAGED}: {error}", hint="download or copy it again") from error
        self._infos: dict[str, zipfile.ZipInfo] = {}
        self._start: dict[str, int] = {}
        end = total = 0
        for info in sorted(infos, key=lambda i: i.header_offset):
            name = info.filename
            if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name[:3]:
                raise UnsafeError(f"{where}: the archive holds {name!r:.80}, a path outside of itself: refused")
            if name in self._infos:
                raise InputError(f"{where}: the archive holds {name!r:.80} twice")
            if info.flag_bits & 0x1:
                raise InputError(f"{where}: the archive is encrypted")
            if info.header_offset < end:
                raise InputError(f"{where}: members of the archive overlap at {name!r:.80}")
            start = self._payload(info)
            end = start + info.compress_size
            if end > len(data):
                raise InputError(f"{where}: {_DAMAGED}: {name!r:.80} reaches beyond the end")
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                raise InputError(f"{where}: {_DAMAGED}: {name!r:.80} has two sizes")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{where}: {name!r:.80} is packed by method {info.compress_type}, which is not supported"
                )
            total += info.file_size
            self._infos[name], self._start[name] = info, start
        if total > max(ALWAYS_ALLOWED, MAX_RATIO * len(data)):
            raise InputError(f"{where}: {len(data)} bytes claim to unpack to {total}: refused as a zip bomb")

    def names(self) -> list[str]:
        """Names of the members, in the order in which they lie in the file."""
        return list(self._infos)

    def size(self, name: str) -> int:
        """Unpacked size in bytes."""
        return self._infos[name].file_size

    def read(self, name: str, limit: int | None = None) -> memoryview:
        """The bytes of member ``name``, or its first ``limit``."""
        info, start = self._infos[name], self._start[name]
        raw = self._data[start : start + info.compress_size]
        want = info.file_size if limit is None else min(limit, info.file_size)
        if info.compress_type == zipfile.ZIP_STORED:
            return raw[:want]
        try:
            out = zlib.decompressobj(-15).decompress(raw, want) if want else b""
        except zlib.error as error:
            raise InputError(f"{self.where}: {_DAMAGED}: {name!r:.80}: {error}") from error
        if len(out) != want:
            raise InputError(f"{self.where}: {_DAMAGED}: {name!r:.80} is shorter than it says")
        return memoryview(out)

    def loader(self, name: str) -> Callable[[], memoryview]:
        """A function that reads member ``name``."""
        return lambda: self.read(name)

    def _payload(self, info: zipfile.ZipInfo) -> int:
        """Where the member's bytes begin, from its local header."""
        header = self._data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise InputError(f"{self.where}: {_DAMAGED}: no header for {info.filename!r:.80}")
        name, extra = struct.unpack("<HH", header[26:30])
        return int(info.header_offset + 30 + name + extra)

    def _check_directory_size(self) -> None:
        """Refuse a directory that would take seconds to parse, before parsing it."""
        base = max(0, len(self._data) - (1 << 16) - 22)
        at = bytes(self._data[base:]).rfind(b"PK\x05\x06")
        if at < 0 or base + at + 22 > len(self._data):
            raise InputError(f"{self.where}: {_DAMAGED}: its directory is missing", hint="download or copy it again")
        size = struct.unpack("<I", self._data[base + at + 12 : base + at + 16])[0]
        if size == 0xFFFFFFFF:
            wide = bytes(self._data[base:]).rfind(b"PK\x06\x06", 0, at)
            if wide < 0 or wide + 56 > at:
                raise InputError(f"{self.where}: {_DAMAGED}: its directory is missing")
            size = struct.unpack("<Q", self._data[base + wide + 40 : base + wide + 48])[0]
        if size > MAX_DIRECTORY:
            raise InputError(f"{self.where}: an archive of too many members (directory of {size} bytes)")


class _View(io.RawIOBase):
    """A seekable file over a memoryview, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, len(self._data))[whence]
        if at < 0:
            raise OSError("seek before the start")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else min(len(self._data), self._at + size)
        out = bytes(self._data[self._at : end])
        self._at = max(self._at, end)
        return out
