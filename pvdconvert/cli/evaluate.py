"""``pvdconvert eval``: how close is a field to real pictures?"""

from __future__ import annotations

import dataclasses
import json as text
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks, options, reporting
from pvdconvert.cli.output import block, decibel, duration, emit, say, style, table
from pvdconvert.errors import InputError, OutputError, QualityError, UsageError

if TYPE_CHECKING:
    from pvdconvert.evaluation import Judged
    from pvdconvert.report.html import View

METRICS = ("psnr", "ssim", "flip", "lpips")
SHOWN = 6
"""Views whose pictures a page shows."""


@options.expanded
def command(
    *,
    file: options.File,
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Posed pictures: a folder, a transforms.json or an .npz file.")
    ],
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="Which of its pictures.")] = "test",
    views: Annotated[
        str | None,
        typer.Option("--views", metavar="N|NAME,...", help="So many, evenly spaced, or those named. Default: all."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", min=16, max=8192, metavar="PIXELS", help="Average pictures down to this longer side."),
    ] = None,
    downscale: Annotated[
        int, typer.Option("--downscale", min=1, max=64, metavar="N", help="Open the dataset N times smaller.")
    ] = 1,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="NAME,...", help="Of psnr, ssim, flip, lpips. Default: the first three."),
    ] = None,
    lpips_weights: Annotated[
        Path | None,
        typer.Option("--lpips-weights", metavar="FILE", help="Weights of LPIPS (docs/evaluation.md); adds lpips."),
    ] = None,
    pixel_offset: Annotated[
        float | None,
        typer.Option(
            "--pixel-offset",
            min=0.0,
            max=1.0,
            metavar="0|0.5",
            help="Where in a pixel its ray passes. Default: as the program has it that trained the field.",
        ),
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(
            "--world",
            metavar="16 NUMBERS|FILE.json",
            help="4x4 matrix, row by row, from the field's world to that of the pictures, if the file has none.",
        ),
    ] = None,
    out_images: Annotated[
        Path | None,
        typer.Option("--out-images", metavar="DIR", help="Write PNGs there: picture | field | 8 times the difference."),
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
    """Measure FILE against real pictures that it was not trained on.

    Both are 8-bit, over the field's own background; one view is held at a time.

    \b
    pvdconvert eval ngp.safetensors lego/ --views 8
    pvdconvert eval lego_checkpoint/ lego/ --views r_0,r_48 --json
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.data.opening import open_dataset
    from pvdconvert.placing import choose, placed
    from pvdconvert.placing import pixel_offset as learned_offset
    from pvdconvert.registry import default

    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise UsageError(f"--min-psnr {min_psnr:g}: must be decibels above 0")
    figures = _metrics(metrics, lpips_weights)
    matrix = None if world is None else _matrix(world)
    wanted = _views(views)
    read = reading.options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    checks.source(file)
    checks.source(dataset)
    if lpips_weights is not None:
        checks.source(lpips_weights)
    registry = default()
    found, parts = checks.readable(registry, file, reading.from_, read)
    scene = parts.scene if matrix is None else dataclasses.replace(parts.scene, world=matrix)
    pictures = open_dataset(dataset, downscale=downscale, ndc=True if scene.ray_space.kind == "ndc" else None)
    chosen = choose(pictures.split(split), wanted, f"{dataset}: split {split!r}")
    offset, program = learned_offset(found.format, parts.provenance, registry)
    offset = offset if pixel_offset is None else pixel_offset
    placed(pictures, scene, offset)
    paths = {} if out_images is None else _paths(out_images, [f.name for f in chosen], force=force)
    illustrated = reporting.checked(report, force=force)
    begin = time.perf_counter()
    try:
        where = compute.choose()
        from pvdconvert.evaluation import evaluate
        from pvdconvert.loading import open_field
        from pvdconvert.metrics import Lpips
        from pvdconvert.prepare import prepare

        lpips = None if lpips_weights is None else Lpips.load(lpips_weights, where)
        loaded = open_field(file, from_=reading.from_, read=read, device=where)
        bar.note(f"{file}: {loaded.architecture} ({loaded.format})")
        bar.note(f"{dataset}: {pictures.kind}, {len(chosen)} of {len(pictures.split(split))} views of split {split}")
        prepared = prepare(loaded.field, scene, device=where, progress=bar)
        album: list[View] = []
        show = {chosen[k * len(chosen) // min(SHOWN, len(chosen))].name for k in range(min(SHOWN, len(chosen)))}
        result = evaluate(
            prepared,
            pictures,
            split,
            views=wanted,
            size=size,
            metrics=figures,
            lpips=lpips,
            offset=offset,
            keep=_keeper(paths, album, show if illustrated else set()),
            progress=bar,
        )
        notes = [*loaded.notes, *result.notes]
        if offset != 0.5:
            whose = f" as {program} has them" if program and pixel_offset is None else ""
            notes.append(f"rays pass pixels at ({offset:g}, {offset:g}){whose}, not at their centres")
        for line in notes:
            bar.note(line)
    finally:
        bar.close()
    document: dict[str, Any] = {
        "schema": "pvdconvert/eval/1",
        "field": {
            "path": str(file),
            "format": loaded.format,
            "architecture": loaded.architecture,
            "bytes": loaded.bytes,
            "sha256": loaded.sha256,
        },
        **result.to_json(),
        "images": [str(p) for p in paths.values()],
        "notes": notes,
        "seconds": time.perf_counter() - begin,
    }
    reporting.save(report, {k: v for k, v in document.items() if k != "images"}, album)
    missed = min_psnr is not None and result.mean.get("psnr", math.inf) < min_psnr
    if json and not missed:
        emit(document)
    elif not quiet and not json:
        for line in lines(document):
            say(line)
    if missed:
        raise QualityError(f"{file}: {result.mean['psnr']:.2f} dB on {dataset} is below the {min_psnr:g} dB asked for")


def lines(document: Mapping[str, Any]) -> list[str]:
    """The document of an evaluation for people: a row a view, and the mean."""
    from pvdconvert.cli.report import side

    data, mean = document["dataset"], document["metrics"]
    views = f"{len(document['views'])} of {data['frames']} views, split {data['split']}"
    back = ",".join(f"{v:g}" for v in document["background"])
    how = f"{document['protocol']}: 8-bit, background {back}, rays at {document['pixel_offset']:g} of a pixel"
    images = f"{data['path']}  {data['format']}, {views}"
    out = block([("field", side(document["field"])), ("images", images), ("protocol", how)])
    rows = [[v["name"], f"{v['width']}x{v['height']}", *(figure(m, v[m]) for m in mean)] for v in document["views"]]
    rows.append(["mean", "", *(figure(m, mean[m]) for m in mean)])
    out += ["", *table(["view", "pixels", *(_TITLES[m] for m in mean)], rows, right=range(2, 2 + len(mean)))]
    if document["notes"]:
        out += ["", *(f"{style('note', 'yellow')}  {text}" for text in document["notes"])]
    if document["images"]:
        out += ["", f"wrote {len(document['images'])} pictures: {document['images'][0]} ..."]
    return [*out, "", f"in {duration(document['seconds'])}"]


_TITLES = {"psnr": "PSNR dB", "ssim": "SSIM", "flip": "FLIP", "lpips": "LPIPS"}


def figure(name: str, value: float) -> str:
    """A figure as it is printed."""
    return decibel(value) if name == "psnr" else f"{value:.4f}"


def _metrics(asked: str | None, weights: Path | None) -> tuple[str, ...]:
    if asked is None:
        return METRICS if weights is not None else METRICS[:3]
    names = tuple(dict.fromkeys(options.choice("--metrics", n.strip().lower(), METRICS) for n in asked.split(",")))
    if "lpips" in names and weights is None:
        raise UsageError("--metrics lpips needs the weights of its network", hint="add --lpips-weights FILE")
    if weights is not None and "lpips" not in names:
        raise UsageError("--lpips-weights without lpips among --metrics", hint=f"--metrics {asked},lpips")
    return names


def _views(asked: str | None) -> int | tuple[str, ...] | None:
    if asked is None:
        return None
    if asked.isdecimal():
        if not 1 <= int(asked) <= 100_000:
            raise UsageError(f"--views {asked}: at least one", hint="a number, or names such as r_0,r_48")
        return int(asked)
    names = tuple(n.strip() for n in asked.split(",") if n.strip())
    if not names:
        raise UsageError(f"--views {asked!r}: no view is named")
    return names


def _matrix(asked: str) -> tuple[tuple[float, ...], ...]:
    """The 4x4 matrix of ``--world``: 12 or 16 numbers, or a JSON file of them, nested or not."""
    path = Path(asked)
    try:
        if path.suffix.lower() == ".json" or path.is_file():
            raw: Any = text.loads(path.read_text(encoding="utf-8"))
            values = [v for row in raw for v in (row if isinstance(row, list) else [row])]
        else:
            values = asked.replace(",", " ").split()
        numbers = [float(v) for v in values]
    except OSError as error:
        raise InputError(f"--world {asked}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"--world {asked}: no matrix: {error}", hint="16 numbers, or a JSON file of them") from error
    if len(numbers) not in (12, 16) or not all(math.isfinite(v) for v in numbers):
        raise UsageError(f"--world {asked}: {len(numbers)} numbers", hint="16, row by row, or 12 without the last row")
    numbers = [*numbers, 0.0, 0.0, 0.0, 1.0][:16]
    return tuple(tuple(numbers[4 * k : 4 * k + 4]) for k in range(4))


def _paths(folder: Path, names: list[str], *, force: bool) -> dict[str, Path]:
    """view -> the PNG that shows it."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out-images {folder}: is not a folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out-images {folder}: cannot be made: {error.strerror or error}") from error
    plain = {name: "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).name) for name in names}
    twice = len(set(plain.values())) < len(plain)
    paths = {n: folder / (f"{k:04d}-{p}.png" if twice else f"{p}.png") for k, (n, p) in enumerate(plain.items())}
    for path in paths.values():
        checks.output(path, force=force, suffix=".png")
    return paths


def _keeper(paths: Mapping[str, Path], album: list[View], show: set[str]) -> Callable[[Judged], None]:
    """Writes the PNG of each view, and keeps for the page those named."""
    from pvdconvert.cli.render import write_png
    from pvdconvert.render.images import comparison
    from pvdconvert.report.html import View

    def keep(view: Judged) -> None:
        if view.name in paths:
            write_png(paths[view.name], comparison(view.truth, view.picture))
        if view.name in show:
            colors = {"image": view.truth, "field": view.picture}
            album.append(View(view.name, colors, {"field": view.depth}, {"field": view.opacity}))

    return keep
