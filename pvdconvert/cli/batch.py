"""``pvdconvert batch``: every conversion of a manifest, in processes of their own. Imports no torch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert import memory, ranks
from pvdconvert.cli import checks, complete, options, settings
from pvdconvert.cli.convert import PRESETS
from pvdconvert.cli.interrupt import Interrupt
from pvdconvert.cli.output import decibel, duration, emit, say, style, table, warn
from pvdconvert.cli.reporting import write_json
from pvdconvert.distill import methods
from pvdconvert.errors import InputError, OutputError, PvdError, UsageError

if TYPE_CHECKING:
    from pvdconvert.batch import Outcome, Row, Todo
    from pvdconvert.batch_manifest import Record
    from pvdconvert.registry import Registry

PATHS = ("cameras", "config")
"""Columns that name files to read: relative to the manifest, as ``file`` is."""

Defaults = dict[str, tuple[str, ...]]


@options.expanded
def command(
    *,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="CSV with a header, or JSON lines: a row each.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            "-t",
            metavar="ARCHITECTURE",
            autocompletion=complete.architectures,
            show_default=False,
            help="What to convert to, where a row has no column to.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out-dir", "-o", metavar="FOLDER", help="Where outputs go. Default: beside the manifest."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|balanced|best", autocompletion=complete.presets, help="As of convert.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Time for each row's distillation.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Of every row that has none.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every row that has no column set.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Rows at a time; they share the threads.")
    ] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="ADDRESS|local",
            help="Run rows on a Dask cluster: its scheduler's address, or local workers.",
        ),
    ] = None,
    computing: options.Computing,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the manifest; show what would run.")] = False,
    force: options.Force = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.json", help="Also write the summary there, as JSON.")
    ] = None,
    json: options.Json = False,
    progress: options.ProgressMode = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert every row of MANIFEST; the same command again does what is left.

    \b
    pvdconvert batch scenes.csv --to tensorf --out-dir out/ --jobs 2
    Columns: file, and if wanted to, out, preset, budget, seed, set ("a=1;b=2"), ...: the options of convert.
    Exit code 0: every row is done; 11: some failed, and the rest is done.
    """  # fmt: skip
    from pvdconvert import batch
    from pvdconvert.batch_manifest import read
    from pvdconvert.cli import progress as drawing
    from pvdconvert.registry import default

    if quiet and verbose:
        raise UsageError("-q and -v contradict each other")
    if ranks.size() > 1:
        raise UsageError("batch under torchrun: every process would run every row", hint="--jobs, or --cluster")
    if cluster not in (None, "local") and jobs > 1:
        raise UsageError(f"--jobs: the cluster {cluster} decides how many rows it runs at a time")
    computing.checked()
    bar = drawing.make(progress, quiet=quiet)
    registry = default()
    given: Defaults = {
        name: (str(value),)
        for name, value in (("to", to), ("preset", preset), ("budget", budget), ("seed", seed))
        if value is not None
    }
    given |= {"set": tuple(set_)} if set_ else {}
    folder = manifest.parent if out_dir is None else out_dir
    if not folder.is_dir():
        raise OutputError(f"--out-dir {folder}: no such folder", hint=f"mkdir -p {folder}")
    if report is not None:
        checks.output(report, force=True, suffix=".json")
    how = _how(computing, jobs, cluster)
    rows = [_row(registry, record, given, folder, how) for record in read(manifest)]
    _distinct(manifest, rows)
    begin = time.perf_counter()
    journal = batch.Journal(folder / f"{manifest.name}.state.jsonl")
    try:
        decided = [_decided(manifest, row, journal, force) for row in rows]
        todo = [d for d in decided if isinstance(d, batch.Todo)]
        outcomes = [d for d in decided if isinstance(d, batch.Outcome)]
        stopped = False
        if dry_run:
            outcomes += [batch.Outcome(t.row.number, str(t.row.file), t.row.to, str(t.row.out)) for t in todo]
        elif todo:
            bar.note(f"{manifest}: {len(todo)} rows to do, {len(outcomes)} done earlier; state in {journal.path}")
            with _engine(cluster, jobs) as (executor, ask_to_stop, text), Interrupt(bar) as interrupt:
                if text:
                    bar.note(text)
                ran = batch.run(todo, journal, executor, progress=bar, stop=interrupt.stop, ask_to_stop=ask_to_stop)
                outcomes += list(ran)
                stopped = interrupt.stop()
    finally:
        bar.close()
        journal.close()
    document = batch.document(manifest, journal.path, outcomes, time.perf_counter() - begin)
    if report is not None:
        write_json(report, document)
    if json:
        emit(document)
    elif not quiet:
        for line in lines(document):
            say(line)
    code = 0 if dry_run else batch.exit_code(outcomes, stopped=stopped)
    if code:
        c = document["counts"]
        left = c["interrupted"] + c["waiting"]
        warn(f"error: {c['failed']} of {len(rows)} rows failed" + (f", {left} are left" if left else "")
             + " (the same command again does them)")  # fmt: skip
        raise typer.Exit(code)


def _how(computing: options.Computing, jobs: int, cluster: str | None) -> tuple[str, ...]:
    """What decides no result: where a row computes, and with how many threads."""
    threads = computing.threads
    if threads is None and cluster in (None, "local") and jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // jobs)
    out = ["--device", computing.device, "--backend", computing.backend]
    there = memory.free()
    if cluster in (None, "local") and jobs > 1 and there is not None:  # of what is free, each takes its part
        out += ["--max-memory", str(max(memory.LEAST, int(0.9 * there / jobs)))]
    return (*out, "--threads", str(threads)) if threads is not None else tuple(out)


