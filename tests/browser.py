"""A headless Chromium for tests that look at pages: the fixture ``browser`` (tests/conftest.py) starts one a session.

    with visit(browser, "file:///...", width=360, dark=True) as seen:
        assert seen.page.inner_text("h1") == "..."
        assert seen.errors == []

Chromium is the system's (``PVDCONVERT_CHROMIUM`` names another), driven by playwright, the extra ``[browser]``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """The path of a Chromium, or None."""
    named = os.environ.get("PVDCONVERT_CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A running Chromium; skips the test where it or playwright is absent. One that does not start is a failure."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright: pip install -c constraints.txt -e '.[browser]'")
    path = executable()
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or PVDCONVERT_CHROMIUM=PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS), timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


@dataclasses.dataclass
class Seen:
    """A page that is open, and what happened on it.

    errors     messages of the console of type error or warning, and uncaught exceptions
    requests   every address that was asked for, the page's own first; data: and blob: are not requests
    """

    page: Page
    errors: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def visit(
    browser: Browser, address: str, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
) -> Iterator[Seen]:
    """``address`` in a window of its own (nothing shared, closed at the end), loaded."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", has_touch=touch
    )
    context.set_default_timeout(60_000)
    try:
        page = context.new_page()
        seen = Seen(page)
        page.on("console", lambda m: seen.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: seen.errors.append(str(e)))
        page.on("request", lambda r: None if r.url[:5] in ("data:", "blob:") else seen.requests.append(r.url))
        page.goto(address)
        yield seen
    finally:
        context.close()
