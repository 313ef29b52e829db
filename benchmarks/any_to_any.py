"""Every architecture into every other, at one preset: dB, seconds and megabytes, and a grid of pictures.

    python benchmarks/any_to_any.py --keep /tmp/pairs                  # 7 x 7 at preset fast, about 50 minutes
    python benchmarks/any_to_any.py --keep /tmp/pairs --from ngp nerf  # some rows; the others keep their figures

The first teacher is the sample (examples/ngp.ckpt); a row's teacher is its conversion into that architecture, at preset
balanced. What is in --keep is not made again, so that a run can be stopped and go on. The tables go to
benchmarks/results/any-to-any.{md,json}, one view of every student to any-to-any.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tables import RESULTS, cli, machine, markdown, on, save

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "ngp.ckpt"
SEVEN = ("nerf", "ngp", "tensorf", "plenoxels", "tensorf-cp", "dvgo", "hybrid")
SIDE = 120
"""Pixels of a picture in the grid."""


def converted(source: Path, to: str, out: Path, preset: str) -> dict[str, Any]:
    """The figures of one conversion; those of an earlier run where its file is still there."""
    kept = out.with_suffix(".json")
    if out.exists() and kept.exists():
        known: dict[str, Any] = json.loads(kept.read_text())
        return known
    report = cli(source, "--to", to, "-o", out, "--preset", preset, "--force")
    found = {
        "psnr": report["fidelity"]["psnr"] if report["fidelity"] else None,
        "first": cli("compare", SAMPLE, out)["fidelity"]["psnr"],
        "wall": report["wall"],
        "cpu": report["cpu_seconds"],
        "bytes": out.stat().st_size,
        "kind": report["plan"]["kind"],
        "stages": {s["name"]: s["seconds"] for s in report["stages"]},
    }
    kept.write_text(json.dumps(found))
    print(f"{source.name} -> {to}: {found}", flush=True)
    return found


def picture(path: Path) -> np.ndarray[Any, Any]:
    """One view, uint8 [SIDE, SIDE, 3]."""
    out = path.with_suffix(".png")
    if not out.exists():
        cli("render", path, "-o", out, "--size", SIDE * 2, "--views", "1")
    return np.asarray(Image.open(out).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def grid(names: list[str], keep: Path) -> None:
    """Rows are sources, columns are targets; a file that is not there leaves its place white."""
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    rows = []
    for source in names:
        files = [keep / f"{source}-to-{to}.safetensors" for to in names]
        rows.append(np.concatenate([picture(f) if f.exists() else white for f in files], 1))
    RESULTS.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(RESULTS / "any-to-any.png", optimize=True)


def table(title: str, key: str, form: str, names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    """One figure of every pair as Markdown."""

    def cell(source: str, to: str) -> str:
        value = rows.get(source, {}).get(to, {}).get(key)
        return "-" if value is None else format(value, form)

    body = [[source, *(cell(source, to) for to in names)] for source in names]
    return f"\n{title}\n\n" + markdown(["from / to", *names], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=list(SEVEN))
    parser.add_argument("--from", dest="sources", nargs="+", default=None, help="only these rows")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the students")
    given = parser.parse_args()
    names: list[str] = given.architectures
    given.keep.mkdir(parents=True, exist_ok=True)
    earlier = RESULTS / "any-to-any.json"
    rows: dict[str, dict[str, Any]] = json.loads(earlier.read_text())["pairs"] if earlier.exists() else {}
    for source in given.sources or names:
        teacher = SAMPLE
        if source != "ngp":
            teacher = given.keep / f"{source}.safetensors"
            converted(SAMPLE, source, teacher, "balanced")
        for to in names:
            out = given.keep / f"{source}-to-{to}.safetensors"
            rows.setdefault(source, {})[to] = converted(teacher, to, out, given.preset)
            short = [n for n in names if n in rows]
            text = (
                f"# Any to any: the sample, preset {given.preset}\n\n{on(machine())}\n\nRows are sources: the sample "
                "converted into that architecture at preset balanced. The diagonal is only laid out anew.\n"
                + table("dB (`fidelity/1`) against the row's own teacher", "psnr", ".1f", names, rows)
                + table("dB against the first teacher, the sample", "first", ".1f", names, rows)
                + table("Seconds of the command", "wall", ".0f", names, rows)
                + "\n![one view of each](any-to-any.png)\n"
            )
            save("any-to-any", text, {"machine": machine(), "rows": short, "pairs": rows})
    grid(names, given.keep)


if __name__ == "__main__":
    main()
