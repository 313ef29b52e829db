"""``--report FILE.json|FILE.html``, for every command that has one: checked before the work, written after it.

html = reporting.checked(report, force=force, out=path)     # early; raises UsageError or OutputError
...collect pvdconvert.report.html.View only if html...
reporting.save(report, document, views)                     # late
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import checks
from pvdconvert.cli.output import clean
from pvdconvert.errors import OutputError, UsageError

if TYPE_CHECKING:
    from pvdconvert.report.html import View

SUFFIXES = (".html", ".htm")

Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html|FILE.json", help="Also write a report there: a page with pictures, or JSON."
    ),
]


def checked(report: Path | None, *, force: bool, out: Path | None = None) -> bool:
    """Whether ``report`` is a page, for which pictures should be kept. ``out`` is what else the command writes.

    Raises UsageError or OutputError where it cannot be written.
    """
    if report is None:
        return False
    name = checks.output(report, force=force, suffix=".html")
    if out is not None and name.resolve() == out.resolve():
        raise UsageError("--report and -o name the same file")
    return report.suffix.lower() in SUFFIXES


def save(report: Path | None, document: Mapping[str, Any], views: Sequence[View] = ()) -> None:
    """Write ``document`` to ``report``: as a page if its suffix says so, else as JSON. None = nothing to do."""
    if report is None:
        return
    data = clean(document)
    if report.suffix.lower() in SUFFIXES:
        from pvdconvert.report import html

        data.setdefault("machine", machine())
        html.write(report, data, views, command=typed(_arguments), again=replayed(_arguments, data.get("replay")))
        return
    write_json(report, data)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` to ``path``. Raises OutputError."""
    try:
        path.write_text(json.dumps(clean(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


_arguments: tuple[str, ...] = ()


def remember(arguments: Sequence[str]) -> None:
    """What this run was called with (without the program's name), so that a report can say it."""
    global _arguments
    _arguments = tuple(arguments)


def typed(arguments: Sequence[str]) -> str:
    """A command line as a shell would take it; "" where none was remembered (Python called the command)."""
    return shlex.join(["pvdconvert", *arguments]) if arguments else ""


def replayed(arguments: Sequence[str], steps: object) -> str:
    """The command that runs the same ``steps``: without the clock, and from the start. "" without steps."""
    if not arguments or not steps:
        return ""
    kept, skip = [], False
    for word in arguments:
        timed = word.split("=")[0] in ("--budget", "--replay")
        if not (skip or timed or word == "--resume"):
            kept.append(word)
        skip = timed and "=" not in word
    return shlex.join(["pvdconvert", *kept, "--replay", str(steps)])


def machine() -> dict[str, Any]:
    """Versions, and what this ran on; no names of machines or people."""
    torch: Any = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        **{name: version(name) for name in ("pvdconvert", "torch", "numpy")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "GPU": torch.cuda.get_device_name() if cuda else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(named, platform.processor())
    except OSError:
        return platform.processor()
