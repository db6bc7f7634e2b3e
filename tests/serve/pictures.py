"""Takes the pictures of the chat, label and run pages for docs/figures, as the commands open them.

    python -m tests.serve.pictures runs/dates docs/figures

The run is that of docs/tutorial.md. An error on a page, a request to another server,
or a serious finding of axe ends this.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serve.browser import open_browser, open_page, serious

SIZES = {1280: ("light", 800), 360: ("dark", 740)}
"""The colours and the height of a picture by its width."""


@contextmanager
def command(*words: str) -> Iterator[str]:
    """The address that `gearshift WORDS` prints last, without its path."""
    call = [sys.executable, "-m", "gearshift", *words, "--port", "0"]
    server = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = next(line for line in server.stdout if line.startswith("http://"))
        yield "/".join(address.split("/")[:3])
    finally:
        server.kill()
        server.communicate()


def take(browser: Any, url: str, ready: Callable[[Any], None], to: Path) -> None:
    """One page in both sizes, once `ready` has brought it to what the picture shows."""
    for width, (colours, height) in SIZES.items():
        size = {"width": width, "height": height}
        with open_page(browser, url, viewport=size, color_scheme=colours) as page:
            ready(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, url
            assert not (found := serious(page)), found
            page.screenshot(path=f"{to}-{width}.png")


def chat(page: Any, ask: str) -> None:
    """A question to two models where there is room for both; else the tokens of one answer."""
    wide = page.viewport_size["width"] > 1000
    if wide:
        page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Message", exact=True).fill(ask)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()
    for button in page.get_by_role("button", name="Tokens").all()[: 1 if wide else None]:
        button.click()
    page.locator("button.token").nth(2).hover()


def label(page: Any) -> None:
    page.locator("input[name=who]").fill("Ada")
    page.keyboard.press("Enter")
    page.locator("#answer-left").wait_for()


def run(page: Any) -> None:
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(500)


def pictures(folder: Path, ask: str, to: Path) -> None:
    """Write chat, label and run pictures of this run into a folder."""
    with open_browser() as browser, tempfile.TemporaryDirectory() as place:
        with command("serve", str(folder), "--against", "base") as url:
            take(browser, f"{url}/", lambda page: chat(page, ask), to / "chat")
            take(browser, f"{url}/runs", run, to / "run")
        copy = Path(place) / folder.name  # labels are written into the run
        (copy / "rl").mkdir(parents=True)
        shutil.copy(folder / "rl" / "rollouts.jsonl", copy / "rl")
        with command("label", str(copy), "--rollouts") as url:
            take(browser, f"{url}/labels", label, to / "label")


if __name__ == "__main__":
    question = "Write this date as YYYY-MM-DD: 24 December 2031"
    pictures(Path(sys.argv[1]), question, Path(sys.argv[2]))
