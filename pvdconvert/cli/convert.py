"""``pvdconvert convert``, the default command: check, identify, convert, report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks, complete, options
from pvdconvert.cli.output import emit, say
from pvdconvert.errors import OutputError, UsageError

if TYPE_CHECKING:
    from pvdconvert.cameras import Camera
    from pvdconvert.plugin import ReadOptions

PRESETS = ("fast", "balanced", "best")


def command(
    file: options.File,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            "-t",
            metavar="ARCHITECTURE",
            show_default=False,
            autocompletion=complete.architectures,
            help="Required: what to convert to. pvdconvert formats lists them.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The output. Default: INPUT-ARCHITECTURE here."),
    ] = None,
    from_: options.From = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FORMAT",
            autocompletion=complete.formats,
            help="The output's layout. Default: pvdconvert's own .safetensors.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="fast|balanced|best",
            autocompletion=complete.presets,
            help="About a minute, about five, or until nothing moves.",
        ),
    ] = "balanced",
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Time for distillation: 90s, 5m, 1h.")
    ] = None,
    max_mb: Annotated[float | None, typer.Option("--max-mb", metavar="MB", help="The output's largest size.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A configuration key of the target; repeat for more. pvdconvert formats ARCHITECTURE lists them.",
        ),
    ] = None,
    cameras: options.Cameras = None,
    bounds: options.Bounds = None,
    background: options.Background = None,
    near: options.Near = None,
    far: options.Far = None,
    config: options.ConfigFile = None,
    min_psnr: Annotated[
        float | None,
        typer.Option("--min-psnr", metavar="DB", help="Fail with exit code 6 below this mean PSNR; keep no output."),
    ] = None,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Same seed, same result.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, sizes and times; write nothing.")] = False,
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what was interrupted (OUT.resume/).")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.json", help="Also write the report there, as JSON.")
    ] = None,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert FILE into another architecture.

    \b
    pvdconvert ngp.ckpt --to tensorf -o out.safetensors
    pvdconvert lego/ --to plenoxels --preset fast --min-psnr 30
    """
    from pvdconvert.cli import progress as drawing

    request = check(
        file, to, out, from_, as_, preset, budget, max_mb, set_, cameras, min_psnr, dry_run, force, resume, report,
        options.read_options(bounds, background, near, far, config),
    )  # fmt: skip
    if quiet and verbose:
        raise UsageError("-q and -v contradict each other")
    compute = options.compute(device, backend, threads)
    bar = drawing.make(progress, quiet=quiet)
    found = identify(file, from_)
    try:
        bar.note(f"{file}: {found} -> {request.to}, {request.out}")
        compute.apply()
        from pvdconvert.pipeline import convert

        result = convert(
            file,
            request.to,
            out=request.out,
            from_=from_,
            as_=as_,
            preset=preset,
            budget=request.budget,
            max_mb=max_mb,
            sets=request.sets,
            device=device,
            seed=seed,
            cameras=request.cameras,
            read=request.read,
            min_psnr=min_psnr,
            dry_run=dry_run,
            force=force,
            resume=resume,
            progress=bar,
        )
    finally:
        bar.close()
    document = result.to_json()
    if report is not None:
        _write(report, document)
    if json:
        emit(document)
    elif not quiet:
        from pvdconvert.cli.report import lines

        for line in lines(document, verbose=verbose):
            say(line)


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line that was found free of contradictions."""

    to: str
    out: Path
    sets: dict[str, Any]
    budget: float | None
    cameras: tuple[Camera, ...] | None
    read: ReadOptions


def check(
    file: Path,
    to: str | None,
    out: Path | None,
    from_: str | None,
    as_: str | None,
    preset: str,
    budget: str | None,
    max_mb: float | None,
    sets: list[str] | None,
    cameras: Path | None,
    min_psnr: float | None,
    dry_run: bool,
    force: bool,
    resume: bool,
    report: Path | None,
    read: ReadOptions,
) -> Request:
    """Refuse everything that can be refused without opening the file."""
    from pvdconvert.cli import settings
    from pvdconvert.registry import default

    options.choice("--preset", preset, PRESETS)
    seconds = None if budget is None else options.seconds(budget)
    if max_mb is not None and not 0 < max_mb < math.inf:
        raise UsageError(f"--max-mb {max_mb:g}: must be more than nothing")
    if min_psnr is not None and not math.isfinite(min_psnr):
        raise UsageError(f"--min-psnr {min_psnr}: not a number of decibels")
    if dry_run and resume:
        raise UsageError("--dry-run and --resume contradict each other")
    registry = default()
    name, spec = checks.target(registry, to, as_)
    values = settings.parse(sets or [], registry.options(name), name)
    if from_ is not None:
        checks.format_name(registry, from_, "--from")
    checks.source(file)
    suffix = spec.suffixes[0] if spec.suffixes else ".safetensors" if spec.native else ""
    path = checks.output(out or checks.derived(file, name, suffix), force=force, source=file, suffix=suffix)
    if report is not None:
        checks.output(report, force=force, suffix=".json")
        if report.resolve() == path.resolve():
            raise UsageError("--report and -o name the same file")
    return Request(name, path, values, seconds, checks.cameras(cameras), read)


def identify(file: Path, from_: str | None) -> str:
    """What the file is, in words; refuses unknown, ambiguous, broken and unsafe files before torch is imported."""
    from pvdconvert.identify import identify as look

    found = look(file, from_)
    return f"{found.format} ({found.match.reason})"


def _write(path: Path, document: dict[str, Any]) -> None:
    import json

    from pvdconvert.cli.output import clean

    try:
        path.write_text(json.dumps(clean(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
