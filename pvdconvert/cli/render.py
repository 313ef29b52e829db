"""``pvdconvert render``: pictures of a field."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks, filming, options
from pvdconvert.cli.output import duration, emit, say, style
from pvdconvert.errors import UsageError

if TYPE_CHECKING:
    from pvdconvert.cameras import Camera
    from pvdconvert.prepare import Prepared

SIZE = 400


@options.expanded
def command(
    *,
    file: options.File,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.png", help="The picture. Several are numbered: FILE-00.png."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            "--views", min=1, max=1000, metavar="N", help="Views on an orbit, or as many of --cameras. Default: 1, all."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size", min=8, max=8192, metavar="PIXELS", help="Longer side. Default: 400, or what --cameras says."
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            "--video", metavar="FILE.mp4|FILE.gif", help="A film instead: once around, or along the path of --cameras."
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", min=1, max=100_000, metavar="N", help="Of --video. Default: 120, or one for each of --cameras."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option("--fps", min=0.1, max=120.0, metavar="RATE", help="Frames a second of --video. Default: 30."),
    ] = None,
    elevation: Annotated[
        float,
        typer.Option("--elevation", min=-89.0, max=89.0, metavar="DEGREES", help="The orbit's, above the xy plane."),
    ] = 30.0,
    cameras: options.Cameras = None,
    reading: options.Reading,
    computing: options.Computing,
    force: options.Force = False,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Render FILE to PNG, or to a video.

    The cameras circle the occupied part of the scene, or are those of --cameras transforms.json.

    \b
    pvdconvert render ngp.ckpt -o view.png
    pvdconvert render ngp.ckpt --video orbit.mp4 --frames 90 --size 512
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.registry import default

    film = None if video is None else filming.checked(video, frames, fps, out=out, views=views)
    if film is None and (frames is not None or fps is not None):
        raise UsageError(f"{'--frames' if frames is not None else '--fps'} is for --video FILE.mp4 or FILE.gif")
    read = reading.options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    checks.source(file)
    given = None if cameras is None else pick(checks.cameras(cameras), views, size)
    if film is not None:
        checks.output(film.path, force=force, source=file, suffix=film.path.suffix)
        given = film.cameras(given) if given is not None else None
    paths = (
        []
        if film is not None
        else names(out or checks.derived(file, "view", ".png"), len(given) if given is not None else views or 1)
    )
    for path in paths:
        checks.output(path, force=force, source=file, suffix=".png")
    checks.readable(default(), file, reading.from_, read)
    begin = time.perf_counter()
    try:
        where = compute.choose()
        for text in compute.notes():
            bar.note(text)
        from pvdconvert.loading import open_field
        from pvdconvert.prepare import prepare

        loaded = open_field(file, from_=reading.from_, read=read, device=where)
        for text in loaded.notes:
            bar.note(text)
        prepared = prepare(loaded.field, loaded.scene, device=where, progress=bar)
        if given is None:
            given = orbit(prepared, len(paths) or (frames or filming.FRAMES), size or SIZE, elevation)
        bar.stage("render", len(given))
        if film is not None:
            film.shoot(prepared, given, bar)
        for index, (path, camera) in enumerate(zip(paths, given, strict=film is None)):
            picture(path, prepared, camera)
            bar.advance(index + 1)
    finally:
        bar.close()
    spent = time.perf_counter() - begin
    source = {"path": str(file), "format": loaded.format, "architecture": loaded.architecture}
    if film is not None:
        if json:
            emit({"schema": "pvdconvert/render/1", "source": source, "video": film.to_json(given), "seconds": spent})
        elif not quiet:
            say(f"{style(f'wrote {film.path}', 'green')}, {film.said(given)} in {duration(spent)}")
        return
    if json:
        rows = [
            {"path": str(p), "absolute": str(p.resolve()), "width": c.width, "height": c.height, "camera": c.to_json()}
            for p, c in zip(paths, given, strict=True)
        ]
        emit({"schema": "pvdconvert/render/1", "source": source, "images": rows, "seconds": spent})
    elif not quiet:
        for path, camera in zip(paths, given, strict=True):
            say(f"{style(f'wrote {path}', 'green')}, {camera.width}x{camera.height}")
        say(f"{loaded.architecture} ({loaded.format}), {len(paths)} view{'s'[: len(paths) > 1]} in {duration(spent)}")


def names(path: Path, count: int) -> list[Path]:
    """One name a view: ``path`` itself, or numbered before its suffix."""
    if not path.suffix and str(path) != "-":
        path = path.with_name(f"{path.name}.png")
    width = max(2, len(str(count - 1)))
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{k:0{width}d}{path.suffix}") for k in range(count)]


def pick(cameras: Sequence[Camera], views: int | None, size: int | None) -> list[Camera]:
    """``views`` of ``cameras``, evenly spaced, with ``size`` pixels along the longer side."""
    count = min(views or len(cameras), len(cameras))
    chosen = [cameras[k * len(cameras) // count] for k in range(count)]
    if size is None:
        return chosen
    scaled = []
    for camera in chosen:
        scale = size / max(camera.width, camera.height)
        scaled.append(camera.resized(max(1, round(camera.width * scale)), max(1, round(camera.height * scale))))
    return scaled


def orbit(prepared: Prepared, count: int, size: int, elevation: float) -> list[Camera]:
    """Views around what is there; for a forward-facing scene, views near its own."""
    from pvdconvert.cameras import orbit_cameras
    from pvdconvert.metrics import held_out_cameras

    if prepared.scene.ray_space.kind == "ndc":
        return list(held_out_cameras(prepared.scene, prepared.box, count, size))
    return list(orbit_cameras(prepared.box, count, size, elevation=elevation))


def picture(path: Path, prepared: Prepared, camera: Camera) -> None:
    """Render one view and write it, whole or not at all."""
    from pvdconvert.render.images import render_camera, to_uint8

    image = render_camera(prepared.field, prepared.scene, camera, prepared.occupancy, prepared.step)
    write_png(path, to_uint8(image.rgb, prepared.scene.color_space))


def write_png(path: Path, pixels: Any) -> None:
    """Write under a temporary name, then rename."""
    from pvdconvert.render.images import save_png
    from pvdconvert.writing import temporary_beside

    with temporary_beside(path) as temporary:
        save_png(temporary, pixels)
        public(temporary)
        temporary.replace(path)


def public(path: Path) -> None:
    """Temporary files are private, pictures are not."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
