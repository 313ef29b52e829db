"""The HTML report as a page: what it says, what it never does, and what it does in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pvdconvert.errors import OutputError
from pvdconvert.report import html
from pvdconvert.report.chart import chart, points
from pvdconvert.report.pictures import ROOM, SIDES, choose, shown
from tests.browser import Seen, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "</script><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;.ckpt"
TEACHER, STUDENT = (200, 40, 20), (190, 40, 25)
"""Colours of the two plain pictures: they differ by (10, 0, 5)."""


def plain(color: tuple[int, int, int], side: int = 40) -> Any:
    return np.full((side, side, 3), color, dtype=np.uint8)


def views() -> list[html.View]:
    depth = {"teacher": np.full((40, 40), 2.0, np.float32), "student": np.full((40, 40), 4.0, np.float32)}
    opacity = {"teacher": np.ones((40, 40), np.float32), "student": np.full((40, 40), 0.6, np.float32)}
    first = html.View("view 00", {"teacher": plain(TEACHER), "student": plain(STUDENT)}, depth, opacity)
    return [first, html.View("view 01", {"teacher": plain((0, 0, 255)), "student": plain((0, 255, 0))}, depth, opacity)]


def document(**more: Any) -> dict[str, Any]:
    stages = [
        {"name": "labels", "steps": 1, "seconds": 10.0, "psnr_before": None, "psnr_after": None, "note": ""},
        {"name": "density", "steps": 40, "seconds": 20.0, "psnr_before": 12.0, "psnr_after": 27.5, "note": ""},
        {"name": "features", "steps": 0, "seconds": 0.0, "note": "skipped: the student has no feature tap"},
        {"name": "render", "steps": 60, "seconds": 30.0, "psnr_before": 27.5, "psnr_after": 31.25, "note": ""},
    ]
    return {
        "schema": "pvdconvert/report/1",
        "source": {"path": "ngp.ckpt", "format": "torch-ngp", "architecture": "ngp", "bytes": 2_400_000},
        "target": {"path": "out.safetensors", "architecture": "plenoxels", "bytes": 39_200_000},
        "plan": {"kind": "distil", "config": {"resolution": 134}},
        "stages": stages,
        "fidelity": {"psnr": 30.0, "psnr_worst": 28.0, "psnr_upper": 29.123, "ssim": 0.97, "protocol": "fidelity/1"},
        "views": [
            {"name": "view 00", "psnr": 28.0, "ssim": 0.96, "opacity_error": 0.0123456},
            {"name": "view 01", "psnr": 32.0, "ssim": 0.98, "opacity_error": 0.0345678},
            {"name": "view 02", "psnr": 30.0, "ssim": 0.97, "opacity_error": 0.02},
        ],
        "notes": ["desired_resolution is not in the file: 2048 assumed"],
        "seconds": 60.0,
        "settings": {"seed": 7},
        "replay": "scout=1;labels=1",
        "machine": {"pvdconvert": "0.1.0", "processor": "a fast one"},
        **more,
    }


class Words(HTMLParser):
    """What a reader sees, and which tags there are; strict about what they close."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def said(page: str) -> str:
    return " ".join(" ".join(Words(page).text).split())


# -- without a browser -------------------------------------------------------------------------------------------------


def test_everything_a_reader_looks_for_is_there() -> None:
    text = said(html.page(document(), views(), command="pvdconvert ngp.ckpt", again="pvdconvert ngp.ckpt --replay x"))
    for words in (
        "ngp → plenoxels", "30.00 dB mean PSNR", "28.00 dB worst view", "29.12 dB upper hemisphere", "39.2 MB",
        "size, from 2.4 MB", "features: skipped: the student has no feature tap", "2048 assumed", "resolution 134",
        "pvdconvert ngp.ckpt --replay x", "a fast one", "seed 7", "fidelity/1", "Conversion by pvdconvert 0.1.0",
    ):  # fmt: skip
        assert words in text


