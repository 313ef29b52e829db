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
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
VIEWS = ("r_0", "r_48", "r_100", "r_148")


def cameras(size: int) -> dict[str, Any]:
    """The real test cameras, by name, ``size`` pixels (bmild: no half-pixel offset)."""
    import dataclasses

    from pvdconvert.cameras import load_transforms

    path = DATA / "images" / "nerf_synthetic_lego400" / "transforms_test.json"
    names = [Path(f["file_path"]).name for f in json.loads(path.read_text())["frames"]]
    loaded = [dataclasses.replace(c, offset=0.0) for c in load_transforms(path)]
    return {n: c.resized(size, size) for n, c in zip(names, loaded)}


def real_image(name: str) -> Any:
    """[400, 400, 3] in [0, 1], straight alpha over white."""
    import numpy as np
    from PIL import Image

    path = DATA / "images" / "nerf_synthetic_lego400" / "test" / f"{name}.png"
    rgba = np.asarray(Image.open(path), dtype=np.float64) / 255
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def shoot(prepared: Any, camera: Any, step: float) -> Any:
    from pvdconvert.render.images import render_camera, to_uint8

    image = render_camera(prepared.field, prepared.scene, camera, prepared.occupancy, step)
    return to_uint8(image.rgb, prepared.scene.color_space)


def judge(path: Path, source: Path, step: float | None = None) -> dict[str, Any]:
    """dB of the student at ``path``: on 50 real images at 400 px, and against the teacher on four views at 200 px."""
    import numpy as np

    from pvdconvert.loading import open_field
    from pvdconvert.metrics import psnr
    from pvdconvert.prepare import prepare

    ready = []
    for file in (source, path):
        loaded = open_field(file)
        ready.append(prepare(loaded.field, loaded.scene))
    teacher, student = ready
    step = step or teacher.step
    small, large = cameras(200), cameras(400)
    against = [psnr(shoot(teacher, small[v], step), shoot(student, small[v], step)) for v in VIEWS]
    real = {n: psnr(real_image(n), shoot(student, c, step)) for n, c in large.items()}
    out = {
        "teacher_views": float(np.mean(against)),
        "real_50": float(np.mean(list(real.values()))),
        "real_4": float(np.mean([real[v] for v in VIEWS])),
    }
    return out


def teacher_real(source: Path) -> float:
    """dB of the teacher itself on the four real views at 400 px."""
    import numpy as np

    from pvdconvert.loading import open_field
    from pvdconvert.metrics import psnr
    from pvdconvert.prepare import prepare

    loaded = open_field(source)
    ready = prepare(loaded.field, loaded.scene)
    large = cameras(400)
    return float(np.mean([psnr(real_image(v), shoot(ready, large[v], ready.step)) for v in VIEWS]))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--to", nargs="+", default=["ngp", "tensorf", "plenoxels"])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--budget", default=None, help="instead of the preset's")
    parser.add_argument("--source", type=Path, default=DATA / "checkpoints" / "bmild-lego")
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--name", default=None)
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp())
    keep.mkdir(exist_ok=True, parents=True)
    rows = []
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
    best = teacher_real(given.source)
    lines = [
        f"# lego (official weights), preset {given.preset}" + (f", budget {given.budget}" if given.budget else ""),
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}. dB of `fidelity/1` against the "
        f"teacher; the teacher itself has {best:.2f} dB on the real views r_0, r_48, r_100, r_148.",
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
    (results / f"{name}.json").write_text(json.dumps({"teacher_real_4": best, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
