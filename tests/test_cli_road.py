"""The real road through the real command line, on a file of a few kilobytes: every command that needs torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene

SIDE = 16


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A striped ball of radius 0.25 as plenoxels, in a box of side 2, over white."""
    path = tmp_path_factory.mktemp("ball") / "ball.safetensors"
    write_ball(path, radius=0.25)
    return path


def ball_parts(radius: float, color: float = 2.0, scene: Scene | None = None) -> Parts:
    """A striped ball of ``radius`` as plenoxels, in a box of side 2 over white unless ``scene`` says otherwise."""
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    x = grid / (SIDE - 1) * 2 - 1
    density = np.log(60.0) - 80.0 * np.maximum(np.linalg.norm(x, axis=1) - radius, 0.0)
    sh = np.zeros((len(grid), 3), np.float32)
    sh[:, 0] = color * np.sin(5 * x[:, 0])
    sh[:, 2] = color * np.cos(4 * x[:, 2])
    tensors = {
        "vertices": ArrayTensor(grid.astype(np.int16)),
        "density_data": ArrayTensor(density.astype(np.float32)[:, None]),
        "sh_data": ArrayTensor(sh),
    }
    config = {"resolution": SIDE, "bands": 1, "shape": [SIDE] * 3}
    return Parts("plenoxels", config, tensors, scene or Scene(Box.cube(1.0), background=(1.0, 1.0, 1.0)))


def write_ball(path: Path, radius: float, color: float = 2.0) -> None:
    default().format("pvdconvert").write(ball_parts(radius, color), path)


def cli(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pvdconvert", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_render_writes_the_views_it_was_asked_for(ball: Path, tmp_path: Path) -> None:
    told = json.loads(ok(cli("render", ball, "--views", "2", "--size", "32", "-o", "v.png", "--json", cwd=tmp_path)))
    assert [row["path"] for row in told["images"]] == ["v-00.png", "v-01.png"]
    assert sorted(os.listdir(tmp_path)) == ["v-00.png", "v-01.png"]
    pixels = np.asarray(Image.open(tmp_path / "v-00.png"))
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert (pixels[16, 16] < 250).any()
    assert not np.array_equal(pixels, np.asarray(Image.open(tmp_path / "v-01.png")))
    again = cli("render", ball, "--views", "2", "--size", "32", "-o", "v.png", cwd=tmp_path)
    assert again.returncode == 9
    assert again.stderr.splitlines() == ["pvdconvert: error: v-00.png: exists (--force overwrites it)"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "v-00.png").stat().st_mode & 0o777 == 0o666 & ~umask


def test_render_through_given_cameras(ball: Path, tmp_path: Path) -> None:
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]
    frames = [{"file_path": "a", "transform_matrix": pose}] * 3
    (tmp_path / "t.json").write_text(json.dumps({"w": 24, "h": 16, "fl_x": 20.0, "frames": frames}))
    ok(cli("render", ball, "--cameras", "t.json", "--views", "1", "-o", "one", "--background", "black", cwd=tmp_path))
    pixels = np.asarray(Image.open(tmp_path / "one.png"))
    assert pixels.shape == (16, 24, 3)


def test_compare_tells_equal_from_different_and_gates(ball: Path, tmp_path: Path) -> None:
    small = ["--views", "2", "--size", "32"]
    same = json.loads(ok(cli("compare", ball, ball, *small, "--json", cwd=tmp_path)))
    assert same["schema"] == "pvdconvert/compare/1"
    assert same["fidelity"]["identical"] is True
    write_ball(tmp_path / "other.safetensors", radius=0.35)
    done = cli("compare", ball, "other.safetensors", *small, "--min-psnr", "60", "--images", "pics", cwd=tmp_path)
    assert done.returncode == 6
    assert "below the 60 dB asked for" in done.stderr.splitlines()[-1]
    assert "PSNR of B against A" in done.stdout
    pixels = np.asarray(Image.open(tmp_path / "pics" / "view-00.png"))
    assert pixels.shape == (32, 3 * 32 + 2 * 4, 3)
    assert pixels[:, 72:].max() > 20