def test_a_page_asks_nobody_and_runs_only_its_own_script() -> None:
    page = html.page(document(), views())
    words = Words(page)
    for tag, attributes in words.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:"), (tag, value)
    assert not re.search(r"@import|url\((?!#)", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    import hashlib

    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def hostile() -> tuple[dict[str, Any], list[html.View]]:
    rows = [{"name": HOSTILE, "psnr": 28.0, HOSTILE: 1.0}, {"name": "b", "psnr": 29.0}]
    stages = [{"name": HOSTILE, "seconds": 5.0, "psnr_before": 1.0, "psnr_after": 2.0, "note": f"skipped {HOSTILE}"}]
    evil = document(
        schema=f"pvdconvert/{HOSTILE}/1",
        source={"path": f"/x/{HOSTILE}", "architecture": HOSTILE, HOSTILE: HOSTILE},
        target={"path": "odd\udcff.safetensors", "bytes": 3},
        plan={HOSTILE: HOSTILE, "config": {HOSTILE: [HOSTILE]}},
        notes=[HOSTILE, "odd \udcff"],
        views=rows,
        stages=stages,
        machine={"processor": HOSTILE, "pvdconvert": HOSTILE},
        via={"architecture": HOSTILE},
        images={HOSTILE: {"views": rows, "split": HOSTILE}},
    )
    pictures = {f"teacher{HOSTILE}": plain(TEACHER), HOSTILE: plain(STUDENT)}
    return evil, [html.View(HOSTILE, pictures, dict.fromkeys(pictures, np.ones((40, 40), np.float32)))]


def test_hostile_names_stay_text() -> None:
    evil, pictures = hostile()
    page = html.page(evil, pictures, command=HOSTILE, again=HOSTILE)
    assert page.encode("utf-8")
    words = Words(page)
    assert [a for t, a in words.tags if t == "script"] == [{"type": "application/json", "id": "report"}, {}]
    assert all(not name.startswith("on") for _, attributes in words.tags for name in attributes)
    assert HOSTILE in " ".join(words.text)
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["source"]["architecture"] == HOSTILE


def test_any_document_makes_a_page() -> None:
    empty: list[dict[str, Any]] = [{}, {"schema": "x"}, {"stages": [], "views": [], "fidelity": None}]
    for sparse in (*empty, {"images": ["a.png"], "machine": "odd", "plan": 3}):
        assert said(html.page(sparse))
    broken = document(views=[{"name": "a", "psnr": float("nan")}, {"name": "b", "psnr": 20.0}], seconds=float("inf"))
    assert "NaN" not in html.page(broken)
    identical = document(fidelity={"psnr": 100.0, "identical": True, "views": [100.0, 100.0]}, views=None)
    text = said(html.page(identical))
    assert "identical" in text
    assert "view 1 100.00" in text


def test_means_and_worst_follow_the_metric() -> None:
    rows = re.findall(r"<tr><th>(mean|best|worst)</th>(.*?)</tr>", html.page(document()))
    values = {name: [float(v) for v in re.findall(r'data-value="([^"]+)"', cells)] for name, cells in rows}
    # By hand: (28 + 32 + 30) / 3; an error is best where it is least.
    assert values["mean"] == pytest.approx([30.0, 0.97, (0.0123456 + 0.0345678 + 0.02) / 3], abs=1e-12)
    assert values["best"] == [32.0, 0.98, 0.0123456]
    assert values["worst"] == [28.0, 0.96, 0.0345678]


def test_real_pictures_have_their_own_table() -> None:
    def told(psnr: float) -> dict[str, Any]:
        row = {"name": "r_0.png", "width": 200, "height": 200, "psnr": psnr, "flip": 0.0625}
        return {"dataset": {"path": "lego", "split": "test"}, "metrics": {"psnr": psnr}, "views": [row]}

    one = said(html.page(document(images=told(27.25))))
    assert "Against real photographs path lego split test PSNR, dB 27.25 view PSNR, dB FLIP r_0.png 27.25 0.0625" in one
    both = said(html.page(document(images={"teacher": told(27.25), "student": told(26.5), "notes": []})))
    assert "PSNR, dB, teacher 27.25 PSNR, dB, student 26.50 view" in both
    assert "r_0.png 27.25 0.0625 26.50 0.0625" in both


def test_the_document_of_an_evaluation() -> None:
    rows = [{"name": f"r_{n}", "width": 400, "height": 400, "pixels": 160_000, "psnr": 30.0 + n} for n in range(30)]
    field = {"path": "x/ngp.ckpt", "format": "torch-ngp", "architecture": "ngp", "bytes": 5}
    told = {"schema": "pvdconvert/eval/1", "field": field, "dataset": {"path": "data/lego", "split": "test"}}
    page = html.page({**told, "metrics": {"psnr": 44.5}, "views": rows, "protocol": "images/1"})
    text = said(page)
    assert "Evaluation by pvdconvert ngp on lego x/ngp.ckpt and data/lego 44.50 dB mean PSNR" in text
    assert "mean 44.50 best 59.00 worst 30.00 images/1" in text
    assert "160000" not in " ".join(re.findall("<table.*?</table>", page, re.DOTALL))


def decoded(uri: str) -> Any:
    kind, _, text = uri.partition(";base64,")
    assert kind in ("data:image/webp", "data:image/png")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_pictures_are_kept_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    (one,) = shown([html.View("a", {"teacher": noise, "student": noise[::-1].copy()})])
    assert np.array_equal(decoded(one.pictures["color"]["teacher"]), noise)
    assert one.size == (50, 30)
    assert set(one.pictures) == {"color"}


def test_depth_is_bright_where_near_and_clear_where_nothing_is() -> None:
    depth = np.tile(np.linspace(1.0, 3.0, 101, dtype=np.float32), (4, 1))
    depth[0] = 0.0
    opacity = np.ones_like(depth)
    opacity[1] = 0.25
    (one,) = shown([html.View("a", {"t": plain(TEACHER)}, {"t": depth}, {"t": opacity})])
    # The hundredths: 1.02 and 2.98 of a ramp of 101 steps from 1 to 3.
    assert one.near == pytest.approx(1.02, abs=0.011)
    assert one.far == pytest.approx(2.98, abs=0.011)
    level = decoded(one.pictures["depth"]["t"])
    assert level[3, 0, 0] == 255
    assert level[3, 100, 0] == 0
    assert level[3, 50, 0] in (127, 128)
    assert level[1, 0, 3] == 64  # a quarter of 255
    assert decoded(one.pictures["opacity"]["t"])[1, 0, 0] == 64


def test_a_page_stays_below_four_megabytes() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (SIDES[0], SIDES[0], 3), dtype=np.uint8) for _ in range(8)]
    many = [html.View(f"view {n}", {"teacher": p, "student": p[::-1].copy()}) for n, p in enumerate(noise)]
    # Noise cannot be compressed: 16 of 300 px would be 4.3 MB.
    assert 16 * SIDES[0] ** 2 * 3 > ROOM
    assert len(html.page(document(), many)) < 4_000_000


