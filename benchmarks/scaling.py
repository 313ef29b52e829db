"""How time and memory grow: occupied cells, resolution, table size, rays, and what a teacher costs, by 2, 4, 8, 16.

    python benchmarks/scaling.py                     every axis (about 8 minutes on 2 idle cores)
    python benchmarks/scaling.py --axes cells rays --factors 1 2 4

Each point is a process of its own that makes one conversion with fixed steps and without validation. Tables go to
benchmarks/results/scaling.{md,json}, the plot to scaling.svg; axes that are not run keep their earlier figures.

cells       balls of one size in a lattice: 4, 8, 16, ... of them, and as many more rays and steps. Into plenoxels.
resolution  the sample scene's surface into plenoxels of 24, 48, 96, ... vertices a side. The same rays and steps.
table       the sample scene into ngp with 2^14, 2^15, ... rows a level. The same rays and steps.
rays        1, 2, 4, ... batches of rays asked, the same steps. Into a small ngp.
teacher     the sample scene behind a network of 1, 2, 4, ... times the cost. The same rays and steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tables import RESULTS, exponent, machine, markdown, on, plot, save

HERE = Path(__file__).resolve().parent
FACTORS = (1, 2, 4, 8, 16)
BARS = {("cells", "time"): 1.1, ("resolution", "memory"): 2.2}
"""(axis, measure) -> the largest exponent that is good enough."""
AXES = ("cells", "resolution", "table", "rays", "teacher")
BALLS, RADIUS = 4, 0.09


def high_water(reset: bool = False) -> int:
    """Most bytes resident since the last reset (Linux; elsewhere since the start)."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    from pvdconvert.memory import peak

    return peak()


