"""Videos: what is in the files, how they come about, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pvdconvert.cameras import Camera, look_at
from pvdconvert.cli import filming
from pvdconvert.cli.main import run
from pvdconvert.errors import OutputError, PluginError, UsageError
from pvdconvert.render import video
from pvdconvert.render.video import camera_path, encoder, writer
from tests.test_cli_road import write_ball

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (20, 30, 40), (250, 250, 10)]


def frames(width: int = 24, height: int = 16) -> list[Any]:
    """One plain colour each, with a white corner."""
    out = [np.full((height, width, 3), color, dtype=np.uint8) for color in COLORS]
    for frame in out:
        frame[:4, :4] = 255
    return out


def film(path: Path, pictures: Sequence[Any], fps: float) -> None:
    with writer(path, path, fps) as add:
        for picture in pictures:
            add(picture)


def test_a_gif_holds_every_frame_as_it_was(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", frames(), 30.0)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.size, getattr(gif, "n_frames", 0), gif.info["loop"]) == ((24, 16), 5, 0)
        lengths = []
        for n, expected in enumerate(frames()):
            gif.seek(n)
            lengths.append(gif.info["duration"])
            assert np.array_equal(np.asarray(gif.convert("RGB")), expected)
    # 30 frames a second in hundredths: the whole is 5/30 s = 17, by frames that end at 3, 7, 10, 13, 17.
    assert lengths == [30, 40, 30, 30, 40]


def test_many_colours_are_close_in_a_gif(tmp_path: Path) -> None:
    ramp = np.stack(np.meshgrid(np.arange(64) * 4, np.arange(64) * 4, indexing="ij"), -1)
    picture = np.concatenate([ramp, np.full((64, 64, 1), 90)], -1).astype(np.uint8)
    film(tmp_path / "a.gif", [picture], 10.0)
    with Image.open(tmp_path / "a.gif") as gif:
        back = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(back - picture).mean() < 8  # 256 boxes of 16 x 16 levels: 4 a channel on average, and dithering


def program() -> str:
    try:
        return encoder(Path("x.mp4"))
    except PluginError:
        pytest.skip("no ffmpeg: pip install -c constraints.txt -e '.[video]'")


@pytest.mark.parametrize("size", [(24, 16), (25, 17)])
def test_an_mp4_shows_the_frames_in_order(tmp_path: Path, size: tuple[int, int]) -> None:
    ffmpeg = program()
    film(tmp_path / "a.mp4", frames(*size), 12.5)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-vf", "scale=in_color_matrix=bt709:in_range=tv", "-"]
    done = subprocess.run([ffmpeg, "-i", str(tmp_path / "a.mp4"), *raw], capture_output=True, check=True, timeout=60)
    width, height = (v + v % 2 for v in size)
    back = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    assert len(back) == len(COLORS)
    for picture, color in zip(back, COLORS, strict=True):
        assert picture[12, 16].tolist() == pytest.approx(color, abs=6)
    log = done.stderr.decode()
    assert "12.50 fps" in log or "12.5 fps" in log
    assert "yuv420p(tv, bt709" in log
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_ffmpeg_complains_of_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = script(tmp_path / "ffmpeg", "echo first >&2; echo 'no such codec' >&2; exit 3")
    monkeypatch.setattr(video, "encoder", lambda path: fake)
    big = np.zeros((512, 512, 3), np.uint8)  # more than a pipe holds
    for pictures in ([big] * 4, frames()[:1]):
        with pytest.raises(OutputError, match=r"a\.mp4: ffmpeg: no such codec"):
            film(tmp_path / "a.mp4", pictures, 10.0)


def test_no_ffmpeg_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"x\.mp4: MP4 needs ffmpeg.*pvdconvert\[video\]"):
        encoder(Path("x.mp4"))
    assert encoder(Path("x.GIF")) == ""
    with pytest.raises(UsageError, match=r"x\.avi"):
        encoder(Path("x.avi"))


def camera(angle: float, focal: float = 20.0) -> Camera:
    pose = look_at([3 * np.cos(angle), 3 * np.sin(angle), 0.0], [0.0, 0.0, 0.0])
    return Camera(24, 16, focal, focal, 12.0, 8.0, tuple(tuple(map(float, row)) for row in pose))


def test_a_path_passes_its_cameras_and_turns_between() -> None:
    given = [camera(0.0), camera(0.6, 30.0), camera(1.2)]
    assert camera_path(given, 3) == given
    path = camera_path(given, 5)
    assert [path[0], path[2], path[4]] == given
    between = path[1]
    assert between.fx == pytest.approx(25.0)
    # Half-way between two positions 0.6 rad apart on a circle; by symmetry the rotation is that at 0.3 rad.
    assert between.position == pytest.approx(0.5 * (given[0].position + given[1].position))
    rotation = np.asarray(between.c2w)[:, :3]
    assert rotation == pytest.approx(np.asarray(camera(0.3).c2w)[:, :3], abs=1e-12)
    assert camera_path(given[:1], 4) == [given[0]] * 4
    assert camera_path(given, 1) == given[:1]


def test_cameras_of_several_sizes_are_refused() -> None:
    other = camera(0.3).resized(48, 32)
    with pytest.raises(UsageError, match="24x16, 48x32"):
        filming.Film(Path("a.gif"), None, 10.0).cameras([camera(0.0), other])


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ball") / "ball.safetensors"
    write_ball(path, radius=0.25)
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--video", "a.gif", "-o", "b.png"], 2, "--video and -o contradict"),
        (["--video", "a.gif", "--views", "3"], 2, "--video and --views contradict"),
        (["--video", "a.webm"], 2, "a video of what kind? (name it with .gif or .mp4)"),
        (["--video", "a.gif", "--fps", "60"], 2, "a GIF has at most 50 frames a second"),
        (["--frames", "3"], 2, "--frames is for --video"),
        (["--fps", "3"], 2, "--fps is for --video"),
        (["--video", "no/a.gif"], 9, "no: no such folder"),
        (["--video", "there.gif"], 9, "there.gif: exists (--force overwrites it)"),
    ],
)
def test_what_cannot_be_filmed_is_one_line(
    ball: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gif").write_bytes(b"mine")
    assert run(["render", str(ball), *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert os.listdir(tmp_path) == ["there.gif"]
    assert (tmp_path / "there.gif").read_bytes() == b"mine"


def test_a_film_once_around(ball: Path, tmp_path: Path) -> None:
    def render(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "pvdconvert", "render", str(ball), *arguments]
        environment = {**os.environ, **variables}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    done = render("--video", "a.gif", "--frames", "4", "--fps", "10", "--size", "32", "--progress", "json")
    assert done.returncode == 0, done.stderr
    assert "wrote a.gif, 32x32, 4 frames (0.4 s of film)" in done.stdout
    assert '"stage": "render", "total": 4' in done.stderr
    with Image.open(tmp_path / "a.gif") as gif:
        assert getattr(gif, "n_frames", 0) == 4
        pictures = []
        for n in range(4):
            gif.seek(n)
            pictures.append(np.asarray(gif.convert("RGB")))
    assert all(picture[0, 0].tolist() == [255, 255, 255] for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.gif").stat().st_mode) == 0o666 & ~mask
    # An encoder that fails half-way leaves what was there.
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "ffmpeg", "echo 'disk full' >&2; exit 1")
    (tmp_path / "a.mp4").write_bytes(b"old")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = render("--video", "a.mp4", "--frames", "2", "--size", "32", "--force", "-q", PATH=path)
    assert done.returncode == 9
    assert done.stderr.strip() == "pvdconvert: error: a.mp4: ffmpeg: disk full"
    assert (tmp_path / "a.mp4").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.mp4", "bin"]


def test_a_gif_is_what_the_standard_says(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", frames()[:1], 10.0)
    data = (tmp_path / "a.gif").read_bytes()
    assert data[:13] == b"GIF89a" + struct.pack("<HHBBB", 24, 16, 0, 0, 0)
    assert data[13:32] == b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"
    assert data[32:40] == b"\x21\xf9\x04\x00\x0a\x00\x00\x00"
    assert data[40:49] == b"," + struct.pack("<HHHH", 0, 0, 24, 16)
    assert data[-1:] == b";"