def test_which_views_are_shown() -> None:
    scores = [30.0, 25.0, 40.0, 31.0, 32.0, 33.0, 34.0, 35.0]
    picked = choose(scores, 4)
    assert len(picked) == 4
    assert {1, 2} <= set(picked)
    assert picked == sorted(picked)
    assert choose([1.0, 2.0]) == [0, 1]
    assert choose([5.0] * 20, 6) == sorted(set(choose([5.0] * 20, 6)))


def test_the_curve_is_where_the_stages_say() -> None:
    curve, bands = points(document())
    # By hand: labels end at 10 s, density at 30 s, render at 60 s; 27.5 dB are said twice and drawn once.
    assert curve == [(10.0, 12.0, "density"), (30.0, 27.5, "density"), (60.0, 31.25, "render")]
    assert bands == [("labels", 0.0, 10.0), ("density", 10.0, 30.0), ("render", 30.0, 60.0)]
    svg = chart(curve, bands, 720)
    line = re.search(r'class="line" points="([^"]+)"', svg)
    assert line is not None
    xy = [tuple(map(float, p.split(","))) for p in line[1].split()]
    # 662 pixels between the margins 44 and 14 are 60 seconds; dB from 10 to 35 are 200 pixels above y = 226.
    assert [p[0] for p in xy] == pytest.approx([44 + 662 / 6, 44 + 331, 44 + 662], abs=0.06)
    assert [p[1] for p in xy] == pytest.approx([226 - 8 * 2, 226 - 8 * 17.5, 226 - 8 * 21.25], abs=0.06)
    own = {"curve": [{"seconds": 4, "psnr": 20.0}, {"seconds": 2, "psnr": 10.0}, {"seconds": 3, "psnr": None}]}
    assert points(own)[0] == [(2.0, 10.0, ""), (4.0, 20.0, "")]
    assert chart([(0.0, 5.0, ""), (0.0, 5.0, "")], [], 340)


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no/out\.html: cannot be written"):
        html.write(tmp_path / "no" / "out.html", document())
    size = html.write(tmp_path / "out.html", document())
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").stat().st_size == size


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "out.html"
    html.write(path, document(), views(), command="pvdconvert ngp.ckpt --to plenoxels")
    return path.as_uri()


