"""A report as one page for people: it needs nothing but itself, in light and dark, on a desk and on a phone. No torch.

    page = html.page(document, views, command="pvdconvert eval ngp.ckpt lego")
    html.write(Path("out.html"), document, views, command=...)

``document`` is what ``--json`` prints; whatever of these it has is shown, and all of it stands in the page as data:

``schema``                       "pvdconvert/NAME/1": what kind of report
``source target``                a conversion's two ends, or a comparison's ``reference candidate``, or any of
                                 ``field dataset model``: objects with any of path, format, architecture, bytes, split
``fidelity``                     numbers in dB and errors (pvdconvert.metrics.Fidelity); ``metrics`` likewise, for means
                                 of other kinds: {"psnr": 31.2, "ssim": 0.95, "flip": 0.04}
``views``                        rows of the table: [{"name": "r_0.png", "psnr": 31.2, ...}]; every number is a column
``images``                       the same against real photographs: an object with ``views`` and means of its own, or
                                 one such object a name: {"teacher": {...}, "student": {...}}
``stages``                       [{"name", "steps", "seconds", "psnr_before", "psnr_after", "note"}]
``curve``                        [{"seconds", "psnr", "stage"}]: PSNR over time; without it the stages' ends are drawn
``plan notes settings replay seconds cpu_seconds peak_bytes machine via``
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from pvdconvert.errors import OutputError
from pvdconvert.report import clean, sections
from pvdconvert.report.markup import esc
from pvdconvert.report.pictures import View, choose, shown
from pvdconvert.writing import temporary_beside

__all__ = ["View", "choose", "page", "write"]

KINDS = {
    "report": ("Conversion", "->"),
    "compare": ("Comparison", "and"),
    "eval": ("Evaluation", "on"),
    "train": ("Training", "->"),
}
"""Second word of the schema -> title, and what stands between the two ends."""

VIRIDIS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725"  # matplotlib's map, CC0


def page(document: Mapping[str, Any], views: Sequence[View] = (), *, command: str = "", again: str = "") -> str:
    """The page, below 4 MB whatever the number of views (six of 200 px are 1 MB; many are made smaller).

    ``command`` is what was typed, ``again`` what does the same steps again. Every text is escaped, and the page's
    policy allows no request and no script but its own.
    """
    data: dict[str, Any] = clean(dict(document))
    kind, between = KINDS.get(sections.kind(data), ("", "->"))
    pictures = shown(views)
    body = [
        sections.tiles(data),
        sections.compare(pictures, sections.rows(data)),
        sections.over_time(data),
        sections.metrics(data, {v.name for v in pictures}),
        sections.photographs(data),
        sections.columns(sections.ends(data), sections.plan(data)),
        sections.notes(data),
        sections.reproduce(data, command, again),
    ]
    names = sections.heading(data)
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    stops = [[int(stop[k : k + 2], 16) / 255 for k in (0, 2, 4)] for stop in VIRIDIS.split()]
    red, green, blue = (" ".join(f"{stop[k]:.4f}" for stop in stops) for k in range(3))
    arrow = {"->": "&rarr;"}.get(between, between)
    return Template(_file("page.html")).substitute(
        title=esc(f"{f' {between} '.join(names) or kind} - pvdconvert"),
        hash=f"sha256-{digest}",
        css=_file("page.css"),
        js=script,
        red=red,
        green=green,
        blue=blue,
        kicker=esc(f"{kind or 'Report'} by pvdconvert {sections.version(data)}".strip()),
        heading=f' <span class="to">{arrow}</span> '.join(f"<bdi>{esc(n)}</bdi>" for n in names) or esc(kind),
        lead=sections.lead(data),
        sections="\n".join(part for part in body if part),
        footer=esc(str(data.get("schema") or "")),
        data=json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"),
    )


def write(
    path: Path, document: Mapping[str, Any], views: Sequence[View] = (), *, command: str = "", again: str = ""
) -> int:
    """Write :func:`page` whole or not at all; returns its bytes. Raises OutputError."""
    data = page(document, views, command=command, again=again).encode("utf-8")
    try:
        with temporary_beside(path) as temporary:
            temporary.write_bytes(data)
            temporary.chmod(0o644)
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return len(data)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
