"""``pvdconvert``: our own layout. One safetensors file; the header's metadata holds everything that is not a tensor.

Metadata key "pvdconvert": a JSON object {"version": 1, "architecture", "config", "scene", "provenance", "notes"}.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pvdconvert.containers import Manifest, safetensors
from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import FormatBase, FormatSpec, Match, Parts, ReadOptions
from pvdconvert.scene import Scene

SPEC = FormatSpec(
    name="pvdconvert",
    title="pvdconvert's own file: any architecture, exact, with scene and provenance",
    probe="pvdconvert_formats.native:probe",
    code="pvdconvert_formats.native:Native",
    architectures=("*",),
    suffixes=(".safetensors",),
    versions="1",
    verified="known bytes; exact round trip",
    can_write=True,
    native=True,
    program="pvdconvert",
    licence="MIT",
)
KEY = "pvdconvert"
VERSION = 1


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind != "safetensors":
        return None
    if KEY in manifest.meta:
        return Match(1.0, f"safetensors with a {KEY!r} header")
    return Match(0.05, f"safetensors without a {KEY!r} header")


class Native(FormatBase):
    """Reads and writes it; equal parts give equal bytes."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = str(manifest.path)
        try:
            header = json.loads(manifest.meta[KEY])
            version = header["version"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: pvdconvert: no readable {KEY!r} header: {error}") from error
        if version != VERSION:
            raise InputError(
                f"{where}: pvdconvert: the header has version {version!r:.20}, this release reads {VERSION}",
                hint="pip install --upgrade pvdconvert",
            )
        values: dict[str, Any] = {}
        for key, kind in (("architecture", str), ("config", dict), ("scene", dict), ("provenance", dict)):
            values[key] = header.get(key)
            if not isinstance(values[key], kind):
                raise InputError(f"{where}: pvdconvert: header entry {key!r} is missing or malformed")
        try:
            scene = Scene.from_json(values["scene"])
        except InputError as error:
            raise InputError(f"{where}: pvdconvert: {error}") from error
        given: dict[str, Any] = {"background": options.background, "near": options.near, "far": options.far}
        given = {k: v for k, v in given.items() if v is not None}
        if given:
            scene = dataclasses.replace(scene, **given, assumed=tuple(a for a in scene.assumed if a not in given))
        notes = header.get("notes", [])
        notes = tuple(str(n) for n in notes) if isinstance(notes, list) else ()
        return Parts(values["architecture"], values["config"], manifest.tensors, scene, values["provenance"], notes)

    def write(self, parts: Parts, path: Path) -> None:
        header = {
            "version": VERSION,
            "architecture": parts.architecture,
            "config": dict(parts.config),
            "scene": parts.scene.to_json(),
            "provenance": dict(parts.provenance),
            "notes": list(parts.notes),
        }
        try:
            text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{path}: pvdconvert: config, scene or provenance is not JSON: {error}") from error
        safetensors.write(path, parts.tensors, {KEY: text, "format": "pt"})
