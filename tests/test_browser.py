"""The browser that tests look through sees what it must: errors, requests, colours, and WebGL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.browser import visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PAGE = """<!doctype html><meta charset=utf-8><title>t</title>
<style>body{color:rgb(1,2,3)} @media (prefers-color-scheme: dark){body{color:rgb(9,8,7)}}</style>
<img src="not-there.png"><p id=out></p>
<script>
const gl = document.createElement('canvas').getContext('webgl2');
out.textContent = innerWidth + ' ' + getComputedStyle(document.body).color + ' ' + (gl ? 'webgl' : 'none');
throw new Error('thrown on purpose');
</script>"""


def test_errors_and_requests_are_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE, encoding="utf-8")
    with visit(browser, path.as_uri(), width=400) as light:
        assert light.page.inner_text("#out") == "400 rgb(1, 2, 3) webgl"
        assert any("thrown on purpose" in e for e in light.errors)
        assert any("ERR_FILE_NOT_FOUND" in e for e in light.errors)
        assert light.requests == [path.as_uri(), (tmp_path / "not-there.png").as_uri()]
    with visit(browser, path.as_uri(), width=700, dark=True) as dark:
        assert dark.page.inner_text("#out") == "700 rgb(9, 8, 7) webgl"
