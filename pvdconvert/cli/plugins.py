"""``pvdconvert plugins``: what is installed, from where, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pvdconvert.cli.options import Json, Verbose
from pvdconvert.cli.output import emit, say, style, table

if TYPE_CHECKING:
    from pvdconvert.registry import Registry


def command(json: Json = False, verbose: Verbose = False) -> None:
    """List installed plugins and their status.

    PVDCONVERT_PLUGINS limits third parties: empty = none, a comma list = those only.
    """
    from pvdconvert.registry import default

    rows = describe(default())
    if json:
        emit({"schema": "pvdconvert/plugins/1", "plugins": rows})
        return
    cells = [
        [r["kind"], r["name"], r["distribution"], r["version"], _status(r["status"]), r["reason"] or ""] for r in rows
    ]
    for line in table(["kind", "name", "distribution", "version", "status", "reason"], cells):
        say(line)


def describe(registry: Registry) -> list[dict[str, Any]]:
    """One row a plugin: usable ones first, then the others with the reason."""
    from pvdconvert.plugin import PLUGIN_GROUP

    rows: list[dict[str, Any]] = []
    rows += [_row("architecture", n, e.origin, "ok", None) for n, e in sorted(registry.architectures().items())]
    rows += [_row("format", n, e.origin, "ok", None) for n, e in sorted(registry.formats().items())]
    for problem in registry.problems():
        kind = "architecture" if problem.group == PLUGIN_GROUP else "format"
        rows.append(_row(kind, problem.name, problem.origin, _kind_of(problem.reason), problem.reason))
    return rows


def _row(kind: str, name: str, origin: Any, status: str, reason: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "distribution": origin.dist,
        "version": origin.version,
        "builtin": origin.builtin,
        "entry_point": origin.value,
        "status": status,
        "reason": reason,
    }


def _kind_of(reason: str) -> str:
    if reason.startswith("disabled"):
        return "disabled"
    if reason.startswith("name clash"):
        return "clash"
    if reason.startswith("made for plugin API"):
        return "incompatible"
    return "broken"


def _status(text: str) -> str:
    # Padded to the longest status before styling: escape codes must not count as width.
    return style(text.ljust(12), {"ok": "green", "disabled": "dim"}.get(text, "red"))
