"""Videos, one frame at a time: GIF by ourselves, MP4 by an ffmpeg program. And paths between cameras. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import math
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.errors import OutputError, PluginError, UsageError

SUFFIXES = (".gif", ".mp4")
GIF_FPS = 50.0
"""Viewers slow down frames of less than two hundredths of a second."""

Bytes = NDArray[np.uint8]


def encoder(path: Path) -> str:
    """The program that writes videos of this suffix ("" for what needs none).

    Raises UsageError for an unknown suffix, PluginError where no ffmpeg is installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".gif":
        return ""
    if suffix != ".mp4":
        raise UsageError(f"{path}: a video of what kind?", hint=f"name it with {' or '.join(SUFFIXES)}")
    found = shutil.which("ffmpeg")
    if found is None and importlib.util.find_spec("imageio_ffmpeg") is not None:
        from imageio_ffmpeg import get_ffmpeg_exe

        with contextlib.suppress(RuntimeError):  # a wheel without a binary, on rare platforms
            found = str(get_ffmpeg_exe())
    if found is None:
        raise PluginError(
            f"{path}: MP4 needs ffmpeg, which is not installed",
            hint="pip install 'pvdconvert[video]', or install ffmpeg, or write a .gif",
        )
    return found


@contextlib.contextmanager
def writer(path: Path, name: Path, fps: float) -> Iterator[Callable[[Bytes], None]]:
    """A function that takes the frames [H, W, 3], all of one size, in order; ``path`` is complete at the end.

    ``name`` is the final name: its suffix decides the kind, and errors name it. Raises OutputError.
    """
    program = encoder(name)
    try:
        if program:
            with _mp4(path, name, fps, program) as add:
                yield add
        else:
            with path.open("wb") as file:
                yield _Gif(file, fps).add
                file.write(b";")
    except OSError as error:
        raise OutputError(f"{name}: cannot be written: {error.strerror or error}") from error


class _Gif:
    """GIF89a: every frame with the 256 colours that suit it, and nothing kept in memory."""

    def __init__(self, file: BinaryIO, fps: float) -> None:
        self.file, self.fps, self.count = file, fps, 0

    def add(self, frame: Bytes) -> None:
        from PIL import Image

        height, width = frame.shape[:2]
        if self.count == 0:
            self.file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0))
            self.file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # for ever
        single = io.BytesIO()
        Image.fromarray(frame).quantize(256, method=Image.Quantize.MEDIANCUT).save(
            single, "GIF", optimize=False, interlace=0
        )
        palette, bits, data = _taken_apart(single.getvalue())
        # Hundredths of a second; rounded so that the whole lasts as long as it should.
        begin, end = (round(100 * k / self.fps) for k in (self.count, self.count + 1))
        self.file.write(b"\x21\xf9\x04" + struct.pack("<BHBB", 0, end - begin, 0, 0))
        self.file.write(b"," + struct.pack("<HHHHB", 0, 0, width, height, 0x80 | bits) + palette + data)
        self.count += 1


def _taken_apart(gif: bytes) -> tuple[bytes, int, bytes]:
    """(colour table, its size's bits, compressed pixels) of a GIF with one picture (GIF89a, sections 18 to 22)."""
    flags = gif[10]
    bits = flags & 7
    at = 13 + (3 << (bits + 1) if flags & 0x80 else 0)
    palette = gif[13:at]
    while gif[at] == 0x21:  # extensions: label, then blocks until an empty one
        at += 2
        while gif[at]:
            at += gif[at] + 1
        at += 1
    own = gif[at + 9]
    begin = at + 10
    if own & 0x80:
        bits, palette = own & 7, gif[begin : begin + (3 << ((own & 7) + 1))]
        begin += len(palette)
    end = begin + 1
    while gif[end]:
        end += gif[end] + 1
    return palette, bits, gif[begin : end + 1]


@contextlib.contextmanager
def _mp4(path: Path, name: Path, fps: float, program: str) -> Iterator[Callable[[Bytes], None]]:
    """Frames into the standard input of ffmpeg, which runs beside us."""
    process: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as said:

        def failed() -> OutputError:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines() or ["it ended early"]
            return OutputError(f"{name}: ffmpeg: {lines[-1]}")

        def add(frame: Bytes) -> None:
            nonlocal process
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if process is None:
                command = _command(program, path, even.shape[1], even.shape[0], fps)
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
                )
            assert process.stdin is not None
            try:
                process.stdin.write(even.tobytes())
            except BrokenPipeError:
                process.wait()
                raise failed() from None

        try:
            yield add
            if process is not None:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                if process.wait() != 0:
                    raise failed()
        finally:
            if process is not None:
                process.kill()
                process.wait()
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()


def _command(program: str, path: Path, width: int, height: int, fps: float) -> list[str]:
    """H.264 that every player and browser shows: 8 bits, 4:2:0, BT.709, its index at the front."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    colors = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    coded = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]
    out = ["-movflags", "+faststart", "-f", "mp4", f"file:{path}"]
    return [program, "-y", "-loglevel", "error", *raw, "-an", *coded, *colors, *out]


def camera_path(cameras: Sequence[Camera], frames: int) -> list[Camera]:
    """``frames`` views along ``cameras`` in their order, from the first to the last.

    Between two of them position and intrinsics are interpolated linearly, and the rotation is the one nearest to the
    interpolated matrix. As many frames as cameras are the cameras themselves.
    """
    if frames == len(cameras):
        return list(cameras)
    path = []
    for k in range(frames):
        at = k * (len(cameras) - 1) / max(1, frames - 1)
        left = min(math.floor(at), len(cameras) - 1)
        path.append(_between(cameras[left], cameras[min(left + 1, len(cameras) - 1)], at - left))
    return path


def _between(one: Camera, two: Camera, share: float) -> Camera:
    if share == 0.0:
        return one

    def mix(a: Any, b: Any) -> Any:
        return (1.0 - share) * a + share * b

    pose = mix(np.asarray(one.c2w, dtype=np.float64), np.asarray(two.c2w, dtype=np.float64))
    u, _, vt = np.linalg.svd(pose[:3, :3])
    rotation = u @ np.diag([1.0, 1.0, float(np.sign(np.linalg.det(u @ vt)))]) @ vt
    c2w = np.concatenate([rotation, pose[:3, 3:]], axis=1)
    return dataclasses.replace(
        one,
        c2w=tuple(tuple(map(float, row)) for row in c2w),
        **{k: mix(getattr(one, k), getattr(two, k)) for k in ("fx", "fy", "cx", "cy")},
    )
