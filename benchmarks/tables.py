"""What benchmarks share: the machine they ran on, Markdown with JSON beside it, fitted exponents, a plot in SVG."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pvdconvert import launch

launch.prepare()  # torch is imported later

RESULTS = Path(__file__).resolve().parent / "results"
COLORS = ("#0b6e99", "#b8561b", "#3f7d20", "#7d3f8c", "#8c6d1f", "#444444")


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions: what a figure means nothing without."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [v for v in info.read_text().splitlines() if v.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    versions = {p: version(p) for p in ("pvdconvert", "torch", "numpy", "numba")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": name,
        "cores": cores,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }


def on(found: Mapping[str, Any]) -> str:
    """One line on a :func:`machine`."""
    load = f", load {found['load'][0]:.1f}" if found["load"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return f"{found['processor']}, {found['cores']} cores{load}; {versions}"


def cli(*words: str | Path) -> dict[str, Any]:
    """The document that a pvdconvert command prints, with "wall", its seconds by the clock, and "peak", the most bytes
    that were resident.

    Paths in it are bare names: no machine's folders in committed tables. Raises RuntimeError where the command fails.
    """
    command = [sys.executable, "-m", "pvdconvert", *map(str, words), "--json", "--progress", "plain"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: pvdconvert {' '.join(map(str, words))}")
    document: dict[str, Any] = json.loads(printed)
    for side in ("source", "target"):
        if side in document and document[side].get("path"):
            document[side]["path"] = Path(document[side]["path"]).name
    return {**document, "wall": time.perf_counter() - begin, "peak": usage.ru_maxrss * 1024}


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)]) + "\n"


def save(name: str, text: str, data: Any) -> None:
    """``results/NAME.md`` and ``.json``; also printed."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares; nan where something is not above 0."""
    if len(x) < 2 or min(*x, *y) <= 0:
        return math.nan
    u, v = [math.log(k) for k in x], [math.log(k) for k in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / spread if spread else math.nan


def plot(path: Path, panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]]) -> None:
    """Log-log panels in a row: (title, line -> (x, y)), each line relative to its first point; grey: slopes 1, 2, 3."""
    side, pad = 220, 46
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * (side + pad) + pad}" height="{side + 3 * pad}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, lines) in enumerate(panels):
        left, top = pad + number * (side + pad), pad
        series = {n: ([a / x[0] for a in x], [b / y[0] for b in y]) for n, (x, y) in lines.items() if min(*x, *y) > 0}
        right = max([2.0, *(v for x, _ in series.values() for v in x)])
        high = max([2.0, *(v for _, y in series.values() for v in y)])
        low = min([1.0, *(v for _, y in series.values() for v in y)])

        def at(x: float, y: float, box: tuple[float, ...] = (left, top, right, low, high)) -> tuple[float, float]:
            left, top, right, low, high = box
            up = math.log(y / low) / math.log(high / low)
            return left + side * math.log(x) / math.log(right), top + side * (1 - up)

        out.append(f'<text x="{left}" y="{top - 14}" font-weight="bold">{title}</text>')
        out.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#999"/>')
        for slope in (1, 2, 3):
            end = min(right, high ** (1 / slope))
            (a, b), (c, d) = at(1, 1), at(end, end**slope)
            out.append(f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{c - 10:.1f}" y="{d + 11:.1f}" fill="#aaa">{slope}</text>')
        for k in range(int(math.log2(right)) + 1):
            out.append(f'<text x="{at(2**k, 1)[0] - 4:.1f}" y="{top + side + 14}">{2**k}</text>')
        for k, (name, (x, y)) in enumerate(series.items()):
            color, points = COLORS[k % len(COLORS)], " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, x, y))
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{color}"/>' for a, b in map(at, x, y)]
            out.append(f'<text x="{left}" y="{top + side + 30 + 13 * k}" fill="{color}">{name}, x{y[-1]:.1f}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")


def curves(path: Path, across: str, up: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One panel in SVG: lines of points, x by its logarithm; every second line is dashed, in the colour of its twin."""
    points = [p for line in lines.values() for p in line]
    if not points:
        return
    wide, high, pad = 560, 320, 48
    low, top = math.floor(min(y for _, y in points)), math.ceil(max(y for _, y in points))
    left, right = math.log2(min(x for x, _ in points)) - 0.1, math.log2(max(x for x, _ in points)) + 0.1

    def at(x: float, y: float) -> tuple[float, float]:
        part = (math.log2(x) - left) / (right - left)
        return pad + wide * part, pad / 2 + high * (top - y) / max(1, top - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + 4 * pad + 60}" height="{high + 2 * pad}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{pad + wide / 2}" y="{high + pad * 1.6}">{across}</text>',
        f'<text x="12" y="{pad / 2 + high / 2}" transform="rotate(-90 12 {pad / 2 + high / 2})">{up}</text>',
    ]
    for y in range(low, top + 1, max(1, (top - low) // 8)):
        (a, b), (c, d) = at(2**left, y), at(2**right, y)
        out.append(f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{a - 22:.1f}" y="{b + 4:.1f}" fill="#666">{y}</text>')
    for k in range(math.ceil(left), math.floor(right) + 1):
        out.append(f'<text x="{at(2**k, low)[0] - 8:.1f}" y="{pad / 2 + high + 16}" fill="#666">{2**k:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        color, dash = COLORS[number // 2 % len(COLORS)], "" if number % 2 else ' stroke-dasharray="5 4"'
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in sorted(line)))
        out.append(f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{color}"/>' for a, b in (at(x, y) for x, y in line)]
        x, y = pad + wide + 12, pad / 2 + 14 * number + 10
        out.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}" stroke="{color}" stroke-width="1.8"{dash}/>'
        )
        out.append(f'<text x="{x + 28}" y="{y}" fill="{color}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")
