"""Numbers as people read them: sizes, durations, decibels. Imports no torch."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes for people: 812 B, 3.4 kB, 28 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """0.4s, 12s, 3m10s, 1h02m."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def number(value: float) -> str:
    """A coordinate or distance, as short as it is exact to six digits."""
    return f"{value:.6g}"


def decibel(value: object) -> str:
    """ "31.42", or "-" where there is no number."""
    return f"{value:.2f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"
