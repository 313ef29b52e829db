"""``pvdconvert formats``: what can be converted, read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvdconvert.cli import complete
from pvdconvert.cli.options import Json, Verbose
from pvdconvert.cli.output import block, emit, say, style, table, warn
from pvdconvert.errors import PvdError, UnknownError

if TYPE_CHECKING:
    from pvdconvert.plugin import ArchitectureSpec, FormatSpec
    from pvdconvert.registry import Entry, Registry


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            show_default=False,
            autocompletion=complete.everything,
            help="Show only this architecture or layout, with the keys that --set takes.",
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List architectures and file layouts.

    Architectures are what --to takes, layouts what --from and --as take; each is listed with where it comes from.
    """
    from pvdconvert.registry import default

    registry = default()
    document = describe(registry, options=json or name is not None)
    if name is not None:
        document = _only(document, name)
    if json:
        emit(document)
        return
    if name is not None:
        _details(document)
        return
    say(style("Architectures", "bold") + " (convert with --to NAME)")
    rows: list[list[Any]] = [
        [a["name"], a["reads"], a["writes"], a["origin"], a["title"]] for a in document["architectures"]
    ]
    _indented(table(["name", "read", "write", "from", "what it is"], rows))
    say()
    say(style("Layouts", "bold") + " (found by contents, or --from NAME; written with --as NAME)")
    rows = [
        [
            f["name"] + (" *" if f["native"] else ""),
            "yes" if f["read"] else "-",
            "yes" if f["write"] else "-",
            " ".join(f["architectures"]).replace("*", "any"),
            " ".join(f["suffixes"]) or "-",
            f["origin"],
            f["title"],
        ]
        for f in document["formats"]
    ]
    _indented(table(["name", "read", "write", "holds", "suffix", "from", "what it is"], rows))
    say()
    say("* the layout of outputs unless --as says otherwise. More on one: pvdconvert formats NAME")
    if registry.problems():
        warn(f"note: {len(registry.problems())} plugins cannot be used; see pvdconvert plugins")


def describe(registry: Registry, *, options: bool) -> dict[str, Any]:
    """The ``--json`` document; ``options`` adds the configuration keys of each architecture."""
    formats = registry.formats()
    return {
        "schema": "pvdconvert/formats/1",
        "architectures": [
            _architecture(registry, name, entry, formats, options)
            for name, entry in sorted(registry.architectures().items())
        ],
        "formats": [_format(entry) for _, entry in sorted(formats.items())],
    }


def _architecture(
    registry: Registry,
    name: str,
    entry: Entry[ArchitectureSpec],
    formats: dict[str, Entry[FormatSpec]],
    options: bool,
) -> dict[str, Any]:
    spec = entry.spec
    holders = [f.spec for f in formats.values() if {"*", name} & set(f.spec.architectures)]
    row: dict[str, Any] = {
        "name": name,
        "title": spec.title,
        "reads": " ".join(sorted(f.name for f in holders if f.can_read)) or "-",
        "writes": " ".join(sorted(f.name for f in holders if {"*", name} & set(f.written))) or "-",
        "read_from": sorted(f.name for f in holders if f.can_read),
        "written_as": sorted(f.name for f in holders if {"*", name} & set(f.written)),
        "view_dependent": spec.view_dependent,
        "unbounded": spec.unbounded,
        "paper": spec.paper,
        "licence": spec.licence,
        **_origin(entry),
    }
    if options:
        row["options"], row["problem"] = _options(registry, name)
    return row


def _options(registry: Registry, name: str) -> tuple[list[dict[str, Any]], str | None]:
    from pvdconvert.cli.settings import hints, type_name
    from pvdconvert.plugin import option_help

    try:
        options = registry.options(name)
        types = hints(options)
    except (PvdError, TypeError, NameError) as error:
        return [], str(error)
    rows = [
        {"name": key, "type": type_name(types.get(key, Any)), "default": value, "help": text}
        for key, value, text in option_help(options)
    ]
    return rows, None


def _format(entry: Entry[FormatSpec]) -> dict[str, Any]:
    spec = entry.spec
    return {
        "name": spec.name,
        "title": spec.title,
        "program": spec.program,
        "architectures": list(spec.architectures),
        "suffixes": list(spec.suffixes),
        "read": spec.can_read,
        "write": spec.can_write,
        "native": spec.native,
        "licence": spec.licence,
        **_origin(entry),
    }


def _origin(entry: Entry[Any]) -> dict[str, Any]:
    origin = entry.origin
    return {
        "distribution": origin.dist,
        "version": origin.version,
        "builtin": origin.builtin,
        "origin": str(origin),
        "api_version": entry.spec.api_version,
    }


def _only(document: dict[str, Any], name: str) -> dict[str, Any]:
    kept = {key: [row for row in document[key] if row["name"] == name] for key in ("architectures", "formats")}
    if not any(kept.values()):
        known = sorted({row["name"] for key in kept for row in document[key]})
        raise UnknownError(
            f"unknown architecture or layout {name!r}; known: {', '.join(known)}", hint=complete.near(name, known)
        )
    return {**document, **kept}


def _details(document: dict[str, Any]) -> None:
    for row in document["architectures"]:
        say(f"{style(row['name'], 'bold')}: an architecture. {row['title']}")
        _indented(
            block(
                [
                    ("paper", row["paper"] or None),
                    ("licence", row["licence"] or None),
                    ("from", row["origin"]),
                    ("read from", ", ".join(row["read_from"]) or "-"),
                    ("written as", ", ".join(row["written_as"]) or "-"),
                    ("problem", row["problem"]),
                ]
            )
        )
        if row["options"]:
            say()
            say("Keys for --set KEY=VALUE; without it the planner chooses to fit the scene and the budget:")
            rows = [[o["name"], o["type"], _shown(o["default"]), o["help"]] for o in row["options"]]
            _indented(table(["key", "type", "default", "meaning"], rows))
    for row in document["formats"]:
        say(f"{style(row['name'], 'bold')}: a file layout. {row['title']}")
        _indented(
            block(
                [
                    ("program", row["program"] or None),
                    ("holds", ", ".join(row["architectures"]).replace("*", "any architecture")),
                    ("read", "yes" if row["read"] else "no"),
                    ("write", "yes" if row["write"] else "no"),
                    ("suffixes", " ".join(row["suffixes"]) or None),
                    ("licence", row["licence"] or None),
                    ("from", row["origin"]),
                ]
            )
        )


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(v) for v in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _indented(lines: list[str]) -> None:
    for line in lines:
        say(f"  {line}")
