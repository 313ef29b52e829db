"""Write ``formats.md`` from the specs of the built-in plugins: ``python docs/generate.py``. A test holds it current."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvdconvert.plugin import option_help
from pvdconvert.registry import Registry, default

TARGET = Path(__file__).with_name("formats.md")
HEADER = """# Architectures and formats

Written by `python docs/generate.py` from the specs of the built-in plugins; do not edit. What is installed on a
machine, third parties included, is what `pvdconvert formats` and `pvdconvert formats --json` list.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in lines)


def shown(value: Any) -> str:
    """A default as one would type it after ``--set key=``."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return ",".join(shown(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def architectures(registry: Registry) -> str:
    entries = [e.spec for e in registry.architectures().values() if e.origin.builtin]
    rows = [[f"`{s.name}`", s.title, "yes" if s.view_dependent else "no", s.paper] for s in entries]
    parts = ["## Architectures: what `--to` takes", table(["name", "what", "view-dependent", "paper"], rows)]
    for spec in entries:
        keys = [[f"`{k}`", f"`{shown(v)}`", text] for k, v, text in option_help(registry.options(spec.name))]
        parts += [f"### `{spec.name}`: what `--set` takes", table(["key", "default", "meaning"], keys)]
    return "\n\n".join(parts)


def formats(registry: Registry) -> str:
    rows = []
    for entry in registry.formats().values():
        s = entry.spec
        if entry.origin.builtin:
            held = "any" if "*" in s.architectures else ", ".join(f"`{a}`" for a in s.architectures)
            yes = ["yes" if can else "no" for can in (s.can_read, s.can_write)]
            suffixes = ", ".join(f"`{x}`" for x in s.suffixes)
            name = f"`{s.name}`" + (" (default)" if s.native else "")
            rows.append([name, s.title, s.versions, held, *yes, suffixes, s.verified])
    note = "A format is found by looking into the file; suffixes are only what its program usually writes."
    return "\n\n".join(
        [
            "## Formats: what `--from` and `--as` take",
            note,
            table(["name", "what", "versions", "holds", "read", "write", "usual suffix", "reader verified by"], rows),
        ]
    )


def text(registry: Registry) -> str:
    """All of the page."""
    return "\n".join([HEADER, architectures(registry), "", formats(registry), ""])


if __name__ == "__main__":
    TARGET.write_text(text(default()), encoding="utf-8")
