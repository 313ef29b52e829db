"""Entry points -> light specs -> code on first use. Imports no torch.

Built-ins (entry points of the distribution ``pvdconvert``) resolve first and cannot be shadowed. A plugin that fails
to import is a *problem*, listed with its reason, and breaks nothing else. ``PVDCONVERT_PLUGINS`` limits third parties:
unset = all, empty = none, a comma list = those distributions or entry-point names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

from pvdconvert.errors import PluginError, UnknownError
from pvdconvert.plugin import (
    API_VERSION,
    FORMAT_GROUP,
    PLUGIN_GROUP,
    Architecture,
    ArchitectureSpec,
    Format,
    FormatSpec,
    Match,
)

CORE = "pvdconvert"
S = TypeVar("S", ArchitectureSpec, FormatSpec)


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """An entry point: its name, its value, and the distribution that declares it."""

    name: str
    value: str
    dist: str
    version: str
    load: Callable[[], Any]

    @property
    def builtin(self) -> bool:
        return self.dist == CORE

    def __str__(self) -> str:
        return f"{self.dist} {self.version}"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A plugin that cannot be used, and why."""

    group: str
    name: str
    origin: Origin
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Entry(Generic[S]):
    """A usable plugin: its spec and where it comes from."""

    spec: S
    origin: Origin


def installed(group: str) -> list[Origin]:
    """The declared entry points of ``group``, built-ins first, then by distribution and name; loads nothing."""
    found: dict[tuple[str, str, str], Origin] = {}
    for point in importlib.metadata.entry_points(group=group):
        dist = point.dist.name if point.dist else "unknown"
        version = point.dist.version if point.dist else "?"
        key = (dist.lower().replace("_", "-"), point.name, point.value)
        found.setdefault(key, Origin(point.name, point.value, key[0], version, point.load))
    return sorted(found.values(), key=lambda o: (not o.builtin, o.dist, o.name))


def _allowed(origin: Origin) -> bool:
    limit = os.environ.get("PVDCONVERT_PLUGINS")
    if limit is None or origin.builtin:
        return True
    return bool({origin.dist, origin.name} & {w.strip() for w in limit.split(",") if w.strip()})


