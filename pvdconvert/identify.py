"""Which format is this file? Asked of its content, never of its name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pvdconvert import registry as registries
from pvdconvert.containers import Manifest, open_manifest
from pvdconvert.errors import InputError, PvdError, UnknownError
from pvdconvert.plugin import Match

GOOD = 0.3
"""A best score below this is a resemblance, not a match."""
_MAX_KEYS = 5


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


def identify(path: Path, from_: str | None = None, registry: registries.Registry | None = None) -> Identified:
    """Find the format of the file or folder ``path``; ``from_`` forces one.

    Raises InputError (missing, empty, corrupt, no checkpoint at all), UnsafeError (holds code), or UnknownError (well
    formed, but no format or several fit; an unknown ``from_``).
    """
    registry = registry or registries.default()
    path = Path(path)
    if from_ is not None and path.exists():
        registry.format(from_)  # an unknown name is said before the file is decoded
    manifest = open_manifest(path)
    if manifest.kind == "unknown":
        raise InputError(
            f"{path}: not a checkpoint: its first bytes are those of no known container",
            hint="pvdconvert formats lists what can be read",
        )
    candidates = ask(manifest, registry)
    chosen = manifest
    if manifest.kind == "folder" and not any(c.score >= GOOD for c in candidates):
        chosen, candidates = _of_children(manifest, registry, candidates)
    if from_ is not None:
        own = next((c for c in candidates if c.format == from_ and c.score > 0), None)
        return Identified(chosen, from_, Match(own.score, own.reason) if own else None, candidates)
    best = [c for c in candidates if c.score >= GOOD and c.score >= candidates[0].score - 1e-9]
    if not best:
        raise UnknownError(
            f"{path}: no format fits: {describe(chosen)}; closest: {_closest(candidates)}",
            hint="--from NAME forces one; pvdconvert formats lists them",
        )
    if len(best) > 1:
        named = " or ".join(f"{c.format} ({c.reason})" for c in best)
        raise UnknownError(f"{path}: several formats fit equally well: {named}", hint=f"add --from {best[0].format}")
    return Identified(chosen, best[0].format, Match(best[0].score, best[0].reason), candidates)


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
        except Exception as error:  # a third party's probe may raise anything
            found.append(
                Candidate(name, 0.0, f"its probe failed: {type(error).__name__}: {' '.join(str(error).split())}")
            )
    return tuple(sorted(found, key=lambda c: (-c.score, c.reason == "", c.format)))


def describe(manifest: Manifest) -> str:
    """What the file looks like, in a few words: container, number of tensors, first names."""
    if manifest.kind == "folder":
        if not manifest.children:
            return "a folder without a checkpoint in it"
        return f"a folder with {len(manifest.children)} checkpoint-like files"
    names = list(manifest.tensors)
    if not names:
        return f"a {manifest.kind} file without tensors"
    shown = ", ".join(f"{n} {list(manifest.tensors[n].shape)}" for n in names[:_MAX_KEYS])
    return f"a {manifest.kind} file with {len(names)} tensors ({shown}{', ...' if len(names) > _MAX_KEYS else ''})"


def _closest(candidates: tuple[Candidate, ...]) -> str:
    named = [f"{c.format} ({c.reason})" for c in candidates if c.reason][:2]
    return " and ".join(named) or "none"


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
