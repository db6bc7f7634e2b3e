"""A browser for tests of the pages: Debian's Chromium, driven by playwright.

A page fails its test for an error in the console, for what its content security policy forbids, and
for a request to another server.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette

from gearshift.serve.app import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    CHROMIUM = None
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="chromium or playwright is not installed (apt install chromium)"
)


@contextmanager
def open_browser(*switches: str) -> Iterator["Browser"]:
    """Chromium without a window, with further switches of its command line."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *switches])
        yield browser
        browser.close()


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address at which the app answers, in a thread."""
    server = Server(app)
    server.start()
    try:
        yield server.url
    finally:
        server.stop(0)


@contextmanager
def open_page(browser: "Browser", url: str, **context: Any) -> Iterator["Page"]:
    """A page at this address in a context of its own. `context`: see playwright's `new_context`,
    for example `viewport={"width": 360, "height": 740}` or `color_scheme="dark"`.
    """
    faults: list[str] = []
    opened = browser.new_context(**context)
    origin = "/".join(url.split("/")[:3])
    page = opened.new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", lambda m: faults.append(f"{m.type}: {m.text}") if m.type in BAD else None)
    page.on("request", lambda r: None if _own(r.url, origin) else faults.append(r.url))
    try:
        page.goto(url)
        yield page
        assert not faults, faults
    finally:
        opened.close()


BAD = ("error", "warning")


def _own(url: str, origin: str) -> bool:
    return url.startswith((f"{origin}/", "data:", "blob:"))


def serious(page: "Page") -> list[str]:
    """What axe finds on the page that is serious or worse, in words."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:120]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
