"""The document of ``pvdconvert inspect`` as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.cli.output import block, decibel, number, say, size, style, table
from pvdconvert.cli.report import brief

_ROOM = 24
"""Candidates that do not fit and say nothing are named in one line; parts beyond this many are summed up."""


def show(d: Mapping[str, Any], *, verbose: bool) -> None:
    """The document for people."""
    for line in block(_facts(d)):
        say(line)
    if d["scene"] is not None:
        _section("scene", _scene(d["scene"]))
    if d["missing"]:
        _section("not in the file", [_missing(row) for row in d["missing"]], ["assumed", "to say otherwise"])
    rows, rest = d["parts"], d["parts"][_ROOM:]
    cells = [_part(p) for p in (rows if verbose else rows[:_ROOM])]
    if rest and not verbose:
        total = sum(p["parameters"] for p in rest)
        cells.append([f"{len(rest)} more", "", f"{total:,}", size(sum(p["bytes"] for p in rest)), "", ""])
    if cells:
        _section("part", cells, ["tensors", "numbers", "size", "type", "shape"], right=(1, 2, 3))
    if verbose and d["config"]:
        _section("configuration", [[k, v] for k, v in d["config"].items()], ["value"])
    if verbose and d["tensors"]:
        cells = [[t["name"], _shape(t["shape"]), t["dtype"]] for t in d["tensors"]]
        _section("tensors", cells, ["shape", "type"])
    if d["children"] and d["scene"] is None:
        _section("file", [[c["path"], c["container"], size(c["bytes"])] for c in d["children"]], ["container", "size"])
    if d["problems"]:
        _section("cannot be opened", [[p["path"], p["error"]] for p in d["problems"]], ["why"])
    _candidates(d["candidates"], verbose)
    if d["notes"]:
        say()
    for text in d["notes"]:
        say(f"{style('note', 'yellow')}  {text}")
    if d["error"] is not None:
        say()


def _facts(d: Mapping[str, Any]) -> list[tuple[str, object]]:
    architecture = d["architecture"]
    if architecture and d["architecture_title"]:
        architecture = f"{architecture}: {d['architecture_title']}"
    forced = ", forced by --from" if d["forced"] else ""
    said = [f"{k.replace('_', ' ')} {v:,}" for k, v in d["training"].items()]
    return [
        ("file", f"{d['path']}, {size(d['file_bytes'])}, {d['container']}"),
        ("format", f"{d['format']}: {d['program']}{forced}" if d["format"] else "none that is known here"),
        ("looks like", d["looks_like"] or None),
        ("architecture", architecture),
        ("weights", f"{d['parameters']:,} numbers, {size(d['bytes'])}" if d["tensors"] else "none"),
        ("main settings", brief(d["config"]) if d["config"] else None),
        ("trained", ", ".join(said) or None),
        ("made by", _origin(d["provenance"])),
    ]


def _origin(said: Mapping[str, Any]) -> str | None:
    """Where a file of our own came from."""
    if not isinstance(said.get("tool"), str):
        return None
    teacher, fidelity = said.get("teacher"), said.get("fidelity")
    text = str(said["tool"])
    if isinstance(teacher, Mapping):
        text += f", from a {teacher.get('format')} file ({teacher.get('architecture')})"
    if isinstance(fidelity, Mapping) and fidelity.get("psnr") is not None:
        text += f", {decibel(fidelity['psnr'])} dB against it"
    return text


def _scene(scene: Mapping[str, Any]) -> list[list[str]]:
    assumed = set(scene["assumed"])
    ray, box = scene["ray_space"], scene["box"]
    sides = [b - a for a, b in zip(box["min"], box["max"], strict=True)]
    warp = ", ".join(f"{k} {number(ray[k])}" for k in ("width", "height", "focal", "near") if ray.get(k) is not None)
    if ray["kind"] == "contracted":
        still = f"{number(ray['radius'])} of {_vector(ray['center'])}"
        warp = f"all of space, {ray['norm']} norm, nothing moved within {still}"
    cameras = scene["cameras"]
    rows = [
        ("box", f"{_vector(box['min'])} .. {_vector(box['max'])}, sides {_vector(sides)} world units"),
        ("world", _world(scene["world"])),
        ("ray_space", None if ray["kind"] == "world" else ray["kind"] + (f" ({warp})" if warp else "")),
        ("density", "per world unit"),
        ("background", _vector(scene["background"]) if scene["background"] else "not said, white is used"),
        ("color_space", scene["color_space"]),
        ("near", None if scene["near"] is None else number(scene["near"])),
        ("far", None if scene["far"] is None else number(scene["far"])),
        ("step", None if scene["step"] is None else f"{number(scene['step'])}, of the program's own renderer"),
        ("cameras", f"{len(cameras)}, {cameras[0]['width']}x{cameras[0]['height']}" if cameras else "none in the file"),
    ]
    return [[name.replace("_", " "), f"{text}  (assumed)" if name in assumed else text] for name, text in rows if text]


def _world(rows: Sequence[Sequence[float]]) -> str | None:
    """How the scene's coordinates lie in those of its dataset; None where they are the same."""
    a, b, c = (list(row[:3]) for row in rows[:3])
    shift = [row[3] for row in rows[:3]]
    if (a, b, c, shift) == ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]):
        return None
    det = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])
    scale = abs(det) ** (1 / 3)
    off = [0.0 if abs(v) < 1e-6 * max(scale, 1e-30) else v for row in (a, b, c) for v in row]
    turned = "" if off[1:4] + off[5:8] == [0.0] * 6 else ", axes turned"
    return f"dataset = {number(scale)} x scene + {_vector(shift)}{turned} (--json has the matrix)"


def _missing(row: Mapping[str, Any]) -> list[str]:
    value = row["value"]
    if row["name"] == "ray_space":
        text = f"{value['kind']} of an unknown camera"
    elif isinstance(value, Mapping):
        inner = [v for v in value.values() if v is not None]
        text = " .. ".join(_vector(v) if isinstance(v, list) else str(v) for v in inner)
    elif isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        text = _vector(value)
    else:
        text = "the program's default" if value is None else number(value) if isinstance(value, float) else str(value)
    return [str(row["name"]).replace("_", " "), text, row["supply"] or "-"]


def _part(p: Mapping[str, Any]) -> list[str]:
    shape = "" if p["shape"] is None else _shape(p["shape"])
    return [p["name"], str(p["tensors"]), f"{p['parameters']:,}", size(p["bytes"]), " ".join(p["dtypes"]), shape]


def _candidates(candidates: Sequence[Mapping[str, Any]], verbose: bool) -> None:
    told = [c for c in candidates if c["score"] > 0 or c["reason"]]
    silent = [c["format"] for c in candidates if not (c["score"] > 0 or c["reason"])]
    rows = [[c["format"], f"{c['score']:.2f}", c["reason"]] for c in told]
    if verbose or (silent and not told):
        rows += [[name, "0.00", "has nothing of it"] for name in silent]
        silent = []
    _section("candidate", rows, ["score", "reason"])
    if silent:
        say(f"{len(silent)} other formats see nothing of theirs in it: {', '.join(silent)}")


def _section(title: str, rows: list[list[Any]], headers: Sequence[str] = ("",), right: Sequence[int] = ()) -> None:
    if rows:
        say()
        for line in table([title, *headers], [[json.dumps(c) if isinstance(c, (dict, list)) else c for c in row]
                                              for row in rows], right=right):  # fmt: skip
            say(line)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _vector(values: Sequence[float]) -> str:
    return "(" + ", ".join(number(v) for v in values) + ")"
