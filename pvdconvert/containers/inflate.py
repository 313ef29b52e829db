"""gzip and zlib streams, inflated within bounds into a temporary file that is mapped: memory stays small.

A wrapped snapshot (instant-ngp's ``.ingp``) is one stream around one file of another container.
"""

from __future__ import annotations

import mmap
import tempfile
import zlib

from pvdconvert.errors import InputError

ALWAYS_ALLOWED = 256 << 20
MAX_RATIO = 100
MAX_INFLATED = 16 << 30
MAX_MEMBERS = 1024
_CHUNK = 1 << 20
_GZIP, _ZLIB = 31, 15


def looks_like_zlib(head: bytes) -> bool:
    """Whether ``head`` begins as a zlib stream of a 32 KiB window: two bytes, then sound deflate."""
    if len(head) < 3 or head[0] != 0x78 or (head[0] << 8 | head[1]) % 31 or head[1] & 0x20:
        return False
    try:
        zlib.decompressobj(_ZLIB).decompress(head, 256)
    except zlib.error:
        return False
    return True


def peek(data: memoryview, where: str, count: int = 64) -> bytes:
    """The first ``count`` bytes of the content. Raises InputError where not even those can be inflated."""
    try:
        return zlib.decompressobj(_window(data)).decompress(data[:4096], count)
    except zlib.error as error:
        raise InputError(f"{where}: truncated or corrupt {_name(data)}: {error}") from error


def inflate(data: memoryview, where: str) -> memoryview:
    """The content of the gzip (one or several members) or zlib stream that ``data`` is, read-only.

    Raises InputError: truncated, corrupt, bytes after its end, or a bomb: more than 100 times as large as the file and
    larger than 256 MiB.
    """
    limit = min(MAX_INFLATED, max(ALWAYS_ALLOWED, MAX_RATIO * len(data)))
    name, at, total, members = _name(data), 0, 0, 0
    try:
        with tempfile.TemporaryFile() as file:
            while at < len(data) or not members:
                members += 1
                stream = zlib.decompressobj(_window(data))
                if members > MAX_MEMBERS or (
                    members > 1 and (name != "gzip" or bytes(data[at : at + 2]) != b"\x1f\x8b")
                ):
                    raise InputError(f"{where}: {len(data) - at} bytes follow the end of the {name} stream")
                while not stream.eof:
                    raw = stream.unconsumed_tail or bytes(data[at : at + _CHUNK])
                    if not stream.unconsumed_tail:
                        at += len(raw)
                    out = stream.decompress(raw, _CHUNK)
                    total += len(out)
                    if total > limit:
                        raise InputError(
                            f"{where}: {len(data)} bytes unpack to more than {limit}: refused as a {name} bomb"
                        )
                    if not raw and not out and not stream.eof:
                        raise InputError(f"{where}: the {name} stream is truncated", hint="download or copy it again")
                    file.write(out)
                at -= len(stream.unused_data)
            file.flush()
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if total else memoryview(b"")
    except zlib.error as error:
        raise InputError(f"{where}: corrupt {name}: {error}", hint="download or copy it again") from error
    except OSError as error:
        raise InputError(
            f"{where}: cannot be unpacked to {tempfile.gettempdir()}: {error.strerror or error}",
            hint="free some space there, or set TMPDIR",
        ) from error


def _name(data: memoryview) -> str:
    return "gzip" if bytes(data[:2]) == b"\x1f\x8b" else "zlib"


def _window(data: memoryview) -> int:
    return _GZIP if _name(data) == "gzip" else _ZLIB
