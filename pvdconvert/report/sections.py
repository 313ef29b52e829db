"""The parts of a page: each takes the document and answers HTML, or "" where there is nothing to say. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pvdconvert.report.chart import chart, points
from pvdconvert.report.markup import NO_METRIC, TITLES, esc, is_number, pairs, plain, show, table, title
from pvdconvert.report.pictures import Shown
from pvdconvert.report.words import decibel, duration, size

Document = Mapping[str, Any]

ENDS = (
    ("source", "target"),
    ("reference", "candidate"),
    ("field", "dataset"),
    ("dataset", "target"),
    ("model", "images"),
)


def _object(document: Document, key: str) -> dict[str, Any]:
    value = document.get(key)
    return dict(value) if isinstance(value, Mapping) else {}


def _pair(document: Document) -> tuple[str, str]:
    return next((pair for pair in ENDS if any(_object(document, key) for key in pair)), ENDS[0])


def _section(title: str, content: str, *, name: str = "", note: str = "") -> str:
    if not content:
        return ""
    small = f'<p class="unit-note">{esc(note)}</p>' if note else ""
    return f"<section{f' id={name}' if name else ''}><h2>{esc(title)}</h2>{content}{small}</section>"


def kind(document: Document) -> str:
    """What was done: "report", "compare", "eval", "train" (whose document is a conversion's, but for its plan)."""
    if _object(document, "plan").get("kind") == "train":
        return "train"
    return f"{document.get('schema')}//".split("/")[1]


def version(document: Document) -> str:
    return str(_object(document, "machine").get("pvdconvert") or "")


# -- above -------------------------------------------------------------------------------------------------------------


def heading(document: Document) -> list[str]:
    """The two ends by their architectures, or by their files' names."""
    ends = [_object(document, key) for key in _pair(document)]
    names = [str(e.get("architecture") or str(e.get("path") or "").rstrip("/").split("/")[-1]) for e in ends]
    if names[0] == names[1]:
        names = [str(e.get("path") or n).rstrip("/").split("/")[-1] for e, n in zip(ends, names, strict=True)]
    return [n for n in names if n]


def lead(document: Document) -> str:
    """Where the two ends are, and when it was interrupted or only rehearsed."""
    ends = [_object(document, key).get("path") for key in _pair(document)]
    words = " &rarr; " if _pair(document)[1] == "target" else " and "
    text = words.join(f"<bdi>{esc(path)}</bdi>" for path in ends if path)
    for key, said in (("dry_run", "A dry run: nothing was written."), ("interrupted", "Stopped early.")):
        text += f"<br>{said}" if document.get(key) else ""
    return text


def tiles(document: Document) -> str:
    """The numbers to see first."""
    values = {**_object(document, "metrics"), **_object(document, "fidelity")}
    ends = [_object(document, key) for key in _pair(document)]
    tile = []

    def add(text: str, value: str, unit: str = "", kind: str = "") -> None:
        small = f" <small>{esc(unit)}</small>" if unit else ""
        tile.append(f'<div class="tile{kind}"><b>{esc(value)}{small}</b><span>{esc(text)}</span></div>')

    if values.get("identical"):
        add("every pixel of every view", "identical", kind=" main")
    elif is_number(values.get("psnr")):
        add("mean PSNR", decibel(values["psnr"]), "dB", " main")
    for key, text in (("psnr_worst", "worst view"), ("psnr_upper", "upper hemisphere"), ("psnr_object", "object only")):
        if is_number(values.get(key)):
            add(text, decibel(values[key]), "dB")
    for key in ("ssim", "flip", "lpips"):
        if is_number(values.get(key)):
            add(TITLES[key], show(key, values[key]))
    if is_number(ends[1].get("bytes")):
        was = ends[0].get("bytes")
        add(f"size, from {size(float(was))}" if was else "size", *size(ends[1]["bytes"]).split(" "))
    if is_number(document.get("seconds")):
        add("time", duration(document["seconds"]))
    return f'<div class="tiles">{"".join(tile)}</div>' if tile else ""


# -- pictures ----------------------------------------------------------------------------------------------------------


def compare(views: Sequence[Shown], listed: Sequence[Document]) -> str:
    """Pictures side by side, under a slider, one over the other, and their difference."""
    if not views:
        return ""
    who = list(views[0].pictures["color"])
    decibels = {str(row.get("name")): row.get("psnr") for row in listed}
    kinds = [
        (k, t) for k, t in (("color", "Colour"), ("depth", "Depth"), ("opacity", "Opacity")) if k in views[0].pictures
    ]
    modes = [("side", "Side by side"), ("slide", "Slider"), ("flip", "Flip"), ("apart", "Difference")]
    second = min(1, len(who) - 1)

    def group(what: str, label: str, items: Sequence[tuple[str, str]]) -> str:
        buttons = "".join(
            f'<button type="button" data-set-{what}="{k}" aria-pressed="{str(n == 0).lower()}">{t}</button>'
            for n, (k, t) in enumerate(items)
        )
        return f'<div class="seg" role="group" aria-label="{label}">{buttons}</div>'

    def choice(name: str, label: str, chosen: int) -> str:
        options = "".join(
            f'<option value="{n}"{" selected" * (n == chosen)}>{esc(w)}</option>' for n, w in enumerate(who)
        )
        return f'<select name="{name}" aria-label="{label}"{" hidden" * (len(who) < 3)}>{options}</select>'

    one, two = '<img class="one" alt="">', '<img class="two" alt="">'
    tags = '<span class="tag l first-name"></span><span class="tag r second-name"></span>'
    gain = '<span class="gain-value"></span>'
    pics = f'<div class="pics">{one}{two}</div>'
    range_ = 'aria-valuemin="0" aria-valuemax="100" aria-valuenow="50" style="--cut:50%"'
    panels = f"""
<figure class="first"><div class="frame"><div class="pics">{one}</div></div>
<figcaption class="first-name"></figcaption></figure>
<figure class="second"><div class="frame"><div class="pics">{two}</div></div>
<figcaption class="second-name"></figcaption></figure>
<figure class="apart"><div class="frame">{pics}</div><figcaption>difference {gain}</figcaption></figure>
<figure class="slide"><div class="frame" tabindex="0" role="slider" aria-label="how much of each is shown" {range_}>
{pics}<div class="handle"></div>{tags}</div><figcaption>drag, or use the arrow keys</figcaption></figure>
<figure class="flip"><button type="button" class="frame" aria-label="show the other one">
<span class="pics">{one}{two}</span><span class="tag l flip-name"></span></button>
<figcaption>click to flip</figcaption></figure>"""
    return f"""<section id="compare" data-mode="side" data-kind="{kinds[0][0]}">
<h2>Pictures <span class="unit-note which"></span></h2>
<div class="bar">{group("mode", "How to compare", modes)}{group("kind", "What to compare", kinds)}
{choice("first", "Reference", 0)}{choice("second", "Compared with it", second)}
<label class="gain">difference <input type="range" name="gain" min="1" max="32" value="8">
<output class="gain-value"></output></label></div>
<div class="stage">{panels}</div>
<div class="legend"><span class="near"></span><i></i><span class="far"></span></div>
<div class="strip">{"".join(_thumb(v, n == 0, decibels.get(v.name)) for n, v in enumerate(views))}</div>
</section>"""


def _thumb(view: Shown, chosen: bool, decibels: object) -> str:
    images = "".join(
        f'<img src="{uri}" data-kind="{kind}" data-who="{n}" alt="{esc(f"{who}, {kind}, {view.name}")}">'
        for kind, pictures in view.pictures.items()
        for n, (who, uri) in enumerate(pictures.items())
    )
    ends = ""
    if view.near is not None and view.far is not None:
        ends = f' data-near="near {view.near:.4g}" data-far="{view.far:.4g} far (world units)"'
    score = f"<b>{decibel(decibels)} dB</b>" if is_number(decibels) else ""
    width, height = view.size
    return (
        f'<button type="button" class="thumb" data-name="{esc(view.name)}" data-aspect="{width}/{height}"{ends} '
        f'aria-pressed="{str(chosen).lower()}" style="--aspect:{width}/{height}">{images}'
        f"<span>{esc(view.name)}</span>{score}</button>"
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def over_time(document: Document) -> str:
    """The curve, and the table of stages."""
    curve, bands = points(document)
    drawn = "".join(chart(curve, bands, width) for width in (720, 340)) if len(curve) > 1 else ""
    stages = document.get("stages") or []
    body = ""
    for s in stages:
        cells = [
            f"<td>{esc(s.get('name', '?'))}</td><td>{esc(s.get('steps') or '-')}</td>",
            f"<td>{duration(s['seconds']) if is_number(s.get('seconds')) else '-'}</td>",
            f"<td>{decibel(s.get('psnr_before'))}</td><td>{decibel(s.get('psnr_after'))}</td>",
        ]
        body += f"<tr>{''.join(cells)}</tr>"
        body += f'<tr class="note"><td colspan="5">{esc(s["note"])}</td></tr>' if s.get("note") else ""
    if not body:
        return _section("PSNR over time", drawn, name="time")
    heads = "".join(f"<th>{t}</th>" for t in ("stage", "steps", "time", "dB before", "dB after"))
    rows = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    where = "pixels that were set aside" if kind(document) == "train" else "a few small views while it ran"
    note = f"dB on {where}, not the figures above." if drawn else ""
    return _section("PSNR over time, by stage" if drawn else "Stages", drawn + rows, name="time", note=note)


def rows(document: Document) -> list[dict[str, Any]]:
    """The rows of the table of views; dB of ``fidelity`` where the document has no rows."""
    listed = document.get("views")
    if isinstance(listed, list):
        return [dict(r) for r in listed if isinstance(r, Mapping)]
    decibels = _object(document, "fidelity").get("views")
    return [{"name": f"view {n}", "psnr": v} for n, v in enumerate(decibels)] if isinstance(decibels, list) else []


def metrics(document: Document, pictured: set[str]) -> str:
    """One row a view, with mean, best and worst."""
    protocol = _object(document, "fidelity").get("protocol") or document.get("protocol") or ""
    return _section("Every view", table(rows(document), pictured), name="views", note=str(protocol))


def photographs(document: Document) -> str:
    """What real photographs say, where the document has that: of one field, or of several beside one another."""
    images = _object(document, "images")
    parts = {str(k): v for k, v in images.items() if isinstance(v, Mapping) and isinstance(v.get("views"), list)}
    parts = parts or ({"": images} if images else {})
    merged: dict[str, dict[str, Any]] = {}
    means: list[tuple[str, object]] = []
    told: dict[str, object] = {}
    for who, part in parts.items():
        for said in (part, _object(part, "dataset")):
            told |= {k: plain(v) for k, v in said.items() if isinstance(v, str) or k == "frames"}
        found = {**{k: v for k, v in part.items() if k not in ("size", "pixel_offset")}, **_object(part, "metrics")}
        means += [(title(f"{k} {who}".strip()), show(k, v)) for k, v in found.items() if is_number(v)]
        listed = part.get("views")
        for n, row in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(row, Mapping):
                name = str(row.get("name", n))
                kept = {f"{k} {who}".strip(): v for k, v in row.items() if k not in NO_METRIC}
                merged.setdefault(name, {"name": name}).update(kept)
    listing = table(list(merged.values()), set())
    return _section("Against real photographs", pairs([*told.items(), *means]) + listing, name="images")


# -- below -------------------------------------------------------------------------------------------------------------


def columns(*parts: str) -> str:
    """Sections side by side where there is room."""
    kept = [p for p in parts if p]
    return f'<div class="columns">{"".join(kept)}</div>' if len(kept) > 1 else "".join(kept)


def ends(document: Document) -> str:
    """The files, and their sizes as bars."""
    out, sizes = "", []
    for key in _pair(document):
        end = _object(document, key)
        hidden = ("config", "views", "bytes")
        out += (
            f"<h3>{esc(key)}</h3>" + pairs((k.replace("_", " "), plain(v)) for k, v in end.items() if k not in hidden)
            if end
            else ""
        )
        if is_number(end.get("bytes")) and end["bytes"] > 0:
            sizes.append((key, float(end["bytes"])))
    if sizes:
        most = max(v for _, v in sizes)
        out += (
            '<div class="sizes">'
            + "".join(
                f'<span>{esc(k)}</span><i style="width:{100 * v / most:.1f}%"></i><b>{size(v)}</b>' for k, v in sizes
            )
            + "</div>"
        )
    return _section("Files", out, name="files")


def plan(document: Document) -> str:
    """What the planner decided."""
    planned = _object(document, "plan")
    config = planned.pop("config", None) or _object(document, "target").get("config") or {}
    via = _object(document, "via")
    lines = [(k.replace("_", " "), plain(v)) for k, v in planned.items()]
    if via:
        lines.append(
            ("via", f"{via.get('architecture')}, {decibel(_object(via, 'fidelity').get('psnr'))} dB of the teacher")
        )
    out = pairs(lines)
    if isinstance(config, Mapping) and config:
        out += f'<h3 style="margin-top:12px">configuration</h3>{pairs((k, plain(v)) for k, v in config.items())}'
    return _section("Plan", out, name="plan")


def notes(document: Document) -> str:
    """What was found, guessed or skipped."""
    said = [str(n) for n in document.get("notes") or []]
    said += [
        f"{s.get('name')}: {s['note']}"
        for s in document.get("stages") or []
        if str(s.get("note")).startswith("skipped")
    ]
    items = "".join(f"<li>{esc(n)}</li>" for n in said)
    return _section(
        "Noted on the way: found, guessed, skipped", f'<ul class="notes">{items}</ul>' if items else "", name="notes"
    )


def reproduce(document: Document, command: str, again: str) -> str:
    """The command, the machine and what was used of it, and the document itself."""
    out = ""
    for name, text in (("What was typed", command), ("The same steps again, whatever the clock says", again)):
        if text:
            out += (
                f'<h3>{name}</h3><div class="command"><pre>{esc(text)}</pre><button type="button">copy</button></div>'
            )
    used = [
        ("time", duration(document["seconds"]) if is_number(document.get("seconds")) else None),
        ("CPU time", duration(document["cpu_seconds"]) if is_number(document.get("cpu_seconds")) else None),
        ("memory at most", size(document["peak_bytes"]) if document.get("peak_bytes") else None),
        ("seed", _object(document, "settings").get("seed")),
    ]
    out += pairs([*used, *((k, plain(v)) for k, v in _object(document, "machine").items())])
    return _section(
        "Do it again",
        out + '<details id="raw"><summary>This report as JSON</summary><pre></pre></details>',
        name="again",
    )
