"""Training from images: dB on test views by CPU-seconds, on tiny_nerf_data.npz (100 px; 100 views train, 6 test).

    python benchmarks/train.py --to ngp tensorf plenoxels --seconds 240

Needs the real data (PVDCONVERT_DATA or ../shared/data). Time is that of the process over all its threads, so that other
work on the machine does not count; the budget is that over the threads. The table goes to benchmarks/results/train.md
and .json. Lego is CC-BY-NC: numbers only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
TINY = DATA / "images" / "tiny_nerf_data.npz"


def test_db(field: Any, scene: Any, cells: Any, frames: Any) -> float:
    """Mean PSNR of 8-bit views through the test cameras."""
    import dataclasses

    import numpy as np

    from pvdconvert.metrics import psnr
    from pvdconvert.render.images import render_camera, to_uint8

    scores = []
    # As its own cameras rendered it: from near to far.
    bare = dataclasses.replace(scene, cameras=())
    for frame in frames:
        picture = frame.read()
        color = picture[..., :3].astype(np.float64) / 255
        if picture.shape[2] == 4:
            alpha = picture[..., 3:].astype(np.float64) / 255
            color = color * alpha + (1 - alpha) * np.asarray(scene.backdrop)
        image = render_camera(field, bare, frame.camera, cells)
        scores.append(psnr(to_uint8(color), to_uint8(image.rgb)))
    return float(np.mean(scores))


def measure(to: str, path: Path, seconds: float, threads: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train ``to`` for ``seconds`` of CPU on ``threads`` threads; dB on the test views after each part."""
    from pvdconvert.data.opening import open_dataset
    from pvdconvert.training import train

    dataset = open_dataset(path)
    test = dataset.split("test")[: given.views]
    curve: list[dict[str, float]] = []
    begin, aside = time.process_time(), 0.0

    def clock() -> float:
        return (time.process_time() - begin - aside) / threads

    def watch(trainer: Any, spent: float) -> None:
        nonlocal aside
        start = time.process_time()
        field = trainer.student.eval()
        score = test_db(field, trainer.scene, trainer.live, test)
        field.train()
        curve.append({"cpu_seconds": round(spent * threads, 1), "test_db": round(score, 2)})
        print(f"{to}: {curve[-1]} ({trainer.drawn} rays)", flush=True)
        aside += time.process_time() - start

    sets = dict(pair.split("=", 1) for pair in given.set)
    report = train(
        dataset,
        to,
        preset=given.preset,
        budget=seconds / threads,
        sampling=given.sampling,
        sets=sets,
        clock=clock,
        watch=watch,
        seed=given.seed,
    )
    data = report.to_json()
    return {
        "to": to,
        "sampling": given.sampling,
        "cpu_seconds": round(clock() * threads, 1),
        "test_db": curve[-1]["test_db"],
        "held_out_db": round(data["stages"][-1]["psnr_after"], 2),
        "megabytes": round(data["target"]["bytes"] / 1e6, 2),
        "rays": data["plan"]["rays"],
        "peak_mb": round(data["peak_bytes"] / 1e6),
        "curve": curve,
        "stages": data["stages"],
        "config": data["plan"]["config"],
        "replay": data["replay"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| student | sampling | CPU-s | test dB | held-out dB | MB | rays | dB on the way (CPU-s: dB) |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---|")
    for r in rows:
        way = ", ".join(f"{p['cpu_seconds']:.0f}: {p['test_db']:.1f}" for p in r["curve"])
        lines.append(
            f"| {r['to']} | {r['sampling']} | {r['cpu_seconds']:.0f} | {r['test_db']:.2f} | {r['held_out_db']:.2f} "
            f"| {r['megabytes']} | {r['rays'] / 1e6:.1f} M | {way} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--to", nargs="+", default=["ngp", "tensorf", "plenoxels"])
    parser.add_argument("--data", type=Path, default=TINY)
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU-seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--sampling", default="occupancy")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train")
    given = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    from pvdconvert import launch

    launch.prepare()
    import torch

    torch.set_num_threads(given.threads)
    rows = [measure(to, given.data, given.seconds, given.threads, given) for to in given.to]
    given.out.parent.mkdir(exist_ok=True, parents=True)
    machine = f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}"
    given.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    text = (
        f"# Trained from images: {given.data.name}\n\n"
        f"`benchmarks/train.py`, preset {given.preset}, {given.seconds:g} CPU-seconds ({machine}). dB: mean PSNR of "
        "8-bit pictures on the test views; held-out: on pixels of the training views that were never trained on.\n\n"
    )
    given.out.with_suffix(".md").write_text(text + table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
