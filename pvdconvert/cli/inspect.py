"""``pvdconvert inspect``: what a file is and what it says about its scene, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from pvdconvert.cli import checks, options
from pvdconvert.cli.inspect_text import show
from pvdconvert.cli.output import emit, warn

if TYPE_CHECKING:
    from pvdconvert.containers import Manifest
    from pvdconvert.errors import PvdError
    from pvdconvert.identify import Examined
    from pvdconvert.loading import Asked
    from pvdconvert.plugin import LazyTensor, Parts
    from pvdconvert.registry import Registry

_STEPS = ("epoch", "global_step", "step", "iteration", "iter", "training_step", "trainer_step")
_SUPPLY = {
    "box": "--bounds X0,Y0,Z0,X1,Y1,Z1",
    "background": "--background white|black|R,G,B",
    "near": "--near DISTANCE",
    "far": "--far DISTANCE",
    "ray_space": "--extra width=PIXELS --extra height=PIXELS --extra focal=PIXELS",
}
_OPTION = {"box": "bounds", "ray_space": "focal"}
"""Entries of a scene whose option has another name."""


@options.expanded
def command(
    *,
    file: options.File,
    reading: options.Reading,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what FILE is: program, architecture, sizes, scene, and what it does not say.

    Every format that was considered is listed with its score and the reason. What the file does not hold is listed
    with the value that is assumed, and the option that supplies another. A file that no format reads is shown as far
    as it can be, and the exit code is that of the refusal. -v adds the configuration and every tensor. Of posed
    pictures it says the layout, the splits, the sizes and where the scene is.
    """
    from pvdconvert.cli import inspect_dataset
    from pvdconvert.identify import examine
    from pvdconvert.loading import Asked, take_apart
    from pvdconvert.registry import default

    read = reading.options()
    registry = default()
    if reading.from_ is not None:
        checks.format_name(registry, reading.from_, "--from")
    seen = examine(checks.source(file), reading.from_, registry)
    if seen.found is None and reading.from_ is None and inspect_dataset.shown(file, read, json=json):
        return
    asked, parts, error = Asked.of(read), None, seen.error
    if seen.found is not None:
        try:
            parts = take_apart(seen.found, None, registry, asked)
        except checks.REFUSALS as refused:
            error = refused
    document = describe(registry, str(file), seen, parts, asked, error)
    if not json:
        show(document, verbose=verbose)
        if error is not None:
            raise error
        return
    emit(document)
    if error is not None:
        warn(f"error: {error}")
        raise typer.Exit(error.exit_code)


def describe(
    registry: Registry, path: str, seen: Examined, parts: Parts | None, asked: Asked, error: PvdError | None
) -> dict[str, Any]:
    """The ``--json`` document. Without ``parts``, "error" says why, and the tensors are those of the container."""
    from pvdconvert.resemblance import looks_like

    manifest, found = seen.manifest, seen.found
    spec = None if found is None else registry.formats()[found.format].spec
    architecture = None if parts is None else registry.architectures().get(parts.architecture)
    tensors = manifest.tensors if parts is None else parts.tensors
    return {
        "schema": "pvdconvert/inspect/1",
        "path": path,
        "container": manifest.kind,
        "file_bytes": manifest.size,
        "format": None if found is None else found.format,
        "program": None if spec is None else spec.program or spec.title,
        "versions": "" if spec is None else spec.versions,
        "looks_like": "" if found is not None else looks_like(tensors),
        "architecture": None if parts is None else parts.architecture,
        "architecture_title": "" if architecture is None else architecture.spec.title,
        "config": {} if parts is None else parts.config,
        "training": _training(manifest, parts),
        "parts": _parts(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": sum(_nbytes(t) for t in tensors.values()),
        "scene": None if parts is None else {**parts.scene.to_json(), "backdrop": list(parts.scene.backdrop)},
        "missing": [] if parts is None else _missing(parts, asked),
        "notes": [] if parts is None else list(parts.notes),
        "provenance": {} if parts is None else parts.provenance,
        "candidates": [{"format": c.format, "score": c.score, "reason": c.reason} for c in seen.candidates],
        "forced": found is not None and found.match is None,
        "children": [{"path": str(c.path), "container": c.kind, "bytes": c.size} for c in manifest.children],
        "problems": [{"path": name, "error": str(problem)} for name, problem in manifest.problems],
        "tensors": [
            {"name": name, "shape": list(t.shape), "dtype": t.dtype, "bytes": _nbytes(t)} for name, t in tensors.items()
        ],
        "error": None if error is None else str(error),
        "exit_code": 0 if error is None else error.exit_code,
    }


def _training(manifest: Manifest, parts: Parts | None) -> dict[str, int]:
    """How long the source was trained, by its own words: of the format, else of the file's top level."""
    said = {} if parts is None else parts.provenance
    for source in (said, manifest.meta):
        steps = {k: source[k] for k in _STEPS if type(source.get(k)) is int}
        if any(steps.values()):
            return steps
    return {}


def _missing(parts: Parts, asked: Asked) -> list[dict[str, Any]]:
    """What the file does not hold: the value that stands in for it, and the option that supplies another."""
    scene, looked = parts.scene.to_json(), asked.looked_at()
    rows = []
    for name in parts.scene.assumed:
        option = _OPTION.get(name, name)
        supply = _SUPPLY.get(name, f"--extra {name}=VALUE") if option in looked else ""
        if not supply and "config" in looked:
            supply = "--config FILE"
        value = scene.get(name, parts.config.get(name))
        rows.append({"name": name, "value": value, "supply": supply})
    if parts.scene.background is None and "background" not in parts.scene.assumed:
        supply = _SUPPLY["background"] if "background" in looked else ""
        rows.append({"name": "background", "value": list(parts.scene.backdrop), "supply": supply})
    return rows


def _parts(tensors: Mapping[str, LazyTensor]) -> list[dict[str, Any]]:
    """Tensors summed by the first words of their names: the parts that a reader of the file thinks in."""
    from pvdconvert.resemblance import grouped

    return [
        {
            "name": name,
            "tensors": len(keys),
            "parameters": sum(math.prod(tensors[k].shape) for k in keys),
            "bytes": sum(_nbytes(tensors[k]) for k in keys),
            "dtypes": list(dict.fromkeys(tensors[k].dtype for k in keys)),
            "shape": list(tensors[keys[0]].shape) if len(keys) == 1 else None,
        }
        for name, keys in grouped(tensors).items()
    ]


def _nbytes(tensor: LazyTensor) -> int:
    from pvdconvert.containers.values import ITEM_SIZE

    return math.prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