@pytest.fixture
def seen(browser: Browser, address: str) -> Iterator[Seen]:
    with visit(browser, address) as open_:
        yield open_


def pixel(seen: Seen, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
    """The colour on the screen at a share of an element's width and height."""
    shot = Image.open(io.BytesIO(seen.page.locator(selector).first.screenshot())).convert("RGB")
    value = shot.getpixel((int(x * (shot.width - 1)), int(y * (shot.height - 1))))
    assert isinstance(value, tuple)
    return tuple(int(v) for v in value)


def test_the_page_is_silent_and_alone(seen: Seen, address: str) -> None:
    assert seen.errors == []
    assert seen.requests == [address]
    assert seen.page.title() == "ngp -> plenoxels - pvdconvert"
    loaded = "[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth > 0)"
    assert seen.page.evaluate(loaded) is True


def test_side_by_side_shows_both_and_what_is_between(seen: Seen) -> None:
    assert pixel(seen, ".first .frame") == TEACHER
    assert pixel(seen, ".second .frame") == STUDENT
    # 8 times the difference of (200, 40, 20) and (190, 40, 25)
    assert pixel(seen, ".apart .frame") == (80, 0, 40)
    seen.page.locator("[name=gain]").fill("3")
    assert pixel(seen, ".apart .frame") == (30, 0, 15)


def test_the_slider_cuts_where_it_is_dragged(seen: Seen) -> None:
    page = seen.page
    page.click("[data-set-mode=slide]")
    assert page.locator(".first").is_hidden()
    assert pixel(seen, ".slide .frame", 0.3, 0.2) == TEACHER
    assert pixel(seen, ".slide .frame", 0.7, 0.2) == STUDENT
    box = page.locator(".slide .frame").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], middle, steps=3)
    page.mouse.up()
    assert pixel(seen, ".slide .frame", 0.1, 0.2) == TEACHER
    assert pixel(seen, ".slide .frame", 0.3, 0.2) == STUDENT
    assert page.locator(".slide .frame").get_attribute("aria-valuenow") == "20"
    page.locator(".slide .frame").press("End")
    assert pixel(seen, ".slide .frame", 0.9, 0.2) == TEACHER