def resolve(path: str) -> Any:
    """The object behind "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry:
    """What is installed. ``source(group)`` yields entry points; tests pass their own."""

    def __init__(self, source: Callable[[str], Iterable[Origin]] = installed) -> None:
        self._source = source
        self._loaded: dict[str, tuple[dict[str, Any], list[Problem]]] = {}
        self._code: dict[tuple[str, str], Any] = {}

    def names(self, group: str) -> list[str]:
        """Names declared for ``group`` without loading anything: for completion."""
        return sorted({o.name for o in self._source(group) if _allowed(o)})

    def architectures(self) -> dict[str, Entry[ArchitectureSpec]]:
        return self._entries(PLUGIN_GROUP, ArchitectureSpec)[0]

    def formats(self) -> dict[str, Entry[FormatSpec]]:
        return self._entries(FORMAT_GROUP, FormatSpec)[0]

    def problems(self) -> list[Problem]:
        return [
            *self._entries(PLUGIN_GROUP, ArchitectureSpec)[1],
            *self._entries(FORMAT_GROUP, FormatSpec)[1],
        ]

    def architecture(self, name: str) -> Architecture:
        """The code of architecture ``name``. Raises UnknownError (with did-you-mean) or PluginError."""
        entry = self._find(PLUGIN_GROUP, name, "architecture")
        return cast(Architecture, self._load_code(PLUGIN_GROUP, name, entry))

    def format(self, name: str) -> Format:
        """The code of format ``name``. Raises UnknownError (with did-you-mean) or PluginError."""
        return cast(Format, self._load_code(FORMAT_GROUP, name, self._find(FORMAT_GROUP, name, "format")))

    def options(self, name: str) -> type:
        """The options dataclass of architecture ``name``."""
        entry = self._find(PLUGIN_GROUP, name, "architecture")
        try:
            return cast(type, resolve(entry.spec.options))
        except Exception as error:
            raise PluginError(f"plugin {name!r} of {entry.origin}: its options failed to import: {error}") from error

    def probes(self) -> Iterable[tuple[str, Callable[[Any], Match | None]]]:
        """(format name, probe) of every readable format."""
        for name, entry in self.formats().items():
            if entry.spec.can_read:
                yield name, self._load_probe(name, entry)

    def native(self) -> str:
        """The name of the default output format."""
        for name, entry in self.formats().items():
            if entry.spec.native:
                return name
        raise PluginError("no native output format is installed", hint="pip install --force-reinstall pvdconvert")

    def _load_probe(self, name: str, entry: Entry[FormatSpec]) -> Callable[[Any], Match | None]:
        @functools.wraps(self._load_probe)
        def probe(manifest: Any) -> Match | None:
            if (FORMAT_GROUP + ".probe", name) not in self._code:
                self._code[FORMAT_GROUP + ".probe", name] = resolve(entry.spec.probe)
            return cast("Match | None", self._code[FORMAT_GROUP + ".probe", name](manifest))

        return probe

    def _find(self, group: str, name: str, what: str) -> Entry[Any]:
        kind: Any = ArchitectureSpec if group == PLUGIN_GROUP else FormatSpec
        entries, problems = self._entries(group, kind)
        if name in entries:
            return entries[name]
        for problem in problems:
            if problem.name == name:
                raise PluginError(
                    f"{what} {name!r} of {problem.origin} cannot be used: {problem.reason}", hint="pvdconvert plugins"
                )
        near = difflib.get_close_matches(name, entries, 1, 0.5)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownError(
            f"unknown {what} {name!r}; known: {', '.join(sorted(entries))}",
            hint=f"{suggestion}pvdconvert formats lists them".strip(),
        )

    def _load_code(self, group: str, name: str, entry: Entry[Any]) -> Any:
        if (group, name) not in self._code:
            for module, install in getattr(entry.spec, "needs", ()):
                try:
                    importlib.import_module(module)
                except ImportError as error:
                    raise PluginError(
                        f"plugin {name!r} of {entry.origin} needs {module!r}: {error}", hint=install
                    ) from error
            try:
                self._code[group, name] = resolve(entry.spec.code)()
            except Exception as error:
                raise PluginError(
                    f"plugin {name!r} of {entry.origin} failed to import: {type(error).__name__}: {error}",
                    hint="pvdconvert plugins",
                ) from error
        return self._code[group, name]

    def _entries(self, group: str, kind: type[S]) -> tuple[dict[str, Entry[S]], list[Problem]]:
        if group not in self._loaded:
            entries: dict[str, Entry[S]] = {}
            problems: list[Problem] = []
            clashing: dict[str, list[Origin]] = {}
            for origin in sorted(self._source(group), key=lambda o: not o.builtin):
                if not _allowed(origin):
                    problems.append(Problem(group, origin.name, origin, "disabled by PVDCONVERT_PLUGINS"))
                    continue
                if origin.name in entries:
                    clashing.setdefault(origin.name, [entries[origin.name].origin]).append(origin)
                    continue
                try:
                    spec = origin.load()
                    reason = _unfit(spec, kind, origin)
                except Exception as error:
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if reason:
                    problems.append(Problem(group, origin.name, origin, reason))
                else:
                    entries[origin.name] = Entry(spec, origin)
            for name, origins in clashing.items():
                both = " and ".join(str(o) for o in origins)
                reason = f"name clash between {both}: uninstall one, or set PVDCONVERT_PLUGINS"
                if not origins[0].builtin:
                    del entries[name]
                for origin in origins[1:] if origins[0].builtin else origins:
                    problems.append(
                        Problem(
                            group, name, origin, f"name clash between {both}: uninstall one, or set PVDCONVERT_PLUGINS"
                        )
                    )
            self._loaded[group] = (entries, problems)
        return self._loaded[group]


def _unfit(spec: Any, kind: type, origin: Origin) -> str:
    if not isinstance(spec, kind):
        return f"{origin.value} is not a {kind.__name__}"
    version = getattr(spec, "api_version", None)
    if version != API_VERSION:
        return f"made for plugin API {version}, this is {API_VERSION}"
    if getattr(spec, "name", None) != origin.name:
        return f"entry point {origin.name!r} announces the name {getattr(spec, 'name', None)!r}"
    return ""


@functools.cache
def default() -> Registry:
    """The registry of this environment."""
    return Registry()
