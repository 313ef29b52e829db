"""``pvdconvert train``: a field of any architecture from posed pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks, complete, options, reporting
from pvdconvert.cli.interrupt import Interrupt
from pvdconvert.cli.output import emit, say
from pvdconvert.errors import UsageError

if TYPE_CHECKING:
    from pvdconvert.data import Dataset
    from pvdconvert.progress import Progress
    from pvdconvert.report.html import View

PRESETS = ("fast", "balanced", "best")
SAMPLINGS = ("occupancy", "hierarchical")
SPLITS = ("train", "val", "test")
SHOWN = 6
"""Views whose pictures a page shows."""


@options.expanded
def command(
    *,
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Posed pictures: a folder, a transforms.json or an .npz file.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            "-t",
            metavar="ARCHITECTURE",
            show_default=False,
            autocompletion=complete.architectures,
            help="Required: what to train. pvdconvert formats lists them.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The output. Default: DATASET-ARCHITECTURE here."),
    ] = None,
    as_: options.Layout = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="fast|balanced|best", autocompletion=complete.presets, help="About a minute, or about five."
        ),
    ] = "balanced",
    budget: Annotated[str | None, typer.Option("--budget", metavar="TIME", help="Time for it: 90s, 5m, 1h.")] = None,
    max_mb: options.MaxMb = None,
    set_: options.Sets = None,
    split: Annotated[
        str, typer.Option("--split", metavar="train|val|test", help="Which pictures to train on.")
    ] = "train",
    downscale: Annotated[
        int, typer.Option("--downscale", min=1, max=64, metavar="N", help="Make the pictures N times smaller.")
    ] = 1,
    bounds: options.Bounds = None,
    background: options.Background = None,
    near: options.Near = None,
    far: options.Far = None,
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling",
            metavar="occupancy|hierarchical",
            help="Skip what is empty; or two passes along the whole ray, as the original NeRF does.",
        ),
    ] = "occupancy",
    computing: options.Computing,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Same seed and steps, same result.")] = 0,
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what was interrupted (OUT.resume/).")] = False,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="STEPS", help="Run exactly the steps that a report's 'replay' lists."),
    ] = None,
    report: reporting.Report = None,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a field on posed pictures.

    \b
    pvdconvert train lego/ --to ngp -o teacher.safetensors
    pvdconvert train tiny_nerf_data.npz --to tensorf --budget 2m
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.cli import settings
    from pvdconvert.data.opening import open_dataset
    from pvdconvert.registry import default

    # Contradictions and names first, then what the file system says, then the dataset; torch only after all that.
    options.choice("--preset", preset, PRESETS)
    options.choice("--sampling", sampling, SAMPLINGS)
    options.choice("--split", split, SPLITS)
    seconds = None if budget is None else options.seconds(budget)
    if max_mb is not None and not 0 < max_mb < math.inf:
        raise UsageError(f"--max-mb {max_mb:g}: must be more than nothing")
    if quiet and verbose:
        raise UsageError("-q and -v contradict each other")
    if replay is not None and budget is not None:
        raise UsageError("--replay and --budget contradict each other: the steps decide, not the clock")
    read = options.Reading(bounds=bounds, background=background, near=near, far=far).options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    registry = default()
    name, named = checks.target(registry, to, as_)
    sets = settings.parse(set_ or [], registry.options(name), name)
    checks.source(dataset)
    if out is not None:
        checks.output(out, force=force, source=dataset, suffix=".safetensors")
    layout = named or checks.of_suffix(registry, name, out)
    suffix = layout.suffixes[0] if layout.suffixes else ""
    path = out or checks.output(checks.derived(dataset, name, suffix), force=force, source=dataset, suffix=suffix)
    checks.resumable(path, resume)
    illustrated = reporting.checked(report, force=force, out=path)
    pictures = open_dataset(dataset, background=read.background, bounds=read.bounds, downscale=downscale)
    frames = pictures.split(split)
    try:
        bar.note(f"{dataset}: {pictures.kind}, {len(frames)} pictures of split {split} -> {name}, {path}")
        for text in pictures.notes:
            bar.note(text)
        compute.apply()
        from pvdconvert.training import train

        with Interrupt(bar) as interrupt:
            result = train(
                pictures,
                name,
                out=path,
                as_=as_ or (None if layout.native else layout.name),
                preset=preset,
                budget=seconds,
                max_mb=max_mb,
                sets=sets,
                seed=seed,
                device=compute.device,
                split=split,
                background=read.background,
                bounds=read.bounds,
                near=read.near,
                far=read.far,
                sampling="hierarchical" if sampling == "hierarchical" else "occupancy",
                steps=replay,
                force=force,
                resume=resume,
                progress=bar,
                stop=interrupt.stop,
            )
        judged, album = _judged(path, pictures, compute.device, bar) if illustrated else ({}, [])
    finally:
        bar.close()
    document = result.to_json()
    reporting.save(report, {**document, **judged}, album)
    if json:
        emit(document)
    elif not quiet:
        from pvdconvert.cli.report import lines

        for line in lines(document, where=str(path), verbose=verbose):
            say(line)


def _judged(path: Path, pictures: Dataset, device: str, bar: Progress) -> tuple[dict[str, Any], list[View]]:
    """For a page: figures and pictures of what was written on a few views that it was not trained on."""
    from pvdconvert.evaluation import Judged, evaluate
    from pvdconvert.loading import choose_device, open_field
    from pvdconvert.prepare import prepare
    from pvdconvert.report.html import View

    split = next((name for name in ("test", "val") if pictures.splits.get(name)), None)
    if split is None:
        return {}, []
    album: list[View] = []

    def keep(view: Judged) -> None:
        colors = {"image": view.truth, "field": view.picture}
        album.append(View(view.name, colors, {"field": view.depth}, {"field": view.opacity}))

    where = choose_device(device)
    loaded = open_field(path, device=where)
    prepared = prepare(loaded.field, loaded.scene, device=where, progress=bar)
    found = evaluate(prepared, pictures, split, views=min(SHOWN, len(pictures.split(split))), keep=keep, progress=bar)
    told = found.to_json()
    return {"metrics": told["metrics"], "views": told["views"], "protocol": f"{found.protocol}, split {split}"}, album
