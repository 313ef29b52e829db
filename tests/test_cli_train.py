"""``pvdconvert train`` as a user runs it: a process of its own, its streams and exit codes; refusals before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import posed
from tests.memory import PEAK


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight views of 24 px as tiny_nerf_data.npz has them: over black, without alpha."""
    frames = posed.frames(8, 24, 5, opaque=True)
    poses = np.tile(np.eye(4), (8, 1, 1))
    poses[:, :3] = [f.camera.c2w for f in frames]
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    images = np.stack([f.read() for f in frames]).astype(np.float32) / 255
    np.savez(path, images=images, poses=poses.astype(np.float32), focal=np.float64(frames[0].camera.fx))
    return path


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pvdconvert", "train", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_field_is_trained_and_written(tiny: Path, tmp_path: Path) -> None:
    steps = "scout-1=12;scout-2=12;train-1=6;train-2=6;train-3=6;train-4=6"
    done = run(
        tiny, "--to", "ngp", "-o", "out.safetensors", "--preset", "fast", "--replay", steps, "--json", "--seed", 3,
        "--set", "log2_table=12", "--set", "levels=4", "--report", "report.json", "--progress", "plain",
        "--bounds=-1,-1,-1,1,1,1", "--background", "black", "--threads", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "pvdconvert/report/1"
    assert report["plan"]["kind"] == "train"
    assert report["source"]["format"] == "tiny-nerf"
    assert report["source"]["split"] == "train"
    assert [s["steps"] for s in report["stages"] if s["planned"]] == [12, 12, 6, 6, 6, 6]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "[train-4]" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "report.json"]
    seen = subprocess.run(
        [sys.executable, "-m", "pvdconvert", "inspect", "out.safetensors", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "trained from images" in seen.stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["missing.npz", "--to", "ngp"], 3, "missing.npz: no such file or folder"),
        (["DATA"], 2, "--to is missing"),
        (["DATA", "--to", "npg"], 4, "npg"),
        (["DATA", "--to", "ngp", "--split", "val"], 2, "splits: train (7), test (1)"),
        (["DATA", "--to", "ngp", "--split", "all"], 2, "--split all"),
        (["DATA", "--to", "ngp", "--sampling", "cells"], 2, "--sampling cells"),
        (["DATA", "--to", "ngp", "--set", "levles=3"], 2, "levels"),
        (["DATA", "--to", "ngp", "--budget", "soon"], 2, "--budget soon"),
        (["DATA", "--to", "ngp", "--bounds", "0,0,0,0,1,1"], 2, "--bounds"),
        (["DATA", "--to", "ngp", "--near", "3", "--far", "2"], 2, "--near"),
        (["DATA", "--to", "ngp", "--budget", "9s", "--replay", "train-1=3"], 2, "contradict"),
        (["DATA", "--to", "ngp", "-o", "no/out.safetensors"], 9, "no such folder"),
        (["DATA", "--to", "ngp", "--resume"], 2, "--resume"),
        (["other.txt", "--to", "ngp"], 4, "no layout of posed pictures"),
    ],
)
def test_refusals_are_one_line_and_come_before_torch(
    tiny: Path, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    (tmp_path / "other.txt").write_text("not pictures")
    args = [str(tiny) if a == "DATA" else a for a in args]
    script = (
        "import sys\nfrom pvdconvert.cli.main import run\n"
        f"code = run({['train', *args]!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_four_hundred_large_pictures_stay_below_a_bound(tmp_path: Path) -> None:
    """400 pictures of 1920 x 1080: 3.3 GB of pixels, trained on in less than 1.5 GB."""
    script = (
        PEAK
        + """
import dataclasses
import numpy as np
from pvdconvert.cameras import sphere_cameras
from pvdconvert.data import Dataset, Frame
from pvdconvert.scene import Box
from pvdconvert.training import train

base = np.zeros((1080, 1920, 4), np.uint8)
base[340:740, 760:1160] = (200, 120, 40, 255)
square = sphere_cameras(Box.cube(1.0), 400, 1080, 5)
cameras = [dataclasses.replace(c, width=1920, cx=960.0) for c in square]
frames = tuple(Frame(f"{k:03d}", c, base.copy) for k, c in enumerate(cameras))
data = Dataset(Path("large"), "made", {"train": frames}, box=Box.cube(1.0), background=(0.0, 0.0, 0.0))
steps = "scout-1=3/3;scout-2=3/3;train-1=3/3;train-2=3/3;train-3=3/3;train-4=3/3"
report = train(data, "ngp", preset="balanced", steps=steps, out="large.safetensors")
assert report.source["pixels"] == 400 * 1920 * 1080
print(peak())
"""
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1_500_000_000
