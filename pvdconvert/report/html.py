"""A report as one page for people: it needs nothing but itself, in light and dark, on a desk and on a phone. No torch.

    page = html.page(document, views, command="pvdconvert eval ngp.ckpt lego")
    html.write(Path("out.html"), document, views, command=...)

``document`` is what ``--json`` prints; whatever of these it has is shown, and all of it stands in the page as data:

``schema``                       "pvdconvert/NAME/1": the title
``source target``                a conversion's two ends, or a comparison's ``reference candidate``, or
                                 ``field dataset``: objects with any of path, format, architecture, bytes, sha256, split
``fidelity``                     numbers in dB and errors (pvdconvert.metrics.Fidelity); ``metrics`` likewise, for means
                                 of other kinds: {"psnr": 31.2, "ssim": 0.95, "flip": 0.04}
``views``                        rows of the table: [{"name": "r_0.png", "psnr": 31.2, ...}]; every number is a column
``images``                       the same against real photographs: {"views": [...], means...}
``stages``                       [{"name", "steps", "seconds", "psnr_before", "psnr_after", "note"}]
``curve``                        [{"seconds", "psnr", "stage"}]: PSNR over time; without it the stages' ends are drawn
``plan notes settings replay seconds cpu_seconds peak_bytes machine via``
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import OutputError
from pvdconvert.writing import temporary_beside


@dataclasses.dataclass(frozen=True)
class View:
    """One view, seen by two or more.

    name      what it is called, as in the ``views`` of the document: "3", "r_48.png"
    colors    who drew it -> bytes [H, W, 3], the reference first: {"teacher": ..., "student": ...}, or
              {"image": ..., "field": ...}; all views of a page name the same ones
    depth     likewise -> distances [H, W], 0 where there is nothing (world units); may be empty
    opacity   likewise -> [H, W] in [0, 1]; may be empty
    """

    name: str
    colors: Mapping[str, NDArray[np.uint8]]
    depth: Mapping[str, NDArray[np.floating[Any]]] = dataclasses.field(default_factory=dict)
    opacity: Mapping[str, NDArray[np.floating[Any]]] = dataclasses.field(default_factory=dict)


def page(document: Mapping[str, Any], views: Sequence[View] = (), *, command: str = "") -> str:
    """The page. ``views`` are shown as pictures (six of 200 px are about 1 MB), ``command`` as what to type again."""
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(str(document.get('schema')))}</title>"


def write(path: Path, document: Mapping[str, Any], views: Sequence[View] = (), *, command: str = "") -> int:
    """Write :func:`page` whole or not at all; returns its bytes. Raises OutputError."""
    data = page(document, views, command=command).encode("utf-8")
    try:
        with temporary_beside(path) as temporary:
            temporary.write_bytes(data)
            temporary.chmod(0o644)
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return len(data)
