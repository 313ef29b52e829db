"""``--report FILE.json|FILE.html``, for every command that has one: checked before the work, written after it.

html = reporting.checked(report, force=force, out=path)     # early; raises UsageError or OutputError
...collect pvdconvert.report.html.View only if html...
reporting.save(report, document, views)                     # late
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
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

        html.write(report, data, views, command=typed())
        return
    try:
        report.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{report}: cannot be written: {error.strerror}") from error


_arguments: tuple[str, ...] = ()


def remember(arguments: Sequence[str]) -> None:
    """What this run was called with (without the program's name), so that a report can say it."""
    global _arguments
    _arguments = tuple(arguments)


def typed() -> str:
    """The command line of this run, as a shell would take it."""
    return shlex.join(["pvdconvert", *_arguments])