def test_the_same_architecture_is_only_laid_out_anew(ball: Path, tmp_path: Path) -> None:
    told = json.loads(ok(cli(ball, "--to", "plenoxels", "-o", "copy.safetensors", "--json", cwd=tmp_path)))
    assert told["plan"]["kind"] == "transcode"
    same = json.loads(
        ok(cli("compare", ball, "copy.safetensors", "--views", "1", "--size", "24", "--json", cwd=tmp_path))
    )
    assert same["fidelity"]["identical"] is True


@pytest.mark.slow
def test_convert_writes_reports_and_gates(ball: Path, tmp_path: Path) -> None:
    quick = ["--to", "ngp", "--budget", "4s", "--set", "log2_table=10", "--set", "levels=4"]
    told = ok(cli(ball, *quick, "-o", "s.safetensors", "--report", "r.json", cwd=tmp_path))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == "pvdconvert/report/1"
    assert "wrote s.safetensors" in told
    assert report["target"]["config"]["levels"] == 4
    order = [s["name"] for s in report["stages"] if s["name"] in ("features", "density", "color", "render")]
    assert order == ["features", "density", "color", "render"]
    for name in order:
        assert name in told
    assert f"{report['fidelity']['psnr']:.2f} dB" in told
    assert json.loads(ok(cli("inspect", "s.safetensors", "--json", cwd=tmp_path)))["architecture"] == "ngp"
    gated = cli(ball, *quick, "-o", "g.safetensors", "--min-psnr", "90", cwd=tmp_path)
    assert gated.returncode == 6
    assert "below the 90 dB" in gated.stderr.splitlines()[-1]
    assert not (tmp_path / "g.safetensors").exists()


@pytest.mark.slow
def test_dry_run_writes_nothing(ball: Path, tmp_path: Path) -> None:
    told = ok(cli(ball, "--to", "tensorf", "--budget", "4s", "--dry-run", cwd=tmp_path))
    assert "nothing was written" in told
    assert "ball-tensorf.safetensors" in told
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs POSIX signals")
def test_interrupt_then_resume(ball: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-m", "pvdconvert", str(ball), "--to", "ngp", "--budget", "12s", "-o", "s.safetensors"]
    args += ["--set", "log2_table=10", "--progress", "json"]
    with subprocess.Popen(args, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "stage" and event["stage"] == "color":
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(120) == 130, rest
    assert "--resume" in rest.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["s.safetensors.resume"]
    done = cli(*args[3:], "--resume", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["s.safetensors"]


def test_wrong_weights_are_one_line_and_leave_nothing(ball: Path, tmp_path: Path) -> None:
    raw = ball.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    write_ball(tmp_path / "nan.safetensors", radius=float("nan"))
    for name, code in (("cut.safetensors", 3), ("nan.safetensors", 10)):
        done = cli(name, "--to", "ngp", "-o", "out.safetensors", "--progress", "none", cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert name in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["cut.safetensors", "nan.safetensors"]


def test_a_device_that_is_not_there(ball: Path, tmp_path: Path) -> None:
    done = cli(ball, "--to", "ngp", "--device", "cuda:99", "--progress", "none", cwd=tmp_path)
    assert done.returncode == 7
    assert "cuda:99" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_doctor_reports_this_machine(tmp_path: Path) -> None:
    done = cli("doctor", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["schema"] == "pvdconvert/doctor/1"
    assert document["torch"]["devices"][0] == "cpu"
    assert "torch" in document["kernels"]["backends"]
    assert (done.returncode == 0) is (document["problems"] == [])
    text = cli("doctor", cwd=tmp_path)
    assert text.returncode == done.returncode
    assert document["python"] in text.stdout


@pytest.mark.slow
def test_selftest_of_a_format(tmp_path: Path) -> None:
    done = cli("selftest", "pvdconvert", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 5)
    assert document["ok"] is True, document["checks"]
    assert len(document["checks"]) > 3
