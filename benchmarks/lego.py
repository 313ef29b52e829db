"""The official lego weights into other architectures: dB against the teacher and against the real test images.

    python benchmarks/lego.py --to ngp tensorf plenoxels --preset balanced

Needs the real data (PVDCONVERT_DATA or ../shared/data). Students are kept in --keep (default: a temporary folder); the
table goes to benchmarks/results/lego-PRESET.{md,json}. Lego is CC-BY-NC: numbers only, never pictures or weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean as mean
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
VIEWS = ("r_0", "r_48", "r_100", "r_148")


def real() -> Any:
    """The real pictures, with rays as the official weights have them (no half-pixel offset)."""
    from pvdconvert.data.opening import open_dataset

    return open_dataset(DATA / "images" / "nerf_synthetic_lego400", offset=0.0)


def ready(path: Path) -> Any:
    from pvdconvert.loading import open_field
    from pvdconvert.prepare import prepare

    loaded = open_field(path)
    return prepare(loaded.field, loaded.scene)


def against_images(field: Any, views: tuple[str, ...] | None = None) -> dict[str, float]:
    """view -> dB against the real picture at 400 px."""
    from pvdconvert.evaluation import evaluate

    rows = evaluate(field, real(), views=views, metrics=("psnr",)).views
    return {Path(row["name"]).name: row["psnr"] for row in rows}


def judge(path: Path, source: Path) -> dict[str, Any]:
    """dB of the student at ``path``: on 50 real images at 400 px, and against the teacher on four views at 200 px."""
    from pvdconvert import metrics
    from pvdconvert.placing import choose

    teacher, student = ready(source), ready(path)
    student.step = teacher.step
    cameras = [f.camera.resized(200, 200) for f in choose(real().split("test"), VIEWS, "lego")]
    options = {"cameras": cameras, "box": teacher.box, "step": teacher.step}
    one = metrics.views(teacher.field, teacher.scene, occupancy=teacher.occupancy, **options)
    measured = against_images(student)
    return {
        "teacher_views": mean(one.compare(student.field, student.occupancy).views),
        "real_50": mean(measured.values()),
        "real_4": mean(measured[v] for v in VIEWS),
    }


def teacher_real(source: Path, whole: bool) -> dict[str, float]:
    """dB of the teacher itself on the real views at 400 px: on the four, and on all 50 (eight seconds a view)."""
    measured = against_images(ready(source), None if whole else VIEWS)
    four = {"four": mean(measured[v] for v in VIEWS)}
    return {**four, "all": mean(measured.values())} if whole else four


def table(given: argparse.Namespace, best: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """Write what is known so far; a long run that is stopped keeps what it had."""
    lines = [
        f"# lego (official weights), preset {given.preset}" + (f", budget {given.budget}" if given.budget else ""),
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}. dB of `fidelity/1` against the "
        f"teacher; the teacher itself has {best['four']:.2f} dB on the real views r_0, r_48, r_100, r_148"
        + (f", {best['all']:.2f} on all 50." if "all" in best else "."),
        "",
        "| student | fidelity/1 | worst | upper | teacher, 4 test views | real, 50 | real, same 4 | s | CPU s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "exit_code" in r:
            lines.append(f"| {r['to']} | exit {r['exit_code']} |")
            continue
        figures = [r[k] for k in ("fidelity", "worst", "upper", "teacher_views", "real_50", "real_4")]
        tail = [f"{r['wall']:.0f}", f"{r['cpu']:.0f}", f"{r['bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join([str(r["to"]), *(f"{v:.2f}" for v in figures), *tail]) + " |")
    name = given.name or f"lego-{given.preset}"
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text("\n".join(lines) + "\n")
    (results / f"{name}.json").write_text(json.dumps({"teacher_real": best, "rows": rows}, indent=1) + "\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--to", nargs="+", default=["ngp", "tensorf", "plenoxels"])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--budget", default=None, help="instead of the preset's")
    parser.add_argument("--source", type=Path, default=DATA / "checkpoints" / "bmild-lego")
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--name", default=None)
    parser.add_argument("--whole-teacher", action="store_true", help="the teacher on all real views, not on four")
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp())
    keep.mkdir(exist_ok=True, parents=True)
    rows: list[dict[str, Any]] = []
    best = teacher_real(given.source, given.whole_teacher)
    for to in given.to:
        out = keep / f"lego-{to}-{given.preset}.safetensors"
        command = [sys.executable, "-m", "pvdconvert", str(given.source), "--to", to, "-o", str(out)]
        command += ["--preset", given.preset, "--force", "--json", "--progress", "plain"]
        command += ["--budget", given.budget] if given.budget else []
        begin = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        wall = time.perf_counter() - begin
        if done.returncode:
            rows.append({"to": to, "exit_code": done.returncode})
            table(given, best, rows)
            continue
        report = json.loads(done.stdout)
        row = {
            "to": to,
            "wall": wall,
            "cpu": report["cpu_seconds"],
            "fidelity": report["fidelity"]["psnr"],
            "worst": report["fidelity"]["psnr_worst"],
            "upper": report["fidelity"]["psnr_upper"],
            "bytes": report["target"]["bytes"],
            "peak": report["peak_bytes"],
            "stages": report["stages"],
            "config": report["plan"]["config"],
            **judge(out, given.source),
        }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k not in ("config", "stages")}), flush=True)
        table(given, best, rows)
    print(table(given, best, rows))


if __name__ == "__main__":
    from pvdconvert import launch

    launch.prepare()
    main()
