"""``pvdconvert convert``, the default command: check, identify, convert, report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from pvdconvert import memory, ranks
from pvdconvert.cli import checks, complete, options, reporting
from pvdconvert.cli.interrupt import Interrupt
from pvdconvert.cli.output import emit, say
from pvdconvert.distill.methods import DEFAULT, parse
from pvdconvert.errors import UsageError

PRESETS = ("fast", "balanced", "best")


@options.expanded
def command(
    *,
    file: options.File,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            "-t",
            metavar="ARCHITECTURE",
            show_default=False,
            autocompletion=complete.architectures,
            help="Required, but with --exact: what to convert to. pvdconvert formats lists them.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The output. Default: INPUT-ARCHITECTURE here."),
    ] = None,
    as_: options.Layout = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="fast|balanced|best",
            autocompletion=complete.presets,
            help="About a minute, about five, or until nothing moves.",
        ),
    ] = "balanced",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="store|pvd|pvd-al",
            autocompletion=complete.methods,
            help="How the student is taught: from a store of the teacher's answers, asked once; or as published, by "
            "Progressive Volume Distillation, or by that with active learning. Options follow a colon: pvd:rays=1024.",
        ),
    ] = DEFAULT,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Time for distillation: 90s, 5m, 1h.")
    ] = None,
    max_mb: options.MaxMb = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="Memory to stay within, such as 4G. Default: what is free."),
    ] = None,
    set_: options.Sets = None,
    cameras: options.Cameras = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DATASET",
            help="Real pictures of the scene: say what teacher and student are worth on a few of its test split.",
        ),
    ] = None,
    polish: Annotated[
        bool, typer.Option("--polish", help="Go on training the student on the train split of --images.")
    ] = False,
    reading: options.Reading,
    via: Annotated[
        str | None,
        typer.Option(
            "--via",
            metavar="ARCHITECTURE",
            autocompletion=complete.architectures,
            help="Distil into this one first and from it into --to: for very slow teachers. Both errors are reported.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Only lay the same weights out anew; refuse whatever would be trained.")
    ] = False,
    numbers: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="same|float32",
            help="How weights that are only laid out anew are stored: as in the source, or as float32.",
        ),
    ] = "same",
    min_psnr: Annotated[
        float | None,
        typer.Option("--min-psnr", metavar="DB", help="Fail with exit code 6 below this mean PSNR; keep no output."),
    ] = None,
    computing: options.Computing,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Same seed, same result.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, sizes and times; write nothing.")] = False,
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
    """Convert FILE into another architecture.

    \b
    pvdconvert ngp.ckpt --to tensorf -o out.safetensors
    pvdconvert lego/ --to plenoxels --preset fast --min-psnr 30
    pvdconvert ngp.pth --exact -o ngp.safetensors      the same weights in another layout
    """
    from pvdconvert.cli import progress as drawing
    from pvdconvert.cli import settings
    from pvdconvert.registry import default
    from pvdconvert.transcode import NUMBERS, obstacle, refused

    # Contradictions and names first, then what the file system says, then the file itself; torch only after all that.
    options.choice("--preset", preset, PRESETS)
    options.choice("--dtype", numbers, NUMBERS)
    if resume and not parse(method)[0].resumes:
        raise UsageError(f"--method {method} and --resume contradict each other: it cannot go on from a halt")
    seconds = None if budget is None else options.seconds(budget)
    bound = None if max_memory is None else memory.parse(max_memory)
    if max_mb is not None and not 0 < max_mb < math.inf:
        raise UsageError(f"--max-mb {max_mb:g}: must be more than nothing")
    if min_psnr is not None and not 0 < min_psnr < math.inf:
        raise UsageError(f"--min-psnr {min_psnr:g}: must be decibels above 0", hint="30 is a usual gate")
    if quiet and verbose:
        raise UsageError("-q and -v contradict each other")
    if ranks.rank() > 0:  # torchrun: the first process speaks for all
        report, json, quiet, verbose = None, False, True, False
    ranks.share_threads()
    if replay is not None and budget is not None:
        raise UsageError("--replay and --budget contradict each other: the steps decide, not the clock")
    if via is not None and (dry_run or resume):
        raise UsageError("--via cannot be resumed or tried dry", hint="convert in two steps: FILE --to PROXY, then on")
    if polish and images is None:
        raise UsageError("--polish needs real pictures", hint="add --images DATASET")
    if polish and (resume or exact):
        raise UsageError(f"--polish and --{'resume' if resume else 'exact'} contradict each other")
    if dry_run and resume:
        raise UsageError("--dry-run and --resume contradict each other")
    read = reading.options()
    compute = computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    registry = default()
    if to is None and exact:  # the same weights: the file says which architecture they are
        to = checks.readable(registry, file, reading.from_, read)[1].architecture
    name, named = checks.target(registry, to, as_)
    proxy = None if via is None else checks.target(registry, via, None)[0]
    if proxy is not None and (exact or proxy == name):
        raise UsageError(f"--via {via} and {'--exact' if exact else f'--to {to}'} contradict each other")
    sets = settings.parse(set_ or [], registry.options(name), name)
    checks.source(file)
    if out is not None:
        checks.output(out, force=force, source=file, suffix=".safetensors")
    layout = named or checks.of_suffix(registry, name, out)
    suffix = layout.suffixes[0] if layout.suffixes else ""
    path = out or checks.output(checks.derived(file, name, suffix), force=force, source=file, suffix=suffix)
    checks.resumable(path, resume)
    illustrated = reporting.checked(report, force=force, out=path)
    if cameras is not None:
        checks.cameras(cameras)
    found, parts = checks.readable(registry, file, reading.from_, read)
    if exact and (why := obstacle(parts, name, sets, max_mb, registry)):
        raise refused(file, why)
    pictures = None if images is None else checks.pictures(images, parts.scene, *(["train"] if polish else []))
    try:
        bar.note(f"{file}: {found.format}, {parts.architecture} -> {name}, {path}")
        compute.apply()
        for text in compute.notes():
            bar.note(text)
        from pvdconvert.pipeline import convert
        from pvdconvert.report.album import Album

        album = Album()

        with Interrupt(bar) as interrupt:
            result = convert(
                file,
                name,
                out=path,
                from_=reading.from_,
                as_=as_ or (None if layout.native else layout.name),
                preset=preset,
                budget=seconds,
                max_mb=max_mb,
                max_memory=bound,
                sets=sets,
                device=compute.device,
                seed=seed,
                cameras=cameras,
                read=read,
                min_psnr=min_psnr,
                steps=replay,
                exact=exact,
                numbers=numbers,
                method=method,
                via=proxy,
                dry_run=dry_run,
                force=force,
                resume=resume,
                images=pictures,
                polish=polish,
                parallel=True,
                keep=album.keep if illustrated else None,
                progress=bar,
                stop=interrupt.stop,
            )
    finally:
        bar.close()
    document = result.to_json()
    reporting.save(report, document if not illustrated else {**document, "views": album.rows}, album.views)
    if json:
        emit(document)
    elif not quiet:
        from pvdconvert.cli.report import lines

        for line in lines(document, where=str(path), verbose=verbose):
            say(line)
