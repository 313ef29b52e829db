"""``pvdconvert selftest``: the conformance suite over one installed plugin or format."""

from __future__ import annotations

from typing import Annotated

import typer

from pvdconvert.cli import complete
from pvdconvert.cli.options import Json, Verbose
from pvdconvert.cli.output import emit, say, style, table
from pvdconvert.errors import PluginError, UnknownError


def command(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", autocompletion=complete.everything, help="An architecture or a file layout."),
    ],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check a plugin against its contract.

    For authors of plugins: install yours (pip install -e .), then run this. Exit code 5 if a check fails.
    """
    from pvdconvert.registry import default

    registry = default()
    if name not in registry.architectures() and name not in registry.formats():
        for problem in registry.problems():
            if problem.name == name:
                raise PluginError(f"{name!r} of {problem.origin} cannot be used: {problem.reason}")
        known = sorted({*registry.architectures(), *registry.formats()})
        raise UnknownError(
            f"unknown architecture or layout {name!r}; known: {', '.join(known)}", hint=complete.near(name, known)
        )
    from pvdconvert.testing import selftest

    checks = selftest(name)
    rows = [{"check": c.name, "status": c.status, "detail": c.detail} for c in checks]
    failed = [row["check"] for row in rows if row["status"] == "fail"]
    if json:
        emit({"schema": "pvdconvert/selftest/1", "name": name, "ok": not failed, "checks": rows})
    else:
        colors = {"pass": "green", "ok": "green", "fail": "red", "skip": "yellow"}
        cells = [[style(r["status"].ljust(6), colors.get(r["status"], "dim")), r["check"], r["detail"]] for r in rows]
        for line in table(["status", "check", "detail"], cells):
            say(line)
        say()
        say(f"{name}: {len(rows) - len(failed)} of {len(rows)} checks without a failure")
    if failed:
        raise typer.Exit(PluginError.exit_code)
