"""The report of a conversion and of a comparison, as text: a rendering of the same document that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.cli.output import block, decibel, duration, number, size, style, table

_MAIN = ("path", "format", "architecture", "bytes")
_FIDELITY = (
    ("psnr", "mean of the views"),
    ("psnr_worst", "worst view"),
    ("psnr_upper", "upper hemisphere"),
    ("psnr_object", "object only"),
)


def lines(document: Mapping[str, Any], *, where: str = "", verbose: bool = False) -> list[str]:
    """The report for people. ``document`` is a ``pvdconvert/report/1``; ``where`` is the output, written or not."""
    out = block(
        [
            ("source", side(document.get("source") or {}, verbose)),
            ("target", side(document.get("target") or {}, verbose)),
            ("plan", _plan(document.get("plan") or {})),
            ("config", _config((document.get("plan") or {}).get("config") or {}, verbose)),
        ]
    )
    stages = document.get("stages") or []
    if stages:
        out += ["", *_stages(stages)]
    if document.get("fidelity"):
        out += ["", *fidelity(document["fidelity"])]
    if document.get("images"):
        out += ["", *images(document["images"])]
    if document.get("via"):
        out += ["", _via(document["via"])]
    notes = [*(document.get("notes") or []), *(document.get("images") or {}).get("notes", [])]
    if notes:
        out += ["", *(f"{style('note', 'yellow')}  {text}" for text in notes)]
    if verbose and document.get("replay"):
        out += ["", f"replay  {document['replay']}"]
    out += ["", _last(document, where)]
    return out


def fidelity(values: Mapping[str, Any], title: str = "PSNR against the teacher") -> list[str]:
    """The fidelity block: decibels against the teacher, and how far opacity and depth are off."""
    views = values.get("views")
    count = len(views) if isinstance(views, Sequence) and not isinstance(views, str) else views
    protocol = str(values.get("protocol", ""))
    over = f" ({protocol})" if "(" in protocol else f" ({protocol}: {count} views, {values.get('size')} px)"
    rows: list[tuple[str, object]] = [
        (f"  {text}", f"{decibel(values[key]):>6} dB") for key, text in _FIDELITY if values.get(key) is not None
    ]
    if values.get("ssim") is not None:
        rows.append(("  SSIM", f"{values['ssim']:>9.4f}"))
    for key, text in (("opacity_error", "opacity error"), ("depth_error", "depth error")):
        if values.get(key) is not None:
            rows.append((f"  {text}", f"{values[key]:>9.4g}"))
    return [style(title, "bold") + over, *block(rows)]


def images(values: Mapping[str, Any]) -> list[str]:
    """Teacher and student on real pictures, side by side."""
    teacher, student = values["teacher"], values["student"]
    data, count = teacher["dataset"], len(teacher["views"])
    over = f" ({count} of {data['frames']} pictures of split {data['split']}, at most {teacher['size']} px)"
    rows = []
    for name, title in (("psnr", "PSNR dB"), ("ssim", "SSIM"), ("flip", "FLIP"), ("lpips", "LPIPS")):
        if name in teacher["metrics"]:
            pair = [end["metrics"][name] for end in (teacher, student)]
            rows.append([f"  {title}", *(decibel(v) if name == "psnr" else f"{v:.4f}" for v in pair)])
    return [style("on real pictures", "bold") + over, *table(["", "teacher", "student"], rows, right=(1, 2))]


def side(values: Mapping[str, Any], verbose: bool = False) -> str | None:
    """One line on an end of the road: path, format, architecture, size."""
    if not values:
        return None
    parts = [str(values["path"])] if values.get("path") else []
    kind = [str(values[key]) for key in ("format", "architecture") if values.get(key)]
    parts += [", ".join(kind)] if kind else []
    if values.get("bytes"):
        parts.append(size(values["bytes"]))
    if verbose:
        parts += [f"{k}={_short(v)}" for k, v in values.items() if k not in _MAIN and _plain(v)]
    return "  ".join(parts)


def _via(values: Mapping[str, Any]) -> str:
    """One line on a chain: what the proxy lost of the teacher, and the student of the proxy."""
    lost, left = values.get("fidelity") or {}, values.get("of_proxy") or {}
    spent = duration(values["seconds"]) if values.get("seconds") is not None else "?"
    return (
        f"via    {values['architecture']} in {spent}: proxy against teacher {decibel(lost.get('psnr'))} dB, "
        f"student against proxy {decibel(left.get('psnr'))} dB"
    )


def _plan(values: Mapping[str, Any]) -> str | None:
    """What the planner decided, in one line, without the configuration."""
    if not values:
        return None
    parts = [str(values["kind"])] if values.get("kind") else []
    if values.get("seconds"):
        parts.append(f"about {duration(values['seconds'])}")
    if values.get("samples"):
        parts.append(f"{values['samples']:,} samples on {values.get('rays', 0):,} rays")
    if values.get("surface_cells"):
        parts.append(f"{values['surface_cells']:,} surface cells")
    return ", ".join(parts) or None


def _config(values: Mapping[str, Any], verbose: bool) -> str | None:
    return " ".join(f"{k}={_short(v)}" for k, v in values.items() if v is not None and (verbose or _plain(v))) or None


def brief(values: Mapping[str, Any]) -> str | None:
    """A configuration in a line: what is long, nested or not set is left out."""
    return _config(values, False)


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            s.get("name", "?"),
            s.get("steps") or "-",
            duration(s["seconds"]) if s.get("seconds") is not None else "-",
            decibel(s.get("psnr_before")),
            decibel(s.get("psnr_after")),
            s.get("note") or "",
        ]
        for s in stages
    ]
    return table(["stage", "steps", "time", "dB before", "dB after", ""], rows, right=(1, 2, 3, 4))


def _last(document: Mapping[str, Any], out: str) -> str:
    target = document.get("target") or {}
    spent = duration(document["seconds"]) if document.get("seconds") is not None else "?"
    if document.get("dry_run"):
        return f"dry run, {spent}: nothing was written; without --dry-run it would be {out or 'kept in memory'}"
    where = target.get("path") or out
    bytes_ = f", {size(target['bytes'])}" if target.get("bytes") else ""
    if document.get("interrupted"):
        return style(f"stopped early after {spent}", "yellow") + (f": {where}{bytes_}" if where else "")
    return style(f"wrote {where}", "green") + f"{bytes_}, in {spent}"


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (
        isinstance(value, (list, tuple)) and len(value) <= 4 and all(isinstance(v, (str, int, float)) for v in value)
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_short(v) for v in value) + "]"
    return str(value)
