"""``pvdconvert inspect``: what a file is and what it says about its scene, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pvdconvert.cli import checks, options
from pvdconvert.cli.output import block, emit, number, say, size, style, table

if TYPE_CHECKING:
    from pvdconvert.identify import Identified
    from pvdconvert.plugin import LazyTensor, Parts
    from pvdconvert.registry import Registry

_BYTES = {"bool": 1, "bfloat16": 2}


@options.expanded
def command(
    *,
    file: options.File,
    reading: options.Reading,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what FILE is, and its scene.

    Program, architecture, sizes, box, background, cameras, and which formats were considered and why.
    Entries marked "assumed" are defaults of the source program that the file does not hold.
    """
    from pvdconvert.registry import default

    read = reading.options()
    registry = default()
    found, parts = checks.readable(registry, file, reading.from_, read)
    document = describe(registry, str(file), found, parts)
    if json:
        emit(document)
    else:
        show(document, verbose=verbose)


def describe(registry: Registry, path: str, found: Identified, parts: Parts) -> dict[str, Any]:
    """The ``--json`` document."""
    spec = registry.formats()[found.format].spec
    total = [_nbytes(t) for t in parts.tensors.values()]
    return {
        "schema": "pvdconvert/inspect/1",
        "path": path,
        "format": found.format,
        "program": spec.program or spec.title,
        "architecture": parts.architecture,
        "config": parts.config,
        "parts": _parts(parts.tensors),
        "parameters": sum(math.prod(t.shape) for t in parts.tensors.values()),
        "bytes": sum(total),
        "scene": {**parts.scene.to_json(), "backdrop": list(parts.scene.backdrop)},
        "notes": list(parts.notes),
        "provenance": parts.provenance,
        "candidates": [{"format": c.format, "score": c.score, "reason": c.reason} for c in found.candidates],
        "forced": found.match is None,
        "tensors": [
            {"name": name, "shape": list(t.shape), "dtype": t.dtype, "bytes": _nbytes(t)}
            for name, t in parts.tensors.items()
        ],
    }


def _parts(tensors: Mapping[str, LazyTensor]) -> list[dict[str, Any]]:
    """Tensors summed by the first word of their names: the parts that a reader of the file thinks in."""
    sums: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        row = sums.setdefault(part, {"name": part, "tensors": 0, "parameters": 0, "bytes": 0, "dtypes": []})
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += _nbytes(tensor)
        if tensor.dtype not in row["dtypes"]:
            row["dtypes"].append(tensor.dtype)
    return list(sums.values())


def _nbytes(tensor: LazyTensor) -> int:
    width = _BYTES.get(tensor.dtype)
    if width is None:
        import numpy as np

        width = np.dtype(tensor.dtype).itemsize
    return math.prod(tensor.shape) * width


def show(d: Mapping[str, Any], *, verbose: bool) -> None:
    """The document for people."""
    scene, assumed = d["scene"], set(d["scene"]["assumed"])

    def entry(key: str, text: str | None) -> tuple[str, str | None]:
        return key.replace("_", " "), text if text is None or key not in assumed else f"{text}  (assumed)"

    ray = scene["ray_space"]
    warp = ", ".join(f"{k} {number(ray[k])}" for k in ("width", "height", "focal", "near") if ray.get(k) is not None)
    box = scene["box"]
    rows = [
        ("file", d["path"]),
        ("format", f"{d['format']}: {d['program']}"),
        ("architecture", d["architecture"]),
        ("size", f"{d['parameters']:,} numbers, {size(d['bytes'])}"),
        entry("box", f"{_vector(box['min'])} .. {_vector(box['max'])}"),
        entry("contraction", scene["contraction"]),
        entry("background", _vector(scene["background"]) if scene["background"] else "not said, white is used"),
        entry("color_space", scene["color_space"]),
        entry("near", None if scene["near"] is None else number(scene["near"])),
        entry("far", None if scene["far"] is None else number(scene["far"])),
        entry("step", None if scene["step"] is None else number(scene["step"])),
        entry("ray_space", ray["kind"] + (f" ({warp})" if warp else "")),
        entry("cameras", str(len(scene["cameras"])) if scene["cameras"] else "none in the file"),
    ]
    named = {"box", "contraction", "background", "color_space", "near", "far", "step", "ray_space", "cameras"}
    others = ", ".join(sorted(assumed - named))
    for line in block([*rows, ("assumed", others or None)]):
        say(line)
    say()
    cells = [
        [p["name"], p["tensors"], f"{p['parameters']:,}", size(p["bytes"]), " ".join(p["dtypes"])] for p in d["parts"]
    ]
    for line in table(["part", "tensors", "numbers", "size", "type"], cells, right=(1, 2, 3)):
        say(line)
    if verbose:
        _section("configuration", [[k, v] for k, v in d["config"].items()], ["key", "value"])
        _section(
            "tensors", [[t["name"], "x".join(map(str, t["shape"])) or "scalar", t["dtype"]] for t in d["tensors"]],
            ["name", "shape", "type"],
        )  # fmt: skip
    fits = [c for c in d["candidates"] if verbose or c["score"] > 0 or c["reason"]]
    cells = [[c["format"], f"{c['score']:.2f}", c["reason"] or "does not fit"] for c in fits]
    _section("candidates", cells, ["format", "score", "reason"])
    if d["notes"]:
        say()
    for text in d["notes"]:
        say(f"{style('note', 'yellow')}  {text}")


def _section(title: str, rows: list[list[Any]], headers: list[str]) -> None:
    if rows:
        say()
        for line in table([title, *headers[1:]], rows):
            say(line)


def _vector(values: list[float]) -> str:
    return "(" + ", ".join(number(v) for v in values) + ")"
