"""Distilled against trained from scratch, on real pictures: the paper's claim, at equal time.

    python benchmarks/from_scratch.py --to ngp tensorf plenoxels --budgets 30 90
    python benchmarks/from_scratch.py --to nerf --teacher lego-ngp.safetensors --budgets 30 90 --name from-scratch-nerf

Each student is made twice by the command line, at each budget in a run of its own: `pvdconvert train` from the 100
training pictures of lego, and `pvdconvert TEACHER --to X` from official weights that were trained on the same
pictures (an MLP, so an MLP student needs another teacher: those weights would only be laid out anew). Both are judged
by `pvdconvert eval` on real test pictures that neither saw. Time is the clock's, the teacher's answers included; a
budget is what both were given, and the size is each program's own choice. The table goes to
benchmarks/results/NAME.{md,json}, the curves to NAME.svg. Needs the real data (PVDCONVERT_DATA or ../shared/data).
Lego is CC-BY-NC: numbers only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tables import RESULTS, cli, curves, machine, markdown, on, save

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
BAR = {"nerf": 0.5}
"""dB by which a distilled student should beat its twin; of all others 0."""


def judge(path: Path, given: argparse.Namespace, official: bool) -> dict[str, float]:
    """Means over the test views. The ``official`` weights, and what was made of them, have rays at pixels' corners."""
    corner = ["--pixel-offset", "0"] if official else []
    found: dict[str, float] = cli(
        "eval", path, given.images, "--views", given.views, "--metrics", "psnr,ssim", *corner
    )["metrics"]
    return found


def made(way: str, to: str, budget: float, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One student: how long it took, how large it is, and its dB on the real test views."""
    out = folder / f"{way}-{to}-{budget:g}.safetensors"
    source = [given.teacher] if way == "distilled" else ["train", given.images]
    report = cli(*source, "--to", to, "-o", out, "--budget", f"{budget:g}s", "--seed", str(given.seed), "--force")
    judged = judge(out, given, way == "distilled")
    row = {
        "way": way,
        "to": to,
        "budget": budget,
        "wall": report["wall"],
        "cpu": report["cpu_seconds"],
        "bytes": out.stat().st_size,
        "psnr": judged["psnr"],
        "ssim": judged["ssim"],
        "fidelity": (report["fidelity"] or {}).get("psnr"),
    }
    print(json.dumps(row), flush=True)
    return row


def reached(rows: list[dict[str, Any]], level: float) -> float | None:
    """Seconds in which ``rows``, by time, come to ``level`` dB, between two runs by straight lines; None if never."""
    before = None
    for row in sorted(rows, key=lambda r: r["wall"]):
        if row["psnr"] >= level:
            if before is None:
                return float(row["wall"])
            part = (level - before["psnr"]) / (row["psnr"] - before["psnr"])
            return float(before["wall"] + part * (row["wall"] - before["wall"]))
        before = row
    return None


def text(rows: list[dict[str, Any]], teacher: float, given: argparse.Namespace) -> str:
    """What is known so far, as Markdown."""
    head = ["student", "budget s", "scratch dB", "s", "MB", "distilled dB", "s", "MB", "gain dB", "bar", "met"]
    body, times = [], []
    for to in given.to:
        twins = {way: [r for r in rows if r["to"] == to and r["way"] == way] for way in ("scratch", "distilled")}
        for a, b in zip(twins["scratch"], twins["distilled"]):
            gain, bar = b["psnr"] - a["psnr"], BAR.get(to, 0.0)
            cells = [to, f"{a['budget']:g}"]
            for r in (a, b):
                cells += [f"{r['psnr']:.2f}", f"{r['wall']:.0f}", f"{r['bytes'] / 1e6:.1f}"]
            body.append([*cells, f"{gain:+.2f}", f"{bar:g}", "yes" if gain >= bar else "no"])
        if twins["scratch"]:
            level = max(r["psnr"] for r in twins["scratch"])
            slow, fast = reached(twins["scratch"], level), reached(twins["distilled"], level)
            ratio = f"{slow / fast:.1f}x" if slow and fast else "not reached"
            times.append([to, f"{level:.2f}", *("-" if t is None else f"{t:.0f}" for t in (slow, fast)), ratio])
    return (
        f"# Distilled against trained from scratch: lego, real test pictures\n\n{on(machine())}\n\n"
        f"dB and seconds by `benchmarks/from_scratch.py`: mean over the views {given.views} at 400 px; the teacher "
        f"({Path(given.teacher).name}) itself has {teacher:.2f} dB there. Seconds are those of the whole command.\n\n"
        + markdown(head, body)
        + "\nSeconds to the best dB that training from scratch came to:\n\n"
        + markdown(["student", "dB", "scratch s", "distilled s", "ratio"], times)
        + f"\n![dB over seconds]({given.name}.svg)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--to", nargs="+", default=["ngp", "tensorf", "plenoxels", "tensorf-cp", "dvgo", "nerf"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[30.0, 90.0, 240.0], help="seconds, ascending")
    parser.add_argument("--teacher", type=Path, default=DATA / "checkpoints" / "bmild-lego")
    parser.add_argument("--images", type=Path, default=DATA / "images" / "nerf_synthetic_lego400")
    parser.add_argument("--views", default="r_0,r_48,r_100,r_148")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="from-scratch")
    given = parser.parse_args()
    teacher = judge(given.teacher, given, True)["psnr"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for to in given.to:
            for budget in given.budgets:
                rows += [made(way, to, budget, given, Path(folder)) for way in ("scratch", "distilled")]
            # After each student: a long run that is stopped keeps what it had.
            save(given.name, text(rows, teacher, given), {"machine": machine(), "teacher": teacher, "rows": rows})
            lines = {
                f"{to} {way}": [(r["wall"], r["psnr"]) for r in rows if (r["to"], r["way"]) == (to, way)]
                for to in dict.fromkeys(r["to"] for r in rows)
                for way in ("scratch", "distilled")
            }
            curves(RESULTS / f"{given.name}.svg", "seconds", "dB on real test views", lines)


if __name__ == "__main__":
    main()
