"""``--video`` of ``pvdconvert render``: checked before the work, rendered and written one frame at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdconvert.errors import UsageError

if TYPE_CHECKING:
    from pvdconvert.cameras import Camera
    from pvdconvert.prepare import Prepared
    from pvdconvert.progress import Progress

FRAMES, FPS = 120, 30.0


@dataclasses.dataclass(frozen=True)
class Film:
    """What to write: ``frames`` None = as many as there are cameras, or :data:`FRAMES` around."""

    path: Path
    frames: int | None
    fps: float

    def cameras(self, given: Sequence[Camera]) -> list[Camera]:
        """The path along ``given``. Raises UsageError where their sizes differ."""
        from pvdconvert.render.video import camera_path

        sizes = {(c.width, c.height) for c in given}
        if len(sizes) > 1:
            few = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
            raise UsageError(f"--video: the cameras are of several sizes ({few})", hint="a video has one")
        return camera_path(given, self.frames or len(given))

    def shoot(self, prepared: Prepared, cameras: Sequence[Camera], bar: Progress) -> None:
        """Render and write; under a temporary name until all is done."""
        from pvdconvert.cli.render import public
        from pvdconvert.render.images import render_camera, to_uint8
        from pvdconvert.render.video import writer
        from pvdconvert.writing import temporary_beside

        space = prepared.scene.color_space
        with temporary_beside(self.path) as temporary:
            with writer(temporary, self.path, self.fps) as add:
                for n, camera in enumerate(cameras):
                    image = render_camera(prepared.field, prepared.scene, camera, prepared.occupancy, prepared.step)
                    add(to_uint8(image.rgb, space))
                    bar.advance(n + 1)
            public(temporary)
            temporary.replace(self.path)

    def to_json(self, cameras: Sequence[Camera]) -> dict[str, Any]:
        first = cameras[0]
        size = {"width": first.width, "height": first.height}
        return {
            "path": str(self.path),
            "absolute": str(self.path.resolve()),
            **size,
            "frames": len(cameras),
            "fps": self.fps,
            "bytes": self.path.stat().st_size,
        }

    def said(self, cameras: Sequence[Camera]) -> str:
        """One phrase on what was written."""
        from pvdconvert.cli.output import size

        frame, seconds = cameras[0], len(cameras) / self.fps
        much = size(self.path.stat().st_size)
        return f"{frame.width}x{frame.height}, {len(cameras)} frames ({seconds:.3g} s of film), {much},"


def checked(path: Path, frames: int | None, fps: float | None, *, out: Path | None, views: int | None) -> Film:
    """The film that was asked for. Raises UsageError; imports no torch."""
    from pvdconvert.render.video import GIF_FPS, encoder

    if out is not None or views is not None:
        raise UsageError(f"--video and {'-o' if out is not None else '--views'} contradict each other")
    encoder(path)
    rate = FPS if fps is None else fps
    if path.suffix.lower() == ".gif" and rate > GIF_FPS:
        raise UsageError(f"--fps {rate:g}: a GIF has at most {GIF_FPS:g} frames a second", hint="write an .mp4")
    return Film(path, frames, rate)
