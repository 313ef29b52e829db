"""How much memory there is, and how much a program has taken. No torch."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pvdconvert.errors import UsageError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LEAST = 1 << 29
"""Bytes below which no conversion fits: torch alone takes a third of it."""
_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def parse(text: str, option: str = "--max-memory") -> int:
    """Bytes of "6G", "6GB", "512MiB", "4e9". Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if found is None:
        raise UsageError(f"{option} {text}: not a size", hint="write 6G, 512MiB or a number of bytes")
    size = float(found[1]) * UNITS[found[2] or ""]
    if not LEAST <= size < 2**60:
        raise UsageError(f"{option} {text}: a conversion needs {LEAST >> 20} MiB at least")
    return int(size)


def free() -> int | None:
    """Bytes that this process may still take: what the machine has and what its control group allows; None: unknown."""
    rooms = [room for room in (_available(), _allowed()) if room is not None]
    return min(rooms) if rooms else None


def huge_pages() -> bool | None:
    """Whether who asks for it gets memory in pages of 2 MB (:mod:`pvdconvert.launch` asks); None: unknown."""
    try:
        found = _HUGE.read_text()
    except OSError:
        return None
    return "[never]" not in found


def _available() -> int | None:
    found = _field(_PROC / "meminfo", "MemAvailable")
    return None if found is None else found


def _field(path: Path, name: str) -> int | None:
    """A value of "Name:  123 kB" lines, in bytes."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _allowed() -> int | None:
    """What the control group (version 2, else 1) leaves; its page cache counts as free, for it is given back."""
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            text = (_CGROUP / limit).read_text().strip()
            if text == "max" or int(text) >= 1 << 60:
                return None
            now = int((_CGROUP / used).read_text())
            lines = (_CGROUP / stat).read_text().splitlines()
            back = next((int(v.split()[1]) for v in lines if v.startswith(f"{cache} ")), 0)
            return max(0, int(text) - now + back)
        except (OSError, ValueError, IndexError):
            continue
    return None


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    return _field(_PROC / "self/status", "VmRSS") or 0


def peak() -> int:
    """The most bytes that this process has had in memory."""
    found = _field(_PROC / "self/status", "VmHWM")  # ru_maxrss would count a parent's pages
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
