"""Many conversions from one manifest, each in a process of its own, and a journal that lets a batch go on where it was.

Imports no torch. A row is run as the command line runs it, so that a crash of one, or the kernel killing it for its
memory, never takes another one. The journal is a file of JSON lines: one when a row may begin, one when it has ended.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pvdconvert.errors import OutputError
from pvdconvert.progress import Progress

SCHEMA = "pvdconvert/batch/1"
FAILED = 11
"""Exit code of a batch of which some rows failed."""
INTERRUPTED = 130
POLL = 0.2
"""Seconds between two looks at whether the batch shall stop."""
GRACE = 60.0
"""Seconds that a row has to save itself."""
DAMAGED = (2, 3)
"""Exit codes of a row whose kept state cannot be used: it starts afresh."""
_FILES = 10_000


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversion. ``number`` as a spreadsheet counts: the header is row 1.

    request  arguments that decide the result;  how  those that do not (device, threads)
    """

    number: int
    file: Path
    to: str
    out: Path
    request: tuple[str, ...]
    how: tuple[str, ...] = ()


@dataclasses.dataclass
class Outcome:
    """What became of a row: ``status`` is done, skipped, failed, interrupted or waiting."""

    row: int
    file: str
    to: str
    out: str
    status: str = "waiting"
    exit_code: int | None = None
    psnr: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Todo:
    """A row that has to run, and with which flags."""

    row: Row
    flags: tuple[str, ...] = ()


# -- the journal -----------------------------------------------------------------------------------------------------


class Journal:
    """Append-only JSON lines, the last one about an output wins; held by one batch at a time.

    Raises OutputError where it cannot be written or another batch holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[str] = path.open("a+", encoding="utf-8")
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise OutputError(f"{path}: another batch is at work with it", hint="wait for it, or end it") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}", hint="--out-dir") from error
        self.last: dict[str, dict[str, Any]] = {}
        self._file.seek(0)
        text = self._file.read()
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                entry = json.loads(line)
                self.last[str(entry["out"])] = entry
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def add(self, *entries: Mapping[str, Any]) -> None:
        """More lines, on the disk when this returns. Raises OutputError."""
        self.last |= {str(entry["out"]): dict(entry) for entry in entries}
        try:
            self._file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Let go of it; nothing is left of one that was never written to."""
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
            self._file.close()


