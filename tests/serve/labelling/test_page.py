"""The labelling page in a browser."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gearshift.data.labels import Labels, read_events
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.labelling.items import item_of_row, make_item
from gearshift.serve.labelling.routes import LabelSettings, label_routes
from gearshift.serve.labelling.store import LabelStore
from gearshift.serve.pages import page_routes
from tests.serve.browser import CHROMIUM, needs_browser, open_browser, open_page, serious, served

pytestmark = needs_browser
HOSTILE = (
    "<img src=x onerror=fetch('/stolen')></section>\u202egnorw\u202c \x1b[31m\ud800 " + "w" * 3000
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@contextmanager
def serving(folder: Path, pairs: int, one: int = 0, **how: Any) -> Iterator[tuple[str, LabelStore]]:
    """The address of a page with so many pairs and single answers."""
    with LabelStore(folder, "test") as store:
        for i in range(pairs):
            asked = [{"role": "user", "content": f"ask {i}"}]
            store.add_item(make_item(asked, [f"good {i}", f"poor {i}"], [{"model": "x"}] * 2))
        for i in range(one):
            store.add_item(item_of_row({"prompt": f"single {i}", "completion": f"alone {i}"}))
        routes = label_routes(store, None, LabelSettings(title="rows.jsonl", **how))
        with served(make_app([*routes, *page_routes(["labels"])], ServerSettings(port=0))) as url:
            yield url, store


def begin(page: Any, who: str) -> None:
    page.locator("input[name=who]").fill(who)
    page.keyboard.press("Enter")
    page.locator("#answer-left").wait_for()


def asked(page: Any) -> str:
    return str(page.locator("#asked").get_attribute("data-item"))


def press_and_wait(page: Any, key: str, was: str = "") -> str:
    """Press a key that submits; wait for another item than `was`, or for the end; give the item."""
    was = was or asked(page)
    page.keyboard.press(key)
    found = page.wait_for_function(
        """was => {
            const [item, state] = ["#asked", "#state"].map((id) => document.querySelector(id));
            if (item) return item.dataset.item !== was && item.dataset.item;
            return state?.ariaBusy === "false" && "end";
        }""",
        arg=was,
    ).json_value()
    return "" if found == "end" else str(found)


def all_sent(page: Any) -> None:
    page.wait_for_function("() => document.querySelector('#unsent')?.textContent === ''")


def labels_of(store: LabelStore) -> list[dict[str, Any]]:
    return [e for e in read_events(store.file)[0] if e["kind"] not in ("item", "undo")]


def test_t54_a_session_by_keys_alone(browser: Any, tmp_path: Path) -> None:
    how = {"guidelines": "Be kind.", "tags": ("wrong",)}
    with (
        serving(tmp_path, 8, one=1, **how) as (url, store),
        open_page(browser, f"{url}/labels") as page,
    ):
        page.get_by_text("Be kind.").wait_for()
        begin(page, "ann lee")
        first = asked(page)
        shown = page.locator("#answer-left .words").inner_text()
        for key in ("1", "2", "3", "4", "s", "ArrowLeft"):
            press_and_wait(page, key)
        page.keyboard.press("/")
        page.keyboard.type("too 1 long")
        page.keyboard.press("Escape")
        page.keyboard.press("2")
        page.locator("#right[aria-pressed=true]").wait_for()
        press_and_wait(page, "Enter")
        page.keyboard.press("e")
        page.locator("#edit").wait_for()
        page.wait_for_function("() => document.activeElement.id === 'edit'")
        page.keyboard.press("End")
        page.keyboard.type(" 1s?")
        press_and_wait(page, "Control+Enter")
        press_and_wait(page, "1")
        page.get_by_text("Nothing is left").wait_for()
        all_sent(page)
        given = labels_of(store)
        assert [e["choice"] for e in given] == [
            "left", "right", "tie", "bad", None, "left", "right", None, "up",
        ]  # fmt: skip
        assert [e["kind"] for e in given].count("skip") == 1
        assert given[6]["reason"] == {"text": "too 1 long", "tags": []}
        assert given[7]["kind"] == "edit" and given[7]["edit"]["text"].endswith(" 1s?")
        label, item = given[0], store.labels.items[first]
        assert item.answers[label["shown"]["left"]] == shown, "what was seen on the left"
        for undone in range(1, 10):
            page.keyboard.press("u")
            until = time.monotonic() + 20
            while len(store.labels.undone) < undone and time.monotonic() < until:
                page.wait_for_timeout(10)
        page.wait_for_function(
            "first => document.querySelector('#asked')?.dataset.item === first", arg=first
        )
        all_sent(page)
        page.get_by_text("0 labelled").wait_for()
        assert len(store.labels.undone) == 9
        for key, words in (("g", "Be kind."), ("?", "as often as you like")):
            page.keyboard.press(key)
            page.get_by_text(words).wait_for()


@pytest.mark.parametrize("items", [50, pytest.param(250, marks=pytest.mark.slow)])
def test_t51_five_people_in_two_browsers(browser: Any, tmp_path: Path, items: int) -> None:
    people, draw = ["ann", "bob", "cid", "dee", "eve"], random.Random(0)
    seen: dict[str, list[str]] = {who: [] for who in people}
    with ExitStack() as opened:
        url, store = opened.enter_context(serving(tmp_path, items, overlap=0.2))
        other = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened.callback(other.close)
        pages = {}
        for i, who in enumerate(people):
            pages[who] = opened.enter_context(open_page((browser, other)[i % 2], f"{url}/labels"))
            begin(pages[who], who)
        item = {who: asked(page) for who, page in pages.items()}
        while item:
            who = draw.choice(list(item))
            page = pages[who]
            if item[who]:
                seen[who].append(item[who])
                item[who] = press_and_wait(page, draw.choice("1234"), item[who])
            else:
                all_sent(page)
                del item[who]
                page.locator("#leave").click()
        done = sum(map(len, seen.values()))
    labels = Labels(read_events(store.file)[0])
    times = [len(labels.of(item)) for item in labels.items]
    assert all(len(ids) == len(set(ids)) for ids in seen.values()), "an item came twice"
    assert len(labels_of(store)) == done == sum(times)
    assert set(times) <= {1, 2} and abs(times.count(2) - items / 5) <= 3


def test_labels_outlive_a_lost_connection_and_a_closed_tab(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, 6) as (url, store):
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{url}/labels")
        begin(page, "ann")
        context.set_offline(True)
        press_and_wait(page, "1")
        press_and_wait(page, "2")
        page.get_by_text("2 not sent yet").wait_for()
        page.close()
        context.set_offline(False)
        assert not labels_of(store)
        again = context.new_page()
        again.goto(f"{url}/labels")
        again.locator("input[name=who]").wait_for()
        begin(again, "ann")
        all_sent(again)
        assert [e["choice"] for e in labels_of(store)] == ["left", "right"]
        assert asked(again) not in {e["item"] for e in labels_of(store)}
        context.close()


def test_an_answer_that_is_lost_on_the_way_does_not_double_the_label(
    browser: Any, tmp_path: Path
) -> None:
    with serving(tmp_path, 3) as (url, store):
        context = browser.new_context()
        page = context.new_page()
        lost = []

        def lose(route: Any) -> None:
            answer = route.fetch()
            if lost:
                return route.fulfill(response=answer)
            lost.append(answer.status)
            return route.abort()

        page.route("**/api/labels/events", lose)
        page.goto(f"{url}/labels")
        begin(page, "ann")
        press_and_wait(page, "1")
        page.get_by_text("1 not sent yet").wait_for()
        all_sent(page)
        assert lost == [200] and len(labels_of(store)) == 1
        context.close()


def test_two_tabs_of_a_person_have_different_items(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, 12) as (url, store):
        context = browser.new_context()
        tabs = [context.new_page() for _ in range(2)]
        seen = []
        for tab in tabs:
            tab.goto(f"{url}/labels")
            begin(tab, "ann")
        for i in range(8):
            seen.append(asked(tabs[i % 2]))
            press_and_wait(tabs[i % 2], "1")
        for tab in tabs:
            all_sent(tab)
        assert len(set(seen)) == 8
        assert len({e["item"] for e in labels_of(store)}) == len(labels_of(store)) == 8
        context.close()


def test_t62_hostile_texts_are_text(browser: Any, tmp_path: Path) -> None:
    size = {"width": 360, "height": 740}
    with (
        serving(tmp_path, 0, guidelines=HOSTILE, tags=(HOSTILE[:40],)) as (url, store),
        open_page(browser, f"{url}/labels", viewport=size) as page,
    ):
        store.add_item(make_item([{"role": "user", "content": HOSTILE}], [HOSTILE, "b"], [{}, {}]))
        begin(page, "<b>ann</b>")
        assert not page.locator("#page img").count()
        assert "<img src=x" in page.locator("#asked").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("t")
        assert "[U+202E]gnorw[U+202C]" in page.locator("#asked").inner_text()
        page.locator("#tag-0").click()
        page.keyboard.press("1")
        page.locator("#submit").click()
        page.get_by_text("Nothing is left").wait_for()
        all_sent(page)
        [given] = labels_of(store)
        assert given["who"] == "<b>ann</b>" and given["reason"]["tags"] == [HOSTILE[:40]]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_t26_the_page_is_accessible(browser: Any, tmp_path: Path, colours: str) -> None:
    with (
        serving(tmp_path, 2, guidelines="Read this.", tags=("wrong",), overlap=1.0) as (url, store),
        open_page(browser, f"{url}/labels", color_scheme=colours) as page,
    ):
        page.locator("#begin").wait_for()
        assert serious(page) == []
        begin(page, "ann")
        page.keyboard.press("e")
        page.locator("#edit").wait_for()
        assert serious(page) == []
        page.keyboard.press("Escape")
        press_and_wait(page, "1")
        all_sent(page)
        [given] = labels_of(store)
        other = {"left": "right", "right": "left"}[given["choice"]]
        store.add({**given, "id": "label-of-bob", "who": "bob", "choice": other})
        page.goto("about:blank")
        page.goto(f"{url}/labels#owner")
        page.locator(".dispute").wait_for()
        assert serious(page) == []
        with page.expect_download() as download:
            page.locator("#download").click()
        assert Path(download.value.path()).read_text() == ""
        answers = store.labels.items[given["item"]].answers
        side = "left" if str(answers[0]).startswith("good") else "right"
        page.locator(f".decide-{side}").click()
        page.get_by_text("None.").wait_for()
        with page.expect_download() as download:
            page.locator("#download").click()
        assert json.loads(Path(download.value.path()).read_text())["chosen"].startswith("good")


def test_ratings_by_keys(browser: Any, tmp_path: Path) -> None:
    with (
        serving(tmp_path, 0, one=1, criteria=("helpful", "true")) as (url, store),
        open_page(browser, f"{url}/labels") as page,
    ):
        begin(page, "ann")
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.get_by_text("Nothing is left").wait_for()
        all_sent(page)
        [given] = labels_of(store)
        assert given["choice"] == {"helpful": 4, "true": 2}
