"""``pvdconvert inspect`` of posed pictures: layout, splits, sizes, hints on the scene. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdconvert.cli.output import block, emit, number, say, style

if TYPE_CHECKING:
    from pvdconvert.data import Dataset
    from pvdconvert.plugin import ReadOptions


def shown(path: Path, read: ReadOptions, *, json: bool) -> bool:
    """Whether ``path`` is a dataset; then it has been shown. Raises what is wrong with it."""
    from pvdconvert.data.opening import fits, open_dataset

    seen = fits(path)
    if not seen:
        return False
    dataset = open_dataset(path, background=read.background, bounds=read.bounds)
    reason = next(fit.reason for loader, fit in seen if loader.name == dataset.kind)
    document = describe(dataset, reason)
    if json:
        emit(document)
        return True
    for line in block(_facts(document)):
        say(line)
    if document["notes"]:
        say()
    for text in document["notes"]:
        say(f"{style('note', 'yellow')}  {text}")
    return True


def describe(dataset: Dataset, reason: str) -> dict[str, Any]:
    """The ``--json`` document."""
    cameras = [f.camera for frames in dataset.splits.values() for f in frames]
    sizes = Counter((c.width, c.height) for c in cameras)
    focal = [f for c in cameras for f in (c.fx, c.fy)]
    return {
        "schema": "pvdconvert/inspect-dataset/1",
        "path": str(dataset.path),
        "kind": dataset.kind,
        "reason": reason,
        "splits": {name: len(frames) for name, frames in dataset.splits.items()},
        "sizes": [{"width": w, "height": h, "pictures": n} for (w, h), n in sizes.most_common()],
        "focal": [min(focal), max(focal)],
        "lenses": sorted({c.lens.kind for c in cameras if c.lens is not None}),
        "masks": sum(f.mask is not None for frames in dataset.splits.values() for f in frames),
        "box": None if dataset.box is None else dataset.box.to_json(),
        "near": dataset.near,
        "far": dataset.far,
        "ray_space": dataset.ray_space.to_json(),
        "background": None if dataset.background is None else list(dataset.background),
        "world": [list(row) for row in dataset.world],
        "notes": list(dataset.notes),
    }


def _facts(d: dict[str, Any]) -> list[tuple[str, object]]:
    sizes = ", ".join(f"{s['width']}x{s['height']} ({s['pictures']})" for s in d["sizes"][:4])
    low, high = d["focal"]
    lens = f", {' and '.join(d['lenses'])} lens" if d["lenses"] else ""
    box, space = d["box"], d["ray_space"]
    ends = [("near", d["near"]), ("far", d["far"])]
    return [
        ("dataset", d["path"]),
        ("layout", f"{d['kind']}: {d['reason']}"),
        ("splits", ", ".join(f"{name} {count}" for name, count in d["splits"].items())),
        ("pictures", sizes + (", ..." if len(d["sizes"]) > 4 else "")),
        ("focal length", (number(low) if high - low < 1e-6 * high else f"{number(low)} .. {number(high)}") + lens),
        ("masks", f"for {d['masks']} pictures" if d["masks"] else None),
        ("box", f"{_three(box['min'])} .. {_three(box['max'])}" if box else "unknown (--bounds)"),
        ("rays", ", ".join(f"{k} {number(v)}" for k, v in ends if v is not None) or None),
        ("ray space", "NDC" if space["kind"] == "ndc" else None),
        ("behind alpha", _three(d["background"]) if d["background"] else None),
    ]


def _three(values: list[float]) -> str:
    return f"({', '.join(number(v) for v in values)})"
