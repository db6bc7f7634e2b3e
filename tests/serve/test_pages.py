"""The pages' files: what a browser gets, and what no page may do."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gearshift.serve import pages
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.pages import POLICY, WEB, page_routes
from tests.serve.browser import needs_browser, open_browser, open_page, serious, served

SCRIPTS = sorted([*WEB.rglob("*.js"), *WEB.parents[1].glob("tasks/*/web/*.js")])
HOSTILE = (
    "<script>fetch('/stolen')</script> **bold** \u202egnorw \x1b[31m </style>\n\n- one\n- `two`"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(app()) as url:
        yield url


def app(key: str | None = None) -> Starlette:
    """A page `try` of this test beside the shared files."""

    pages._PAGES["try"] = "try/try", ["/try"]
    about = {"pages": {"chat": "/"}, "text": HOSTILE}
    routes = page_routes(["try"], lambda: about, {"try": Path(__file__).parent / "web"})
    return make_app(routes, ServerSettings(port=0, key=key))


def test_the_libraries_are_those_that_the_list_names() -> None:
    rows = re.findall(
        r"^\| (\S+) \|.*`([0-9a-f]{64})` \|$", (WEB / "vendor/VENDORED.md").read_text(), re.M
    )
    files = {p.name for p in (WEB / "vendor").iterdir() if p.suffix in (".js", ".css")}
    assert {name for name, _ in rows} == files
    for name, digest in rows:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest


CLASSIC = ("theme.js", "recorder.js")
"""Scripts that are no modules."""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-3:]))
def test_each_script_is_javascript(script: Path) -> None:
    kind = "commonjs" if script.name in CLASSIC else "module"
    command = ["node", f"--input-type={kind}", "--check"]
    subprocess.run(command, input=script.read_text(), text=True, check=True)


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if "vendor" not in s.parts], ids=lambda p: "/".join(p.parts[-3:])
)
def test_no_script_makes_markup_of_text(script: Path) -> None:
    words = "innerHTML|outerHTML|insertAdjacentHTML|document.write|dangerouslySet|eval\\("
    code = re.sub(r"^\s*//.*$", "", script.read_text(), flags=re.M)
    assert not re.search(words, code)


def test_files_have_their_types_and_the_policy() -> None:
    client = TestClient(app(), base_url="http://127.0.0.1")
    page, script = client.get("/"), client.get("/web/common.js")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    for answer in (page, script):
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    tag = {"If-None-Match": script.headers["etag"]}
    assert client.get("/web/common.js", headers=tag).status_code == 304
    assert not re.search(r"<(script|style)[^>]*>[^<]|\son\w+=|\sstyle=", page.text)


@pytest.mark.parametrize(
    "path",
    ["/web/../pages.py", "/web/%2e%2e/pages.py", "/web//etc/passwd", "/web/page.html", "/web/",
     "/web/vendor/VENDORED.md", "/web/common.js%00", "/web/..%2fpages.py"],
)  # fmt: skip
def test_t24_no_other_file_is_given(path: str) -> None:
    answer = TestClient(app(), base_url="http://127.0.0.1").get(path)
    assert answer.status_code in (400, 404) and "import" not in answer.text


@needs_browser
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_t62_hostile_text_is_text(browser: Any, address: str, colours: str) -> None:
    with open_page(browser, address, color_scheme=colours) as page:
        text = page.locator(".text")
        assert "<script>fetch('/stolen')</script>" in text.inner_text()
        assert [li.inner_text() for li in text.locator("li").all()] == ["one", "two"]
        assert text.locator("strong").inner_text() == "bold" and not text.locator("script").count()
        assert page.evaluate("document.title") == "Try · Gearshift"
        assert serious(page) == []


@needs_browser
@pytest.mark.parametrize(
    ("does", "refused"),
    [
        ("document.body.innerHTML = '<b>x</b>'", "TrustedHTML"),
        ("document.createElement('script').text = 'x'", "TrustedScript"),
        ("setTimeout('x')", "TrustedScript"),
        ("fetch('https://example.org/').catch(() => 0)", "example.org"),
        ("new Image().src = 'https://example.org/x.png'", "example.org"),
        ("document.body.setAttribute('style', 'color: red')", "style"),
    ],
)
def test_t26_the_policy_refuses_what_a_text_could_do(
    browser: Any, address: str, does: str, refused: str
) -> None:
    with pytest.raises(AssertionError, match=refused), open_page(browser, address) as page:
        page.locator(".text").wait_for()
        with page.expect_console_message():
            page.evaluate(f"() => {{ try {{ {does} }} catch {{ }} }}")


@needs_browser
def test_a_page_gives_the_key_once_and_the_address_loses_it(browser: Any) -> None:
    with served(app("the key")) as url, open_page(browser, f"{url}/#key=the%20key") as page:
        page.locator(".text").wait_for()
        assert "key" not in page.url
        [cookie] = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        assert "the key" not in cookie["value"]


@needs_browser
def test_colours_are_kept(browser: Any, address: str) -> None:
    with open_page(browser, address, color_scheme="light") as page:
        page.get_by_label("Colours").select_option("dark")
        page.reload()
        page.locator(".text").wait_for()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