def _row(registry: Registry, record: Record, given: Defaults, folder: Path, how: tuple[str, ...]) -> Row:
    """A record as arguments of ``convert``, checked as far as text can be. Raises InputError naming row and column."""
    from pvdconvert.batch import Row
    from pvdconvert.batch_manifest import COLUMNS, FLAGS

    values = {**given, **record.values}

    def one(column: str) -> str | None:
        return next(iter(values.get(column, ())), None)

    def checked(column: str, check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except (PvdError, ValueError) as error:
            raise record.refused(column, error if isinstance(error, PvdError) else f"{error}") from error

    name, layout = one("to"), one("as")
    if not name:
        raise record.refused("to", "is empty, and there is no --to")
    checked("to", checks.target, registry, name, None)
    spec = checked("as", checks.target, registry, name, layout)[1]
    checked("preset", options.choice, "--preset", one("preset") or "balanced", PRESETS)
    checked("dtype", options.choice, "--dtype", one("dtype") or "same", ("same", "float32"))
    if one("from") is not None:
        checked("from", checks.format_name, registry, one("from"), "--from")
    if one("budget") is not None:
        checked("budget", options.seconds, one("budget"))
    if one("device") is not None:
        checked("device", options.device, one("device"))
    if one("bounds") is not None:
        checked("bounds", options.bounds, one("bounds"))
    if one("background") is not None:
        checked("background", options.background, one("background"))
    if one("replay") is not None and one("budget") is not None:
        raise record.refused("replay", "and a budget contradict each other: the steps decide, not the clock")
    for column, low in (("seed", 0), ("max_mb", 0), ("min_psnr", 0), ("near", 0), ("far", 0)):
        if one(column) is not None:
            checked(column, _number, one(column), low, column == "seed")
    if one("max_memory") is not None:
        checked("max_memory", memory.parse, one("max_memory"))
    if one("method") is not None:
        checked("method", methods.parse, one("method"))
    if one("via") is not None:
        checked("via", checks.target, registry, one("via"), None)
    checked("set", settings.parse, values.get("set", ()), registry.options(name), name)
    base = record.manifest.parent
    file = base / str(one("file"))
    out = checked("out", _output, registry, folder, file, name, spec, one("out"))
    request = ["--to", name, "--out", str(out)]
    for column, cells in values.items():
        if column in ("file", "to", "out", "device", "max_memory"):
            continue
        for cell in cells:
            text = str((base / cell).resolve()) if column in PATHS else cell
            text = str((folder / cell).resolve()) if column == "report" else text
            request += [COLUMNS[column]] if column in FLAGS else [f"{COLUMNS[column]}={text}"]
    own = ("--device", str(one("device")), *how[2:]) if one("device") is not None else how
    if one("max_memory") is not None:  # the last one of a kind counts
        own = (*own, "--max-memory", str(one("max_memory")))
    return Row(record.number, file.resolve(), name, out, tuple(request), own)


def _number(text: str, low: float, whole: bool) -> None:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a {'whole ' if whole else ''}number") from None
    if not low <= value < (1 << 31 if whole else float("inf")):
        raise UsageError(f"{text} is out of range")


def _output(registry: Registry, folder: Path, file: Path, name: str, spec: Any, text: str | None) -> Path:
    if text is None:
        layout = spec or checks.of_suffix(registry, name, None)
        text = checks.derived(file, name, layout.suffixes[0] if layout.suffixes else "").name
    out = (folder / text).resolve()
    if spec is None:
        checks.of_suffix(registry, name, out)
    if text.endswith(os.sep) or out.is_dir():
        raise OutputError(f"{out}: is a folder")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder", hint=f"mkdir -p {out.parent}")
    return out


def _distinct(manifest: Path, rows: list[Row]) -> None:
    """Refuse two rows that write one file, and a row that writes what another reads."""
    writers: dict[Path, int] = {}
    readers = {row.file: row.number for row in rows}
    for row in rows:
        where = f"{manifest}: row {row.number}, column 'out': {row.out}"
        if row.out in writers:
            raise InputError(f"{where} is that of row {writers[row.out]}, too", hint="name outputs in a column out")
        if row.out in readers:
            raise InputError(f"{where} is the file of row {readers[row.out]}")
        writers[row.out] = row.number


def _decided(manifest: Path, row: Row, journal: Any, force: bool) -> Todo | Outcome:
    from pvdconvert.batch import decide

    try:
        return decide(row, journal, force=force)
    except OutputError as error:
        raise OutputError(f"{manifest}: row {row.number}, column 'out': {error}") from error


@contextlib.contextmanager
def _engine(cluster: str | None, jobs: int) -> Iterator[tuple[concurrent.futures.Executor, Callable[..., None], str]]:
    from pvdconvert.batch import interrupt

    if cluster is not None:
        from pvdconvert.cluster import connect

        with connect(cluster, jobs) as (executor, ask_to_stop, text):
            yield executor, ask_to_stop, f"--cluster {cluster}: {text}"
        return
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        yield threads, interrupt, ""


def lines(document: dict[str, Any]) -> list[str]:
    """The summary for people: a row for each row, and the counts."""
    colors = {"done": "green", "failed": "red", "interrupted": "yellow"}
    rows = [
        [
            r["row"],
            r["status"],
            "-" if r["exit_code"] is None else r["exit_code"],
            decibel(r["psnr"]),
            "-" if r["seconds"] is None else duration(r["seconds"]),
            r["to"],
            f"{r['out']}" + (f"  {r['error']}" if r["error"] else ""),
        ]
        for r in document["rows"]
    ]
    out = table(["row", "status", "exit", "dB", "time", "to", "output"], rows, right=(0, 2, 3, 4))
    counts = ", ".join(style(f"{n} {name}", colors.get(name, "dim")) for name, n in document["counts"].items() if n)
    return [*out, "", f"{counts}, in {duration(document['seconds'])}"]