def test_flip_difference_and_the_views(seen: Seen) -> None:
    page = seen.page
    page.click("[data-set-mode=flip]")
    assert (pixel(seen, ".flip .frame"), page.inner_text(".flip-name")) == (TEACHER, "teacher")
    page.click(".flip .frame")
    assert (pixel(seen, ".flip .frame"), page.inner_text(".flip-name")) == (STUDENT, "student")
    page.click("[data-set-mode=apart]")
    page.click('.thumb[data-name="view 01"]')
    assert pixel(seen, ".apart .frame") == (0, 255, 255)
    page.click('[data-goto="view 00"]')
    assert pixel(seen, ".apart .frame") == (80, 0, 40)


def test_depth_and_opacity_have_their_maps(seen: Seen) -> None:
    page = seen.page
    page.click("[data-set-kind=depth]")
    # The ends of viridis: near is yellow, far is purple. The student's is drawn at its opacity of 0.6.
    assert pixel(seen, ".first .frame") == pytest.approx((253, 231, 37), abs=2)
    assert page.inner_text(".legend") == "near 2\n4 far (world units)"
    page.click("[data-set-kind=opacity]")
    assert pixel(seen, ".first .frame") == (255, 255, 255)
    assert pixel(seen, ".second .frame") == (153, 153, 153)


def test_the_table_is_the_document_and_sorts(seen: Seen) -> None:
    page = seen.page
    told = page.evaluate("JSON.parse(document.getElementById('report').textContent)")
    assert told == document()
    shown_rows = page.locator("table.metrics tbody tr").all_inner_texts()
    assert [re.split(r"\t\s*", row) for row in shown_rows] == [
        [r["name"], f"{r['psnr']:.2f}", f"{r['ssim']:.4f}", f"{r['opacity_error']:.4g}"] for r in told["views"]
    ]
    page.click("table.metrics th[data-column='1']")
    assert page.locator("table.metrics tbody td:first-child").all_inner_texts() == ["view 00", "view 02", "view 01"]
    page.click("table.metrics th[data-column='1']")
    assert page.locator("table.metrics tbody td:first-child").all_inner_texts()[0] == "view 01"
    page.click("#raw summary")
    from playwright.sync_api import expect

    # Not wait_for_function: to poll it evaluates a string, which the page's own policy forbids.
    expect(page.locator("#raw pre")).not_to_be_empty()
    assert json.loads(page.inner_text("#raw pre")) == told


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of "rgb(r, g, b)"."""
    channels = [int(v) / 255 for v in re.findall(r"\d+", color)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_light_dark_desk_and_phone(browser: Browser, address: str, dark: bool, width: int) -> None:
    with visit(browser, address, width=width, dark=dark) as seen:
        assert seen.errors == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        style = "(s) => { const e = getComputedStyle(document.querySelector(s)); return [e.color, e.backgroundColor] }"
        ground = luminance(seen.page.evaluate(style, "body")[1])
        assert (ground < 0.05) is dark
        card = luminance(seen.page.evaluate(style, "section")[1])
        for selector in ("h2", ".unit-note", "td", "dt", ".link", "td.least"):
            ink = luminance(seen.page.evaluate(style, selector)[0])
            contrast = (max(ink, card) + 0.05) / (min(ink, card) + 0.05)
            assert contrast >= 4.5, selector  # WCAG AA
        assert seen.page.locator(f".w{340 if width < 720 else 720}").is_visible()
        assert seen.page.locator(f".w{720 if width < 720 else 340}").is_hidden()


def test_a_hostile_page_stays_quiet(browser: Browser, tmp_path: Path) -> None:
    evil, pictures = hostile()
    html.write(tmp_path / "evil.html", evil, pictures, command=HOSTILE)
    with visit(browser, (tmp_path / "evil.html").as_uri(), width=360) as seen:
        assert seen.errors == []
        assert len(seen.requests) == 1
        assert seen.page.title() != "owned"
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
        seen.page.click("[data-set-mode=slide]")
        assert seen.page.inner_text(".slide .tag.r") == HOSTILE
