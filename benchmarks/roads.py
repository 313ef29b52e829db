"""From pictures to a converted field and back to pictures, on real data and on a generated set: the whole road, judged.

    python benchmarks/roads.py --budget 90s

nsvf      the sample's teacher rendered into a folder in NSVF's layout (Tanks and Temples): train -> convert -> eval
fern      llff_fern, forward-facing: train -> convert -> eval on its held-out views
krrish94  somebody else's fern weights: convert -> eval, teacher and student on the same real views
suzanne   instant-ngp's transforms.json with alpha: train -> eval
stream    eval on 20 and on 200 pictures of 256 px: the most memory that was resident

Every step is one command line. The table goes to benchmarks/results/roads.{md,json}. The real data is needed
(PVDCONVERT_DATA or ../shared/data) but for nsvf and stream.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import cli, machine, markdown, on, save

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
SAMPLE = HERE.parent / "examples" / "ngp.ckpt"
PREFIX = {"train": 0, "val": 1, "test": 2}
"""What NSVF's files of a split begin with."""
Row = dict[str, Any]


def pictures(folder: Path, splits: dict[str, int], size: int) -> Path:
    """The sample's teacher in NSVF's layout: poses in OpenCV's axes, RGB over its backdrop."""
    import numpy as np
    from PIL import Image

    from pvdconvert.cameras import sphere_cameras
    from pvdconvert.loading import open_field
    from pvdconvert.prepare import prepare
    from pvdconvert.render.images import render_camera, to_uint8

    loaded = open_field(SAMPLE)
    ready = prepare(loaded.field, loaded.scene)
    for name in ("pose", "rgb"):
        (folder / name).mkdir(parents=True)
    for number, (split, count) in enumerate(splits.items()):
        for n, camera in enumerate(sphere_cameras(ready.box, count, size, number)):
            c2w = np.eye(4)
            c2w[:3] = np.asarray(camera.c2w) * (1, -1, -1, 1)
            stem = f"{PREFIX[split]}_{split}_{n:04d}"
            np.savetxt(folder / "pose" / f"{stem}.txt", c2w)
            image = render_camera(ready.field, loaded.scene, camera, ready.occupancy, ready.step)
            Image.fromarray(to_uint8(image.rgb)).save(folder / "rgb" / f"{stem}.png")
    four = np.eye(4)
    four[0, 0], four[1, 1], four[0, 2], four[1, 2] = camera.fx, camera.fy, camera.cx, camera.cy
    np.savetxt(folder / "intrinsics.txt", four)
    (folder / "bbox.txt").write_text(" ".join(map(str, (*ready.box.min, *ready.box.max, 0.1))) + "\n")
    return folder


def judged(road: str, step: str, path: Path, dataset: Path, made: Row | None, *words: str) -> Row:
    """The field at ``path`` on the dataset's test pictures, with what was spent on making it."""
    found = cli("eval", path, dataset, "--metrics", "psnr,ssim", *words)
    row = {
        "road": road,
        "step": step,
        "psnr": found["metrics"]["psnr"],
        "ssim": found["metrics"]["ssim"],
        "views": len(found["views"]),
        "seconds": None if made is None else made["wall"],
        "fidelity": None if made is None else (made.get("fidelity") or {}).get("psnr"),
        "peak_mb": found["peak"] / 1e6,
    }
    print(row, flush=True)
    return row


def trained(road: str, dataset: Path, to: str, then: str, folder: Path, given: argparse.Namespace) -> list[Row]:
    """train -> eval -> convert -> eval."""
    teacher, student = folder / f"{road}-{to}.safetensors", folder / f"{road}-{then}.safetensors"
    made = cli("train", dataset, "--to", to, "-o", teacher, "--budget", given.budget, "--force")
    rows = [judged(road, f"trained {to}", teacher, dataset, made)]
    made = cli(teacher, "--to", then, "-o", student, "--budget", given.budget, "--force")
    return [*rows, judged(road, f"{to} -> {then}", student, dataset, made)]


def nsvf(folder: Path, given: argparse.Namespace) -> list[Row]:
    dataset = pictures(folder / "nsvf", {"train": 80, "test": 12}, 160)
    return trained("nsvf", dataset, "ngp", "tensorf", folder, given)


def fern(folder: Path, given: argparse.Namespace) -> list[Row]:
    return trained("fern", DATA / "images/llff_fern", "ngp", "tensorf", folder, given)


def krrish94(folder: Path, given: argparse.Namespace) -> list[Row]:
    teacher, dataset = DATA / "checkpoints/krrish94-fern", DATA / "images/llff_fern"
    warp = [word for pair in ("width=504", "height=378", "focal=407.5") for word in ("--extra", pair)]
    rows = [judged("krrish94", "fern's own weights", teacher, dataset, None, *warp)]
    for to in ("ngp", "tensorf", "plenoxels"):
        out = folder / f"krrish94-{to}.safetensors"
        made = cli(teacher, "--to", to, "-o", out, "--budget", given.budget, "--force", *warp)
        rows.append(judged("krrish94", f"nerf -> {to}", out, dataset, made, "--pixel-offset", "0"))
    return rows


def suzanne(folder: Path, given: argparse.Namespace) -> list[Row]:
    dataset, out = DATA / "images/ngp_suzanne", folder / "suzanne.safetensors"
    made = cli("train", dataset, "--to", "ngp", "-o", out, "--budget", given.budget, "--downscale", "4", "--force")
    return [judged("suzanne", "trained ngp", out, dataset, made, "--downscale", "4")]


def stream(folder: Path, _: argparse.Namespace) -> list[Row]:
    dataset = pictures(folder / "stream", {"test": 200}, 256)
    rows = []
    for views in ("20", "200"):
        rows.append(judged("stream", f"{views} views", SAMPLE, dataset, None, "--views", views))
    return rows


ROADS: dict[str, Callable[[Path, argparse.Namespace], list[Row]]] = {
    "nsvf": nsvf,
    "fern": fern,
    "krrish94": krrish94,
    "suzanne": suzanne,
    "stream": stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=list(ROADS), help="default: all")
    parser.add_argument("--budget", default="90s", help="of each training and each conversion")
    parser.add_argument("--name", default="roads")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for road in given.roads:
            rows += ROADS[road](Path(folder), given)

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    table = markdown(
        ["road", "field", "real PSNR, dB", "SSIM", "views", "fidelity/1, dB", "made in s", "eval's peak MB"],
        [
            [
                *(r["road"], r["step"], shown(r["psnr"], 2), shown(r["ssim"], 4), r["views"]),
                *(shown(r["fidelity"], 2), shown(r["seconds"], 0), shown(r["peak_mb"], 0)),
            ]
            for r in rows
        ],
    )
    found = machine()
    text = (
        f"# From pictures to a converted field and back\n\n{on(found)}. Budget of each step: {given.budget}.\n\n{table}"
    )
    save(given.name, text, {"machine": found, "budget": given.budget, "rows": rows})


if __name__ == "__main__":
    main()
