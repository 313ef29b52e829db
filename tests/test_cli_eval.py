"""``pvdconvert eval`` through the real command line: a striped ball, judged by pictures of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene

SIDE, PIXELS, ANGLE = 16, 32, 0.6
BLOCK = """
import contextlib, io, json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numba"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from pvdconvert.cli.main import run
told = []
for options in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["eval", *options])
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def write_ball(path: Path) -> None:
    """An opaque grey ball of radius 0.5 as plenoxels, in a box of side 2, over white; byte 102 everywhere on it."""
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    distance = np.linalg.norm(grid / (SIDE - 1) * 2 - 1, axis=1)
    density = np.log(200.0) - 80.0 * np.maximum(distance - 0.5, 0.0)
    sh = np.full((len(grid), 3), np.log(0.4 / 0.6) / 0.28209479, np.float32)  # the logistic of this times Y_0 is 0.4
    tensors = {
        "vertices": ArrayTensor(grid.astype(np.int16)),
        "density_data": ArrayTensor(density.astype(np.float32)[:, None]),
        "sh_data": ArrayTensor(sh),
    }
    config = {"resolution": SIDE, "bands": 1, "shape": [SIDE] * 3}
    scene = Scene(Box.cube(1.0), background=(1.0, 1.0, 1.0))
    default().format("pvdconvert").write(Parts("plenoxels", config, tensors, scene), path)


def write_pictures(folder: Path) -> None:
    """RGBA pictures from all sides in NeRF-Synthetic's layout: a disc of byte 112, a tenth brighter than the ball, as
    large as a ball of radius 0.5 is seen from distance 4 in closed form."""
    frames: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    focal = PIXELS / 2 / np.tan(ANGLE / 2)
    j, i = (np.mgrid[0:PIXELS, 0:PIXELS] + 0.5 - PIXELS / 2) / focal
    inside = np.hypot(i, j) < 0.5 / np.sqrt(4.0**2 - 0.5**2)
    pixels = np.zeros((PIXELS, PIXELS, 4), np.uint8)
    pixels[inside] = (112, 112, 112, 255)
    for k in range(8):
        split = "test" if k % 2 else "train"
        a = 2 * np.pi * k / 8
        back = np.array([np.cos(a), np.sin(a), 0.3 * np.cos(3 * a)])
        back /= np.linalg.norm(back)
        right = np.cross([0, 0, 1], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, 4 * back], 1)
        (folder / split).mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(folder / split / f"r_{k}.png")
        frames[split].append({"file_path": f"./{split}/r_{k}", "transform_matrix": pose.tolist()})
    for split, rows in frames.items():
        text = json.dumps({"camera_angle_x": ANGLE, "frames": rows})
        (folder / f"transforms_{split}.json").write_text(text)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_ball(folder / "ball.safetensors")
    write_pictures(folder / "set")
    return folder


