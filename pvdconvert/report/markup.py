"""The small parts of a page: escaped text, metrics and their table, lists of names and values. Imports no torch."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pvdconvert.report.words import decibel, number

TITLES = {
    "psnr": "PSNR, dB",
    "psnr_object": "object only, dB",
    "psnr_worst": "worst view, dB",
    "psnr_upper": "upper hemisphere, dB",
    "ssim": "SSIM",
    "flip": "FLIP",
    "lpips": "LPIPS",
    "opacity_error": "opacity error",
    "depth_error": "depth error",
}
NO_METRIC = ("name", "width", "height", "pixels")
"""Keys of a row that say what was looked at, not how well it went."""

LOWER = ("error", "mse", "flip", "lpips", "l1", "seconds")
"""Ends of the names of metrics that are better the lower they are."""


def esc(value: object) -> str:
    """``value`` as text of HTML or of a quoted attribute; what is no Unicode (odd file names) becomes "?"."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def title(name: str) -> str:
    """What a metric is called; "psnr student" is the student's."""
    metric, _, who = name.partition(" ")
    return f"{TITLES[metric]}, {who}" if who and metric in TITLES else TITLES.get(name, name)


def show(name: str, value: object) -> str:
    """A metric's value as the page shows it."""
    if not is_number(value):
        return "-"
    assert isinstance(value, (int, float))
    if name.startswith("psnr"):
        return decibel(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if name.startswith("ssim") else f"{value:.4g}"


def pairs(items: Iterable[tuple[str, object]]) -> str:
    shown = [f"<dt>{esc(k)}</dt><dd><bdi>{esc(v)}</bdi></dd>" for k, v in items if v not in (None, "", [], {})]
    return f"<dl>{''.join(shown)}</dl>" if shown else ""


def table(listed: Sequence[Mapping[str, Any]], pictured: set[str]) -> str:
    """Rows of metrics; ``pictured`` names those that there are pictures of."""
    columns = list(dict.fromkeys(k for row in listed for k, v in row.items() if k not in NO_METRIC and is_number(v)))
    if not columns:
        return ""
    heads = "".join(f'<th data-column="{n + 1}">{esc(title(k))}</th>' for n, k in enumerate(columns))
    values = {k: [row[k] for row in listed if is_number(row.get(k))] for k in columns}
    ends = {k: (min(v), max(v)) if _low(k) else (max(v), min(v)) for k, v in values.items()}
    body = ""
    for n, row in enumerate(listed):
        name = str(row.get("name", n))
        label = esc(name)
        if name in pictured:
            label = f'<button type="button" class="link" data-goto="{label}">{label}</button>'
        cells = "".join(
            _cell(k, row.get(k), len(values[k]) > 1 and row.get(k) == ends[k][1] != ends[k][0]) for k in columns
        )
        body += f'<tr><td data-value="{esc(name)}">{label}</td>{cells}</tr>'
    foot = ""
    if len(listed) > 1:
        means = {k: math.fsum(v) / len(v) for k, v in values.items()}
        for text, of in (
            ("mean", means),
            ("best", {k: v[0] for k, v in ends.items()}),
            ("worst", {k: v[1] for k, v in ends.items()}),
        ):
            foot += f"<tr><th>{text}</th>{''.join(_cell(k, of[k]) for k in columns)}</tr>"
    return (
        f'<div class="wide{" tall" * (len(listed) > 20)}"><table class="metrics">'
        f'<thead><tr><th data-column="0">view</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>"
    )


def _cell(name: str, value: object, least: bool = False) -> str:
    exact = f' data-value="{value!r}"' if is_number(value) else ""
    return f"<td{' class=least' if least else ''}{exact}>{show(name, value)}</td>"


def _low(name: str) -> bool:
    return name.split(" ")[0].endswith(LOWER)


def plain(value: object) -> str:
    """A value of a plan or a configuration in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, Mapping) and set(value) == {"min", "max"}:
        return f"{plain(value['min'])} to {plain(value['max'])}"
    if isinstance(value, list) and all(is_number(v) for v in value):
        return ", ".join(plain(round(v, 4)) for v in value)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 400 else f"{text[:400]} ..."
