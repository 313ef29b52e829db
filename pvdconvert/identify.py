"""Which format is this file? Asked of its content, never of its name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pvdconvert import registry as registries
from pvdconvert.containers import Manifest, open_manifest
from pvdconvert.errors import PvdError, UnknownError
from pvdconvert.plugin import Match
from pvdconvert.resemblance import describe, foreign, splats

GOOD = 0.3
"""A best score below this is a resemblance, not a match."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A format's verdict. ``score`` 0: it does not fit, and ``reason`` says why (empty: it did not say)."""

    format: str
    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class Identified:
    """``format`` reads ``manifest``: the file, or the one file of a folder that holds the checkpoint.

    ``match`` is None where ``--from`` forced a format whose probe disagrees; ``candidates`` are sorted, best first.
    """

    manifest: Manifest
    format: str
    match: Match | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Examined:
    """A well-formed file: what each format says of it, and either its format or why there is none."""

    manifest: Manifest
    candidates: tuple[Candidate, ...]
    found: Identified | None = None
    error: PvdError | None = None


def identify(path: Path, from_: str | None = None, registry: registries.Registry | None = None) -> Identified:
    """Find the format of the file or folder ``path``; ``from_`` forces one.

    Raises InputError (missing, empty, corrupt, no checkpoint at all), UnsafeError (holds code), or UnknownError (well
    formed, but no format or several fit; an unknown ``from_``).
    """
    seen = examine(path, from_, registry)
    if seen.found is None:
        assert seen.error is not None
        raise seen.error
    return seen.found


def examine(path: Path, from_: str | None = None, registry: registries.Registry | None = None) -> Examined:
    """As :func:`identify`, but a well-formed file of no format, or of several, is returned with its error."""
    registry = registry or registries.default()
    path = Path(path)
    if from_ is not None and path.exists():
        registry.format(from_)  # an unknown name is said before the file is decoded
    manifest = open_manifest(path)
    if manifest.kind == "unknown":
        raise foreign(path)
    return choose(manifest, from_, registry)


def choose(manifest: Manifest, from_: str | None, registry: registries.Registry) -> Examined:
    """The verdict on a manifest of a known kind."""
    candidates = ask(manifest, registry)
    chosen, path = manifest, manifest.path
    if manifest.kind == "folder" and not any(c.score >= GOOD for c in candidates):
        try:
            chosen, candidates = _of_children(manifest, registry, candidates)
        except UnknownError as several:
            return Examined(manifest, candidates, error=several)
    if from_ is not None:
        own = next((c for c in candidates if c.format == from_ and c.score > 0), None)
        match = Match(own.score, own.reason) if own else None
        return Examined(chosen, candidates, Identified(chosen, from_, match, candidates))
    best = [c for c in candidates if c.score >= GOOD and c.score >= candidates[0].score - 1e-9]
    if not best:
        error: PvdError = splats(chosen) or UnknownError(
            f"{path}: no format fits: {describe(chosen)}; closest: {_closest(candidates)}",
            hint="--from NAME forces one; pvdconvert inspect shows more",
        )
        return Examined(chosen, candidates, error=error)
    if len(best) > 1:
        named = " or ".join(f"{c.format} ({c.reason})" for c in best)
        error = UnknownError(f"{path}: several formats fit equally well: {named}", hint=f"add --from {best[0].format}")
        return Examined(chosen, candidates, error=error)
    return Examined(
        chosen, candidates, Identified(chosen, best[0].format, Match(best[0].score, best[0].reason), candidates)
    )


def ask(manifest: Manifest, registry: registries.Registry) -> tuple[Candidate, ...]:
    """Every readable format's verdict, best first. A probe that fails is a verdict of 0, never a crash."""
    found = []
    for name, probe in registry.probes():
        try:
            match = probe(manifest)
            if match is None:
                found.append(Candidate(name, 0.0, ""))
            else:
                found.append(Candidate(name, min(1.0, max(0.0, float(match.score))), str(match.reason)))
        except PvdError as error:  # a refusal in words says why it does not fit
            found.append(Candidate(name, 0.0, str(error).removeprefix(f"{manifest.path}: ").removeprefix(f"{name}: ")))
        except Exception as error:  # a third party's probe may raise anything
            found.append(
                Candidate(name, 0.0, f"its probe failed: {type(error).__name__}: {' '.join(str(error).split())}")
            )
    return tuple(sorted(found, key=lambda c: (-c.score, c.reason == "", c.format)))


def _closest(candidates: tuple[Candidate, ...]) -> str:
    named = [f"{c.format} ({c.reason})" for c in candidates if c.reason][:2]
    return " and ".join(named) or "none, its names are those of no program known here"


def _of_children(
    folder: Manifest, registry: registries.Registry, own: tuple[Candidate, ...]
) -> tuple[Manifest, tuple[Candidate, ...]]:
    """The one child that some format reads, with its candidates; the folder itself if there is none."""
    asked = [(child, ask(child, registry)) for child in folder.children]
    fits = [(child, found) for child, found in asked if found and found[0].score >= GOOD]
    if not fits:
        if not folder.children and folder.problems:
            problem: PvdError = folder.problems[0][1]
            raise problem
        return folder, own if not asked else max((f for _, f in asked), key=lambda f: f[0].score if f else 0.0) or own
    top = max(found[0].score for _, found in fits)
    best = [(child, found) for child, found in fits if found[0].score >= top - 1e-9]
    if len(best) > 1:
        names = ", ".join(str(child.path.relative_to(folder.path)) for child, _ in best[:4])
        raise UnknownError(f"{folder.path}: the folder holds several checkpoints: {names}", hint="name one of them")
    return best[0]