def cli(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pvdconvert", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def test_figures_of_a_known_difference(here: Path) -> None:
    """Ten bytes on the disc, nothing elsewhere but on its rim: 20 log10(25.5) - 10 log10(share of the disc), nearly."""
    done = cli("eval", "ball.safetensors", "set", "--json", "--out-images", "seen", "--report", "r.html", cwd=here)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == "pvdconvert/eval/1"
    assert told["dataset"] == {"path": "set", "format": "blender", "split": "test", "frames": 4}
    assert told["field"]["architecture"] == "plenoxels"
    assert [v["name"].split("/")[-1] for v in told["views"]] == ["r_1", "r_3", "r_5", "r_7"]
    assert told["background"] == [1, 1, 1]
    assert told["pixel_offset"] == 0.5
    shown = [np.asarray(Image.open(p), dtype=np.float64) for p in (here / "seen" / f"r_{k}.png" for k in (1, 3, 5, 7))]
    for view, picture in zip(told["views"], shown):
        assert picture.shape == (PIXELS, 3 * PIXELS + 8, 3)
        truth, field = picture[:, :PIXELS], picture[:, PIXELS + 4 : 2 * PIXELS + 4]
        assert truth[16, 16].tolist() == [112] * 3
        assert np.abs(field[12:20, 12:20] - 102).max() <= 1
        # The figures are those of the pictures that were written.
        error = ((truth - field) ** 2).mean() / 255**2
        assert view["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-9)
    assert told["metrics"]["psnr"] == pytest.approx(np.mean([v["psnr"] for v in told["views"]]))
    assert 0.5 < told["metrics"]["ssim"] < 1
    assert 0 < told["metrics"]["flip"] < 0.3
    page = (here / "r.html").read_text(encoding="utf-8")
    assert "r_3" in page
    assert "pvdconvert/eval/1" in page


def test_a_table_for_people_and_a_gate(here: Path) -> None:
    done = cli(
        "eval",
        "ball.safetensors",
        "set",
        "--views",
        "r_3",
        "--metrics",
        "psnr",
        "--min-psnr",
        "70",
        "--pixel-offset",
        "0.25",
        cwd=here,
    )
    assert done.returncode == 6
    assert "below the 70 dB asked for" in done.stderr.splitlines()[-1]
    assert "1 of 4 views, split test" in done.stdout
    assert "images/1: 8-bit, background 1,1,1, rays at 0.25 of a pixel" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["view", "pixels", "PSNR", "dB"] in rows
    assert "note  rays pass pixels at (0.25, 0.25), not at their centres" in done.stdout
    assert any(row[:1] == ["mean"] and 10 < float(row[1]) < 40 for row in rows)


REFUSED = [
    (["missing.pt", "set"], 3, "missing.pt: no such file"),
    (["ball.safetensors", "nowhere"], 3, "nowhere: no such file"),
    (["ball.safetensors", "seen-none"], 3, "seen-none"),
    (["ball.safetensors", "ball.safetensors"], 4, "no layout of posed pictures"),
    (["ball.safetensors", "set", "--split", "val"], 2, "no frames in split 'val'"),
    (["ball.safetensors", "set", "--views", "r_2"], 2, "no view 'r_2'"),
    (["ball.safetensors", "set", "--views", "0"], 2, "--views 0: at least one"),
    (["ball.safetensors", "set", "--metrics", "psnr,vmaf"], 2, "--metrics vmaf: unknown"),
    (["ball.safetensors", "set", "--metrics", "lpips"], 2, "--lpips-weights FILE"),
    (["ball.safetensors", "set", "--metrics", "psnr", "--lpips-weights", "w"], 2, "without lpips"),
    (["ball.safetensors", "set", "--lpips-weights", "w.pth"], 3, "w.pth: no such file"),
    (["ball.safetensors", "set", "--world", "1,2,3"], 2, "--world 1,2,3: 3 numbers"),
    (["ball.safetensors", "set", "--world", "one"], 2, "--world one: no matrix"),
    (["ball.safetensors", "set", "--world", "w.json"], 3, "--world w.json: cannot be read"),
    (["ball.safetensors", "set", "--world", "1,0,0,0,0,2,0,0,0,0,1,0"], 10, "mirrored, sheared or stretched"),
    (["ball.safetensors", "set", "--out-images", "ball.safetensors"], 9, "is not a folder"),
    (["ball.safetensors", "set", "--min-psnr", "-1"], 2, "--min-psnr"),
]


def test_refusals_come_before_torch(here: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", BLOCK, json.dumps([options for options, _, _ in REFUSED])]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, check=True)
    for (options, code, text), (got, out, err) in zip(REFUSED, json.loads(done.stdout), strict=True):
        assert out == "", options
        assert len(err.splitlines()) == 1, options
        assert text in err, options
        assert got == code, options


def test_a_matrix_leads_from_world_to_world(here: Path) -> None:
    """The same ball, photographed a hundred units away."""
    away = here / "away"
    write_pictures(away)
    for split in ("train", "test"):
        path = away / f"transforms_{split}.json"
        data = json.loads(path.read_text())
        for row in data["frames"]:
            row["transform_matrix"][0][3] += 100.0
        path.write_text(json.dumps(data))
    (here / "world.json").write_text(json.dumps([[1, 0, 0, 100], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    done = cli("eval", "ball.safetensors", "away", "--views", "1", "--world", "world.json", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    # The disc is a tenth brighter than the ball: 10 bytes on the share that it covers, and what its rim costs.
    assert 15 < json.loads(done.stdout)["metrics"]["psnr"] < 20 * np.log10(25.5) + 12
