"""Refusals that happen before any work. Imports no torch: a bad name or file must be answered at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pvdconvert.cli import complete
from pvdconvert.cli.output import warn
from pvdconvert.errors import InputError, OutputError, PluginError, RequestError, UnknownError, UnsafeError, UsageError

if TYPE_CHECKING:
    from pvdconvert.cameras import Camera
    from pvdconvert.data import Dataset
    from pvdconvert.identify import Identified
    from pvdconvert.plugin import FormatSpec, Parts, ReadOptions
    from pvdconvert.registry import Registry
    from pvdconvert.scene import Scene

REFUSALS = (InputError, UnknownError, UnsafeError, RequestError)
"""What a file is refused with, as opposed to what is wrong with the command line or the installation."""


def source(path: Path) -> Path:
    """``path`` if there is something to read. Contents are judged by the formats."""
    if str(path) == "-":
        raise UsageError("reading from a pipe is not supported", hint="give a file or folder")
    try:
        present = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if not present:
        near = complete.near(path.name, _siblings(path.parent))
        raise InputError(f"{path}: no such file or folder", hint=near)
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return path


def target(registry: Registry, name: str | None, layout: str | None) -> tuple[str, FormatSpec | None]:
    """The architecture's name, and the spec of the layout that ``--as`` names, checked against each other."""
    known = sorted(registry.architectures())
    if not name:
        raise UsageError("--to is missing", hint=f"say what to convert to: --to {'|'.join(known)}")
    formats = registry.formats()
    if name not in known and name in formats:
        holds = formats[name].spec.architectures
        example = f"--to {'ARCHITECTURE' if '*' in holds else holds[0]} --as {name}"
        raise UnknownError(f"--to {name}: that is a file layout, not an architecture", hint=f"type {example}")
    registry.options(name)  # raises UnknownError or PluginError, and imports no torch
    if layout is None:
        return name, None
    spec = formats[format_name(registry, layout, "--as")].spec
    if not spec.can_write:
        writers = sorted(n for n, e in formats.items() if e.spec.can_write)
        raise UsageError(f"--as {spec.name}: that layout can only be read", hint=f"written: {', '.join(writers)}")
    if not _holds(spec, name):
        raise UsageError(
            f"--as {spec.name}: that layout cannot hold {name}", hint=f"it holds {', '.join(spec.written)}"
        )
    return name, spec


def _holds(spec: FormatSpec, architecture: str) -> bool:
    return bool({"*", architecture} & set(spec.written))


def of_suffix(registry: Registry, architecture: str, out: Path | None) -> FormatSpec:
    """The layout that the suffix of ``out`` stands for; our own where it stands for none. Raises UsageError."""
    formats, suffix = registry.formats(), "" if out is None else out.suffix.lower()
    native = formats[registry.native()].spec
    specs = [e.spec for e in formats.values() if suffix and suffix in e.spec.suffixes]
    fits = sorted(s.name for s in specs if s.can_write and _holds(s, architecture))
    if not specs or native in specs:
        return native
    if len(fits) > 1:
        raise UsageError(
            f"-o {out}: {suffix} is written by {' and by '.join(fits)}", hint=f"add --as {' or --as '.join(fits)}"
        )
    if not fits:
        able = sorted(s.name for s in specs if s.can_write)
        why = f"{' and '.join(able)} cannot hold {architecture}" if able else "those layouts can only be read"
        raise UsageError(
            f"-o {out}: {suffix} is the suffix of {', '.join(sorted(s.name for s in specs))}, and {why}",
            hint=f"-o {out.with_suffix('.safetensors') if out else ''}, or --as NAME",
        )
    return formats[fits[0]].spec


def format_name(registry: Registry, name: str, option: str) -> str:
    """``name`` if it is a usable format. Raises UnknownError with did-you-mean, or PluginError with the reason."""
    formats = registry.formats()
    if name in formats:
        return name
    for problem in registry.problems():
        if problem.name == name and problem.group.endswith("formats"):
            raise PluginError(f"{option} {name}: format of {problem.origin} cannot be used: {problem.reason}")
    if name in registry.architectures():
        raise UnknownError(f"{option} {name}: that is an architecture, not a file layout", hint="pvdconvert formats")
    raise UnknownError(
        f"{option} {name}: unknown format; known: {', '.join(sorted(formats))}",
        hint=complete.near(name, formats) or "pvdconvert formats",
    )


def derived(path: Path, name: str, suffix: str) -> Path:
    """The output's name where none was given: in the current folder, after the input."""
    stem = path.resolve().name if path.is_dir() else path.stem
    return Path(f"{stem}-{name}{suffix}")


def output(path: Path, *, force: bool, source: Path | None = None, suffix: str = "") -> Path:
    """``path`` if a file can be written there. Raises UsageError or OutputError."""
    if str(path) == "-":
        raise UsageError("-o -: binary output is not written to stdout", hint=f"give a file name, such as out{suffix}")
    if str(path).endswith(os.sep) or path.is_dir():
        raise OutputError(f"{path}: is a folder", hint=f"name a file in it: {path / f'out{suffix}'}")
    folder = path.parent
    if not folder.is_dir():
        if folder.exists():
            raise OutputError(f"{folder}: is not a folder")
        raise OutputError(f"{folder}: no such folder", hint=f"mkdir -p {folder}")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"{path}: is the input itself", hint="choose another -o")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists", hint="--force overwrites it")
    try:
        # Asking the file system, not the mode bits: read-only mounts and root make those lie.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".pvdconvert-"):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    return path


def resumable(path: Path, resume: bool) -> None:
    """Refuse ``--resume`` where nothing was left behind; say so where something was and nobody asked for it."""
    left = path.with_name(f"{path.name}.resume")
    if resume and not left.is_dir():
        raise UsageError(f"--resume: there is no {left}", hint="start without --resume")
    if left.is_dir() and not resume:
        warn(f"note: {left} holds an interrupted run; --resume would continue it")


def cameras(path: Path) -> tuple[Camera, ...]:
    """The cameras of ``--cameras``."""
    from pvdconvert.data.opening import open_cameras

    return open_cameras(path)


def pictures(path: Path, scene: Scene, *splits: str) -> Dataset:
    """The dataset of ``--images``, which has ``splits`` and can be brought to a field of ``scene``."""
    source(path)
    from pvdconvert.data.opening import open_dataset
    from pvdconvert.placing import placed

    dataset = open_dataset(path, ndc=True if scene.ray_space.kind == "ndc" else None)
    for name in ("test", *splits):
        dataset.split(name)
    placed(dataset, scene)
    return dataset


def recognised(registry: Registry, path: Path, from_: str | None) -> Identified:
    """Which format ``path`` is, without torch: refuses unknown, ambiguous, corrupt and unsafe files."""
    if from_ is not None:
        format_name(registry, from_, "--from")
    source(path)
    from pvdconvert.identify import identify

    return identify(path, from_, registry)


def readable(registry: Registry, path: Path, from_: str | None, read: ReadOptions) -> tuple[Identified, Parts]:
    """:func:`recognised`, and the file taken apart; what a small file holds are numbers."""
    found = recognised(registry, path, from_)
    from pvdconvert.loading import check_small, take_apart

    parts = take_apart(found, read, registry)
    check_small(parts.tensors, str(path))
    return found, parts


def _siblings(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:10000]
    except OSError:
        return []