def balls(count: int) -> tuple[Any, Any]:
    """Density and colour of ``count`` balls on a 4^3 lattice in the cube [-1, 1]^3."""
    import torch

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:count]
    at = torch.stack([order // 16, order // 4 % 4, order % 4], -1) * 0.46 - 0.69

    def density(x: Any) -> Any:
        cell = ((x + 0.69) / 0.46).round().clamp(0, 3)
        there = torch.zeros(64, dtype=torch.bool, device=x.device)
        there[order] = True
        own = there[(cell[:, 0] * 16 + cell[:, 1] * 4 + cell[:, 2]).long()]
        return torch.where(own & ((x - (cell * 0.46 - 0.69)).norm(dim=1) < RADIUS), 200.0, 0.0)

    def color(x: Any, d: Any) -> Any:
        return 0.5 + 0.3 * torch.sin(30 * x) + 0.1 * d

    assert len(at) == count
    return density, color


def sample(cost: int = 0) -> tuple[Any, Any]:
    """The sample scene; with ``cost``, behind a network of so many times 64 kFLOP that adds nothing."""
    import torch

    sys.path.insert(0, str(HERE.parent / "examples"))
    import scene

    weights = [torch.randn(128, 128, generator=torch.Generator().manual_seed(k)) / 12 for k in range(2 * cost)]

    def density(x: Any) -> Any:
        if not cost:
            return scene.density(x)
        h = torch.nn.functional.pad(x, (0, 125))
        for w in weights:
            h = torch.relu(h @ w)
        return scene.density(x) + 0.0 * h.sum(1)

    return density, scene.color


def point(axis: str, factor: int) -> dict[str, Any]:
    """One conversion in this process: seconds, CPU seconds, bytes above what was there before, seconds of stages."""
    import torch

    import pvdconvert
    from pvdconvert.field import FunctionField
    from pvdconvert.scene import Box, Scene

    labels, steps, to, sets = 2, 24, "ngp", {"log2_table": 14, "levels": 8}
    teacher = sample()
    if axis == "cells":
        teacher, labels, steps = balls(BALLS * factor), factor, 6 * factor
        to, sets = "plenoxels", {"resolution": 128}
    elif axis == "resolution":
        to, sets = "plenoxels", {"resolution": 24 * factor}
    elif axis == "table":
        sets = {"log2_table": 14 + factor.bit_length() - 1, "levels": 8}
    elif axis == "rays":
        labels = factor
    elif axis == "teacher":
        teacher = sample(factor)
    field = FunctionField(*teacher)
    if axis == "teacher":
        field.flops_per_point = 2.0 * 2 * factor * 128 * 128
    replay = f"scout=1;labels={labels};" + ";".join(f"{s}={steps}/{steps}" for s in ("density", "color", "render"))
    options: dict[str, Any] = {
        "sets": sets,
        "steps": replay,
        "validate": False,
        "scene": Scene(Box.cube(1.0), background=(1.0, 1.0, 1.0)),
    }
    # Compiled code and torch's own pools belong to no axis: a small conversion of the same kind comes first.
    warm = {**options, "steps": "scout=1;labels=1;density=2/2;color=2/2;render=2/2"}
    pvdconvert.convert(
        FunctionField(*balls(1)),
        to,
        **{**warm, "sets": {**sets, **({"resolution": 24} if to == "plenoxels" else {"log2_table": 10})}},
    )
    from pvdconvert.memory import resident

    base = resident()
    high_water(reset=True)
    clock, cpu = time.perf_counter(), time.process_time()
    report = pvdconvert.convert(field, to, **options)
    found = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    return {
        **found,
        "memory": high_water() - base,
        "stages": {s.name: s.seconds for s in report.stages},
        "samples": report.plan["samples"],
        "cells": report.plan["surface_cells"],
        "bytes": report.target["bytes"],
        "threads": torch.get_num_threads(),
    }


def measured(axis: str, factors: list[int], repeats: int) -> list[dict[str, Any]]:
    """The points of an axis, interleaved; medians of ``repeats``."""
    runs: dict[int, list[dict[str, Any]]] = {f: [] for f in factors}
    for _ in range(repeats):
        for factor in factors:
            command = [sys.executable, __file__, "--point", axis, str(factor)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[factor].append(json.loads(done.stdout.splitlines()[-1]))
            last = runs[factor][-1]
            print(f"{axis} x{factor}: {last['seconds']:.1f} s, {last['memory'] / 1e6:.0f} MB", flush=True)
    out = []
    for factor, found in runs.items():
        median = {k: statistics.median(r[k] for r in found) for k in ("seconds", "cpu", "memory")}
        out.append({"factor": factor, **found[-1], **median})
    return out


def by(axis: str, points: list[dict[str, Any]]) -> list[float]:
    """What the axis is fitted against: occupied cells as they were counted, else the factor."""
    return [p["cells"] if axis == "cells" else p["factor"] for p in points]


def tell(data: dict[str, Any]) -> str:
    rows, fits = [], []
    for axis, points in data["axes"].items():
        x = by(axis, points)
        found = {k: exponent(x, [p[k] for p in points]) for k in ("seconds", "cpu", "memory")}
        for measure, key in (("time", "cpu"), ("memory", "memory")):
            bar = BARS.get((axis, measure))
            verdict = "" if bar is None else f"at most {bar}: {'met' if found[key] <= bar else 'MISSED'}"
            wall = f" ({found['seconds']:.2f} by the clock)" if measure == "time" else ""
            last = exponent(x[-2:], [p[key] for p in points[-2:]])
            fits.append([axis, measure, f"{found[key]:.2f}{wall}", f"{last:.2f}", verdict])
        for p in points:
            stages = ", ".join(f"{k} {v:.1f}" for k, v in p["stages"].items() if v >= 0.05)
            rows.append([axis, f"x{p['factor']}", f"{p['cells']:,}", f"{p['samples']:,}", f"{p['seconds']:.1f}",
                         f"{p['cpu']:.1f}", f"{p['memory'] / 1e6:.0f}", f"{p['bytes'] / 1e6:.1f}", stages])  # fmt: skip
    head = ["axis", "", "surface cells", "samples", "s", "CPU s", "peak MB", "file MB", "seconds of stages"]
    return "\n".join(
        [
            "# How time and memory grow\n",
            on(data["machine"]) + "\n",
            "Exponents of a power law fitted over all factors (time: CPU seconds). Memory is the most that was "
            "resident, above what a small conversion had left behind. What each axis is: `benchmarks/scaling.py`.\n",
            markdown(["axis", "measure", "exponent", "of the last doubling", "bar"], fits),
            "![log-log: factor against growth](scaling.svg)\n",
            markdown(head, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--factors", nargs="+", type=int, default=list(FACTORS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(given.point[0], int(given.point[1]))))
        return
    file = RESULTS / f"{given.name}.json"
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"axes": {}}
    data["machine"] = machine()
    for axis in given.axes:
        data["axes"][axis] = measured(axis, sorted(given.factors), given.repeats)
        data["axes"] = {a: data["axes"][a] for a in AXES if a in data["axes"]}
        save(given.name, tell(data), data)
        plot(RESULTS / f"{given.name}.svg", [
            (a, {"CPU time": (by(a, p), [v["cpu"] for v in p]), "peak memory": (by(a, p), [v["memory"] for v in p])})
            for a, p in data["axes"].items()
        ])  # fmt: skip


if __name__ == "__main__":
    main()
