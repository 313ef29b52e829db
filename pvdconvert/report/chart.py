"""PSNR over time, by stage, as an inline SVG that takes its colours from the page. Imports no torch."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.report.words import duration

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 260, 26, 34, 44, 14
LETTER = 6.6
"""Width of a letter of a stage's name, pixels."""

_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)

Point = tuple[float, float, str]
"""Seconds since the start, dB, stage."""


def points(document: Mapping[str, Any]) -> tuple[list[Point], list[tuple[str, float, float]]]:
    """(curve, [(stage, begin, end)]) of a report: its ``curve`` where it has one, else the ends of its stages."""
    bands: list[tuple[str, float, float]] = []
    ends: list[Point] = []
    clock = 0.0
    for stage in document.get("stages") or []:
        spent = _number(stage.get("seconds")) or 0.0
        name = str(stage.get("name", "?"))
        if spent > 0:
            bands.append((name, clock, clock + spent))
        before, after = _number(stage.get("psnr_before")), _number(stage.get("psnr_after"))
        if before is not None and (not ends or ends[-1][1] != before):
            ends.append((clock, before, name))
        clock += spent
        if after is not None:
            ends.append((clock, after, name))
    curve = [
        (seconds, decibels, str(p.get("stage") or ""))
        for p in document.get("curve") or []
        if (seconds := _number(p.get("seconds"))) is not None and (decibels := _number(p.get("psnr"))) is not None
    ]
    return sorted(curve, key=lambda p: p[0]) or ends, bands


def chart(curve: Sequence[Point], bands: Sequence[tuple[str, float, float]], width: int) -> str:
    """An SVG of ``width`` pixels: a line with its points, stages as bands, dB upwards, time to the right."""
    last = max([p[0] for p in curve] + [b[2] for b in bands], default=1.0) or 1.0
    low, high = min(p[1] for p in curve), max(p[1] for p in curve)
    rungs = _ticks(low, max(high, low + 1.0), 5)
    low, high = min(low, rungs[0]), max(high, rungs[-1])

    def x(seconds: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * seconds / last

    def y(decibels: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (decibels - low) / (high - low)

    out = [
        f'<svg class="chart w{width}" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" '
        f'aria-label="PSNR over time: from {curve[0][1]:.1f} to {curve[-1][1]:.1f} dB in {duration(last)}">'
    ]
    free = 0.0
    for k, (name, begin, end) in enumerate(bands):
        a, b = x(begin), x(end)
        text = html.escape(name)
        out.append(
            f'<g><title>{text}: {duration(end - begin)}</title><rect class="band{" odd" * (k % 2)}" x="{a:.1f}" '
            f'y="{TOP}" width="{max(b - a, 0.5):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        )
        if b - a >= LETTER * len(name) + 4 and a >= free:
            out.append(f'<text class="label" x="{(a + b) / 2:.1f}" y="{TOP - 8}" text-anchor="middle">{text}</text>')
            free = b
        out.append("</g>")
    for rung in rungs:
        out.append(f'<line class="rung" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(rung):.1f}" y2="{y(rung):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(rung) + 4:.1f}" text-anchor="end">{rung:g}</text>')
    for tick in _times(last, 8 if width > 500 else 4):
        where = "end" if x(tick) > width - 30 else "middle"
        out.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 14}" text-anchor="{where}">{_clock(tick)}</text>')
    out.append(f'<text class="unit" x="{LEFT - 8}" y="{TOP - 10}" text-anchor="end">dB</text>')
    out.append(f'<polyline class="line" points="{" ".join(f"{x(t):.1f},{y(v):.1f}" for t, v, _ in curve)}"/>')
    for t, v, name in curve if len(curve) <= 60 else curve[-1:]:
        tip = html.escape(f"{v:.2f} dB after {duration(t)}{f' ({name})' if name else ''}")
        out.append(f'<circle class="dot" cx="{x(t):.1f}" cy="{y(v):.1f}" r="3.5"><title>{tip}</title></circle>')
    out.append("</svg>")
    return "".join(out)


def _clock(seconds: float) -> str:
    """A tick: "0", "0.5s", "30s", "2m", "1h30m"."""
    if seconds < 60:
        return f"{seconds:g}s" if seconds else "0"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return "".join(f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if n)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose low ... high, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough * 0.999)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _times(last: float, count: int) -> list[float]:
    """Round times from 0 to ``last``, at most ``count`` and one."""
    if last < 2:
        return [t for t in _ticks(0.0, last, count) if t <= last]
    step = next((s for s in _STEPS if last / s <= count), math.ceil(last / count / 3600) * 3600)
    return [k * step for k in range(int(last / step) + 1)]


def _number(value: object) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None  # type: ignore[arg-type]
