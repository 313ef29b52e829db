"""How much memory a command line took, measured by itself."""

from __future__ import annotations

PEAK = """
import resource, sys
from pathlib import Path


def peak():
    # ru_maxrss would count the parent's pages: they are shared until the new program starts.
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(v for v in status.read_text().splitlines() if v.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


"""
"""Python source that defines ``peak()``: most bytes resident so far."""
