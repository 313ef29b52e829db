"""``pvdconvert compare``: how close is B to A?"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks, complete, options, reporting
from pvdconvert.cli.output import block, duration, emit, say
from pvdconvert.errors import OutputError, QualityError, RequestError, UsageError

if TYPE_CHECKING:
    from pvdconvert.loading import Loaded
    from pvdconvert.metrics import ReferenceViews

COUNT, SIZE = 16, 200


@options.expanded
def command(
    *,
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: a checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is measured against it.")],
    from_b: Annotated[
        str | None,
        typer.Option(
            "--from-b", metavar="FORMAT", autocompletion=complete.formats, help="The format of B; --from is that of A."
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option("--views", min=1, max=1000, metavar="N", help="Held-out views, or as many of --cameras."),
    ] = None,
    size: Annotated[int, typer.Option("--size", min=16, max=4096, metavar="PIXELS", help="Longer side.")] = SIZE,
    cameras: options.Cameras = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Write PNGs there: A | B | 8 times the difference."),
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option("--min-psnr", metavar="DB", help="Exit with code 6 below this mean PSNR.")
    ] = None,
    report: reporting.Report = None,
    reading: options.Reading,
    computing: options.Computing,
    force: options.Force = False,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how close B is to A.

    Both are rendered from 16 held-out cameras at 200 pixels (the protocol fidelity/1), over A's background.
    The options that say what a file does not hold go for A, and for B where they concern it.
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.cli.render import pick
    from pvdconvert.loading import take_apart
    from pvdconvert.registry import default

    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise UsageError(f"--min-psnr {min_psnr:g}: must be decibels above 0")
    read = reading.options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    checks.source(a)
    checks.source(b)
    given = None if cameras is None else pick(checks.cameras(cameras), views, size)
    if images is not None:
        _folder(images, force=force)
    illustrated = reporting.checked(report, force=force)
    registry = default()
    first, _ = checks.readable(registry, a, reading.from_, read)
    second = checks.recognised(registry, b, from_b)
    # What is said of a box or a background holds for both; a program's own settings for files of that program.
    read_b = read if second.format == first.format else dataclasses.replace(read, config=None, extra={})
    take_apart(second, read_b, registry)
    begin = time.perf_counter()
    try:
        where = compute.choose()
        for text in compute.notes():
            bar.note(text)
        from pvdconvert import metrics
        from pvdconvert.loading import open_field
        from pvdconvert.looking import see_through
        from pvdconvert.prepare import prepare

        one = open_field(a, from_=reading.from_, read=read, device=where)
        two = open_field(b, from_=from_b, read=read_b, device=where)
        notes = [*one.notes, *two.notes, *comparable(one, two)]
        for text in notes:
            bar.note(text)
        bar.note(f"A: {a}, {one.architecture}")
        teacher, _, text = see_through(prepare(one.field, one.scene, device=where, progress=bar), bar)
        notes += [text] if text else []
        bar.note(f"B: {b}, {two.architecture}")
        student = prepare(two.field, two.scene, device=where, progress=bar)
        reference = metrics.views(
            teacher.field,
            teacher.scene,
            occupancy=teacher.occupancy,
            box=teacher.box,
            step=teacher.step,
            cameras=given,
            size=size,
            count=views or COUNT,
            progress=bar,
        )
        seen = metrics.views(
            student.field,
            teacher.scene,
            occupancy=student.occupancy,
            box=teacher.box,
            step=reference.step,
            cameras=reference.cameras,
            progress=bar,
        )
    finally:
        bar.close()
    drawn = list(zip(seen.images, seen.opacity, seen.depth, strict=True))
    fidelity = reference.measure(drawn)
    document: dict[str, Any] = {
        "schema": "pvdconvert/compare/1",
        "reference": _side(a, one),
        "candidate": _side(b, two),
        "fidelity": fidelity.to_json(),
        "images": [] if images is None else _pictures(images, reference, seen),
        "notes": notes,
        "seconds": time.perf_counter() - begin,
    }
    if report is not None:
        from pvdconvert.report.album import Album

        album = Album(("A", "B"))
        if illustrated:
            album.keep(reference, drawn)
        reporting.save(report, document if not illustrated else {**document, "views": album.rows}, album.views)
    missed = min_psnr is not None and fidelity.psnr < min_psnr
    if not (json and missed):
        _print(document, json=json, quiet=quiet)
    if missed:
        raise QualityError(f"{b}: {fidelity.psnr:.2f} dB against {a} is below the {min_psnr:g} dB asked for")


def _side(path: Path, loaded: Loaded) -> dict[str, Any]:
    return {
        "path": str(path),
        "format": loaded.format,
        "architecture": loaded.architecture,
        "bytes": loaded.bytes,
        "sha256": loaded.sha256,
    }


def comparable(one: Loaded, two: Loaded) -> list[str]:
    """Refuse pairs that no camera can see alike; note what makes a comparison doubtful."""
    if one.scene.ray_space != two.scene.ray_space:
        kinds = f"{one.scene.ray_space.kind} and {two.scene.ray_space.kind}"
        raise RequestError(f"{one.path} and {two.path}: their rays live in different spaces ({kinds})")
    apart = any(
        one.scene.box.max[k] <= two.scene.box.min[k] or two.scene.box.max[k] <= one.scene.box.min[k] for k in range(3)
    )
    if apart:
        raise RequestError(
            f"{one.path} and {two.path}: their boxes do not even touch", hint="see pvdconvert inspect of both"
        )
    if one.scene.color_space != two.scene.color_space:
        raise RequestError(
            f"{one.path} is in {one.scene.color_space}, {two.path} in {two.scene.color_space} colour: not comparable"
        )
    if one.scene.backdrop != two.scene.backdrop:
        return [f"the backgrounds differ; both are shown over that of {one.path}"]
    return []


def _folder(path: Path, *, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"--images {path}: is not a folder")
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise OutputError(f"--images {path}: no such folder {path.parent}", hint=f"mkdir -p {path.parent}") from None
    except OSError as error:
        raise OutputError(f"--images {path}: cannot be made: {error.strerror}") from error
    checks.output(path / "view-00.png", force=force)


def _pictures(folder: Path, one: ReferenceViews, two: ReferenceViews) -> list[str]:
    from pvdconvert.cli.render import names, write_png
    from pvdconvert.render.images import comparison

    paths = names(folder / "view.png", max(2, len(one.images)))[: len(one.images)]
    for path, left, right in zip(paths, one.images, two.images, strict=True):
        write_png(path, comparison(left, right))
    return [str(path) for path in paths]


def _print(document: dict[str, Any], *, json: bool, quiet: bool) -> None:
    from pvdconvert.cli.report import fidelity, side

    if json:
        emit(document)
        return
    if quiet:
        return
    for line in [
        *block([("A", side(document["reference"])), ("B", side(document["candidate"]))]),
        "",
        *fidelity(document["fidelity"], "PSNR of B against A"),
    ]:
        say(line)
    if document["images"]:
        say(f"wrote {len(document['images'])} pictures: {document['images'][0]} ...")
    say(f"in {duration(document['seconds'])}")