def fingerprint(path: Path) -> list[int] | None:
    """[bytes, newest change in ns] of a file or of a folder's files; None where there is nothing."""
    try:
        files = [p for p, _ in zip(path.rglob("*"), range(_FILES)) if p.is_file()] if path.is_dir() else [path]
        found = [p.stat() for p in files]
    except OSError:
        return None
    return [sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decide(row: Row, journal: Journal, *, force: bool) -> Todo | Outcome:
    """What to do about ``row``: nothing (an Outcome, skipped), or to run it.

    A finished row is skipped where its request and source are the same and its output is the one that was written.
    Raises OutputError where a file is in the way.
    """
    last = journal.last.get(str(row.out), {})
    source = fingerprint(row.file)
    same = last.get("request") == list(row.request) and (source is None or last.get("source") == source)
    flags: tuple[str, ...] = ()
    if row.out.exists():
        finished = last.get("event") == "end" and last.get("exit_code") == 0
        if same and finished and row.out.is_file() and _unchanged(row.out, last):
            kept: dict[str, Any] = {k: last.get(k) for k in ("psnr", "seconds", "bytes", "peak_bytes")}
            return Outcome(row.number, str(row.file), row.to, str(row.out), "skipped", 0, **kept)
        # A row that began, and whose end nobody saw: the output is its own.
        if not force and last.get("event") != "begin":
            why = "exists" if not finished else "exists, of other settings" if not same else "was changed since"
            raise OutputError(f"{row.out}: {why}", hint="--force overwrites it")
        flags = ("--force",)
    if same and row.out.with_name(f"{row.out.name}.resume").is_dir():
        flags += ("--resume",)
    return Todo(row, flags)


def _unchanged(out: Path, last: Mapping[str, Any]) -> bool:
    try:
        return out.stat().st_size == last.get("bytes") and digest(out) == last.get("sha256")
    except OSError:
        return False


# -- one row, wherever it runs ---------------------------------------------------------------------------------------

_stopped: set[str] = set()
_running: dict[str, set[subprocess.Popen[str]]] = {}


def work(token: str, file: str, request: Sequence[str], how: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """Run one row in a process of its own: exit_code, error, seconds, psnr, bytes, sha256, peak_bytes. Never raises."""
    begin = time.perf_counter()
    found = _attempt(token, [file, *request, *how, *flags])
    if "--resume" in flags and found["exit_code"] in DAMAGED:
        found = _attempt(token, [file, *request, *how, *(f for f in flags if f != "--resume")])
    return {**found, "seconds": time.perf_counter() - begin}


def _attempt(token: str, arguments: Sequence[str]) -> dict[str, Any]:
    if token in _stopped:
        return {"exit_code": None, "error": ""}
    command = [sys.executable, "-m", "pvdconvert", "convert", *arguments, "--json", "--progress", "none"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"exit_code": 1, "error": f"cannot start: {error.strerror or error}"}
    _running.setdefault(token, set()).add(process)
    try:
        if token in _stopped:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        _running[token].discard(process)
    return _judge(process.returncode, out, err)


def _judge(code: int, out: str, err: str) -> dict[str, Any]:
    document: Any = None
    with contextlib.suppress(ValueError):
        document = json.loads(out)
    if not isinstance(document, dict):
        document = {}
    if code == -signal.SIGINT:
        code = INTERRUPTED
    if code != 0:
        lines = [line for line in err.splitlines() if line.strip()]
        error = document.get("error") or (lines[-1].removeprefix("pvdconvert: error: ") if lines else "")
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                error = f"ended by {name}" + (": out of memory?" if name == "SIGKILL" else "")
            code = 128 - code
        return {"exit_code": code, "error": error or f"ended with {code} and said nothing"}
    target, fidelity = document.get("target") or {}, document.get("fidelity") or {}
    found = {"exit_code": 0, "error": "", "psnr": fidelity.get("psnr"), "peak_bytes": document.get("peak_bytes")}
    try:
        path = Path(target["path"])
        return {**found, "bytes": path.stat().st_size, "sha256": digest(path)}
    except (OSError, KeyError, TypeError) as error:
        return {"exit_code": 9, "error": f"the output is not there: {error}"}


def interrupt(token: str, *, kill: bool = False) -> None:
    """Let no row of this batch begin any more in this process; those that run are asked to save themselves."""
    _stopped.add(token)
    for process in list(_running.get(token, ())):
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGKILL if kill and hasattr(signal, "SIGKILL") else signal.SIGINT)


# -- the batch -------------------------------------------------------------------------------------------------------


def run(
    todo: Sequence[Todo],
    journal: Journal,
    executor: concurrent.futures.Executor,
    *,
    progress: Progress,
    stop: Callable[[], bool],
    ask_to_stop: Callable[..., None] = interrupt,
) -> Iterator[Outcome]:
    """Run rows by ``executor`` and yield what became of each, in the order in which they end.

    ask_to_stop  :func:`interrupt`, in every process that runs rows
    """
    token = f"{os.getpid()}-{time.time_ns()}"
    # Before the first one runs: from now on an output that was not there is ours.
    journal.add(*({"event": "begin", **_about(each.row)} for each in todo))
    progress.stage("batch", float(len(todo)))
    stop()  # who asks can be told to stop, from now on
    futures = {executor.submit(work, token, str(t.row.file), t.row.request, t.row.how, t.flags): t.row for t in todo}
    waiting, done, asked = set(futures), 0, False
    try:
        while waiting:
            if not asked and stop():
                asked = True
                ask_to_stop(token)
            ended, waiting = concurrent.futures.wait(
                waiting, timeout=POLL, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                outcome = _ended(futures[future], future, journal)
                done += 1
                progress.advance(float(done))
                if outcome.status != "waiting":
                    progress.note(_line(outcome))
                yield outcome
    finally:
        if waiting:  # an error, or a second interrupt: nothing outlives the batch
            ask_to_stop(token)
            _, left = concurrent.futures.wait(waiting, timeout=GRACE)
            if left:
                ask_to_stop(token, kill=True)


def _ended(row: Row, future: concurrent.futures.Future[dict[str, Any]], journal: Journal) -> Outcome:
    try:
        found = future.result()
    except Exception as error:  # of the engine: a lost worker, a broken connection
        found = {"exit_code": 1, "error": " ".join(f"{type(error).__name__}: {error}".split())}
    code = found["exit_code"]
    known = {f.name for f in dataclasses.fields(Outcome)}
    values = {k: v for k, v in found.items() if k in known}
    status = "waiting" if code is None else {0: "done", INTERRUPTED: "interrupted"}.get(code, "failed")
    if code is not None:
        journal.add({"event": "end", **_about(row), **found})
    return Outcome(row.number, str(row.file), row.to, str(row.out), status, **values)


def _about(row: Row) -> dict[str, Any]:
    return {"out": str(row.out), "request": list(row.request), "source": fingerprint(row.file), "row": row.number}


def _line(o: Outcome) -> str:
    said = f"{o.psnr:.2f} dB" if o.psnr is not None else o.error
    return f"row {o.row}: {o.status}: {o.out}" + (f": {said}" if said else "")


def document(manifest: Path, journal: Path, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """The batch as data, schema ``pvdconvert/batch/1``; rows in the manifest's order."""
    rows = sorted(outcomes, key=lambda o: o.row)
    counts = {s: sum(o.status == s for o in rows) for s in ("done", "skipped", "failed", "interrupted", "waiting")}
    return {
        "schema": SCHEMA,
        "manifest": str(manifest),
        "state": str(journal),
        "counts": counts,
        "seconds": seconds,
        "rows": [dataclasses.asdict(o) for o in rows],
    }


def exit_code(outcomes: Sequence[Outcome], *, stopped: bool) -> int:
    """0 where every row is done, 130 where the batch was stopped, else :data:`FAILED`."""
    if stopped or any(o.status in ("interrupted", "waiting") for o in outcomes):
        return INTERRUPTED
    return FAILED if any(o.status == "failed" for o in outcomes) else 0
