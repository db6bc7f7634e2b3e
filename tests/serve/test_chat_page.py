"""The chat page in a browser, on an engine that answers by a rule."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from gearshift.data.labels import label_rows
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.labelling.routes import LabelSettings, label_routes
from gearshift.serve.labelling.store import LabelStore
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.pages import page_routes
from gearshift.serve.policies import Policies, Policy
from tests.serve.browser import needs_browser, open_browser, open_page, serious, served
from tests.serve.fake import END, TOKENIZER, FakeService, Token

pytestmark = needs_browser


class Slow(FakeService):
    """Waits before each token."""

    async def stream(self, *arguments: Any) -> AsyncGenerator[Token, None]:
        async for token in super().stream(*arguments):
            await asyncio.sleep(0.2)
            yield token


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


def app(service: FakeService, labels: LabelStore | None = None) -> Starlette:
    models = [{"name": "policy", "system": "Be brief."}, {"name": "other", "system": None}]

    policies = Policies(
        Policy(name, service, TOKENIZER, end_tokens=frozenset([END]))  # type: ignore[arg-type]
        for name in ("policy", "other")
    )
    metrics = Metrics()
    routes = openai_routes(policies, metrics)
    about = {"models": models, "labels": labels is not None}
    routes += page_routes(["chat"], lambda: about)
    routes += label_routes(labels, None, LabelSettings()) if labels else []
    return make_app(routes, ServerSettings(port=0), metrics.observe)


@contextmanager
def opened(browser: Any, service: FakeService, path: str = "/", **context: Any) -> Iterator[Any]:
    labels = context.pop("labels", None)
    with served(app(service, labels)) as url, open_page(browser, url + path, **context) as page:
        yield page


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send").wait_for()


def answers(page: Any) -> list[str]:
    return [one.inner_text() for one in page.locator(".message.assistant .text").all()]


def test_an_answer_streams_and_the_next_turn_has_the_whole_conversation(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service) as page:
        say(page, "hi")
        say(page, "and now?")
        assert answers(page) == [service.words] * 2
        assert "tokens" in page.locator(".message.assistant footer").first.inner_text()
        text = TOKENIZER.decode(service.asked[-1][0])
        assert "Be brief." in text and "hi" in text and service.words in text
        assert serious(page) == []


def test_an_answer_again_and_an_edit_are_branches(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service) as page:
        say(page, "first")
        service.words = "Something else."
        page.get_by_role("button", name="Again").click()
        page.get_by_text("2 of 2").wait_for()
        page.get_by_role("button", name="Send", exact=True).wait_for()
        assert answers(page) == ["Something else."]
        page.get_by_role("button", name="Earlier branch").click()
        assert answers(page) == ["Hello, wörld!"]
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Edit", exact=True).fill("second")
        page.get_by_role("button", name="Send this instead").click()
        page.get_by_text("Something else.").wait_for()
        assert "first" not in TOKENIZER.decode(service.asked[-1][0])
        page.get_by_role("button", name="Earlier branch").first.click()
        page.locator(".message.user").get_by_text("first", exact=True).wait_for()


def test_tokens_have_their_log_probs(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service) as page:
        say(page, "hi")
        page.get_by_role("button", name="Tokens").click()
        first = page.locator("button.token").first
        first.hover()
        assert "log-prob" in page.locator(".token-figures").inner_text()
        assert page.locator(".token-figures tbody tr").count() == 5
        heads = page.locator(".token-figures").get_by_role("columnheader").all_inner_texts()
        assert heads == ["token", "probability"]
        seen = "".join(page.locator("button.token").all_inner_texts())
        assert seen.startswith("Hello, w\\xc3\\xb6rld!"), "half a character is its bytes"


def test_settings_reach_the_engine_and_empty_ones_do_not(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service) as page:
        page.get_by_text("Settings").click()
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Seed").fill("7")
        page.get_by_label("Most tokens").fill("5")
        say(page, "hi")
        params = service.asked[-1][1]
        assert (params.temperature, params.seed, params.max_new_tokens) == (0.5, 7, 5)
        assert (params.top_p, params.top_k) == (1.0, 0)
        assert "cut at the limit" in page.locator(".message.assistant header").inner_text()


def test_a_copied_request_asks_for_the_last_answer(browser: Any) -> None:
    with opened(browser, FakeService(), permissions=["clipboard-read", "clipboard-write"]) as page:
        say(page, "hi")
        page.get_by_text("Copy", exact=True).first.click()
        page.get_by_role("button", name="Copy as JSON").click()
        page.get_by_text("Copied").wait_for()
        body = json.loads(page.evaluate("navigator.clipboard.readText()"))
        assert body["messages"][-1] == {"role": "user", "content": "hi"}


def test_stop_ends_the_request(browser: Any) -> None:
    service = Slow()
    service.words = "one two three four five six seven eight nine ten " * 5
    with opened(browser, service) as page:
        page.get_by_label("Message", exact=True).fill("hi")
        page.keyboard.press("Enter")
        page.get_by_text("one two").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        assert "one two" in answers(page)[0] and len(answers(page)[0]) < len(service.words)


class Varied(FakeService):
    """Says something else each time."""

    async def stream(self, *arguments: Any) -> AsyncGenerator[Token, None]:
        self.words = f"Answer number {len(self.asked)}."
        async for token in super().stream(*arguments):
            yield token


def test_two_models_answer_one_message_and_the_better_is_a_label(
    browser: Any, tmp_path: Path
) -> None:
    service = Varied()
    with (
        LabelStore(tmp_path, "a test") as store,
        opened(browser, service, labels=store) as page,
    ):
        page.get_by_role("button", name="Side by side").click()
        page.get_by_label("Hide the names").check()
        assert page.locator(".pane select").count() == 0
        page.get_by_label("One history for both").check()
        say(page, "hi")
        one, other = answers(page)
        page.get_by_label("Your name").fill("Ada")
        page.get_by_role("button", name="B is better").click()
        page.get_by_text("Label saved").wait_for()
        say(page, "more")
        assert len(service.asked) == 4
        [row] = label_rows(store.labels, "preference")
        assert (row["chosen"], row["rejected"]) == (other, one)
        expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        assert row["prompt"] == expected
        # The conversation of both goes on with the better answer.
        text = TOKENIZER.decode(service.asked[-1][0])
        assert other in text and one not in text


def test_answers_to_different_conversations_are_not_compared(browser: Any, tmp_path: Path) -> None:
    with (
        LabelStore(tmp_path, "a test") as store,
        opened(browser, Varied(), labels=store) as page,
    ):
        page.get_by_role("button", name="Side by side").click()
        say(page, "hi")
        page.get_by_role("button", name="A is better").wait_for()
        say(page, "more")
        assert len(answers(page)) == 4
        assert not page.get_by_role("button", name="A is better").count()


def test_a_pane_counts_its_own_branches_alone(browser: Any) -> None:
    service = Varied()
    with opened(browser, service) as page:
        page.get_by_role("button", name="Side by side").click()
        say(page, "hi")
        assert page.locator(".branches").count() == 0, "each pane has one message and one answer"
        one, other = page.locator(".pane").all()
        one.get_by_role("button", name="Again").click()
        one.get_by_text("2 of 2").wait_for()
        page.get_by_role("button", name="Send", exact=True).wait_for()
        assert other.locator(".branches").count() == 0
        page.get_by_label("One history for both").check()
        say(page, "more")
        assert one.locator(".branches").count() == 1
        newest = one.locator(".message.assistant .text").last
        answered = newest.inner_text()
        one.get_by_role("button", name="Earlier branch").click()
        one.get_by_role("button", name="Later branch").click()
        assert newest.inner_text() == answered, "not the answer of the other pane"
        page.get_by_role("button", name="One model").click()
        assert page.locator(".branches").count() > 1, "alone it shows all branches"


def test_an_answer_that_was_on_its_way_is_over_after_a_reload(browser: Any) -> None:
    service = Slow("one two three " * 20)
    with opened(browser, service) as page:
        page.get_by_label("Message", exact=True).fill("hi")
        page.keyboard.press("Enter")
        page.get_by_text("is writing").wait_for()
        page.get_by_text("System message").click()
        page.get_by_label("System message").fill("Be kind.")  # a change is kept at once
        page.get_by_text("Chats (1)").wait_for()
        page.reload()
        page.get_by_text("Chats (1)").click()
        page.get_by_role("button", name="hi", exact=True).click()
        page.locator(".message.assistant").get_by_text("stopped").wait_for()
        assert page.get_by_text("is writing").count() == 0


def focused(page: Any) -> str:
    """What has the focus: its label or its text."""
    script = """(() => {
        const at = document.activeElement;
        return at.ariaLabel || at.labels?.[0]?.innerText || at.innerText || at.tagName;
    })()"""
    return str(page.evaluate(script)).splitlines()[0].strip()


def tab_to(page: Any, name: str, key: str = "Tab") -> None:
    for _ in range(40):
        page.keyboard.press(key)
        if focused(page) == name:
            return
    raise AssertionError(f"the keyboard does not reach {name}")


def test_a_conversation_by_keys_alone(browser: Any) -> None:
    service = Varied()
    with opened(browser, service) as page:
        page.get_by_label("Message", exact=True).wait_for()
        order = []
        while "Message" not in order:
            page.keyboard.press("Tab")
            order.append(focused(page))
        assert order == [
            "Skip to the content", "Chat", "Colours", "New chat", "Side by side",
            "Export as JSON", "System message", "Model", "Settings", "Copy", "Message",
        ]  # fmt: skip
        page.keyboard.type("hi")
        page.keyboard.press("Enter")
        page.get_by_text("Answer number 0.").wait_for()
        assert focused(page) == "Message"
        tab_to(page, "Again", "Shift+Tab")
        page.keyboard.press("Enter")
        page.get_by_text("Answer number 1.").wait_for()
        assert focused(page) == "Message", "the button went away with its answer"
        tab_to(page, "Earlier branch", "Shift+Tab")
        page.keyboard.press("Enter")
        page.get_by_text("Answer number 0.").wait_for()
        assert focused(page) == "Later branch", "there is no earlier one"
        page.keyboard.press("Space")
        page.get_by_text("Answer number 1.").wait_for()
        assert focused(page) == "Earlier branch"
        tab_to(page, "Edit", "Shift+Tab")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Cancel").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Cancel").wait_for(state="detached")
        assert focused(page) == "Edit"
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Cancel").wait_for()
        page.keyboard.type(" again")
        tab_to(page, "Send this instead")
        page.keyboard.press("Enter")
        page.get_by_text("Answer number 2.").wait_for()
        assert "hi again" in TOKENIZER.decode(service.asked[-1][0])
        assert focused(page) == "Message"


def test_an_answer_is_stopped_by_keys_alone(browser: Any) -> None:
    with opened(browser, Slow("one two three " * 20)) as page:
        tab_to(page, "Message")
        page.keyboard.type("hi")
        page.keyboard.press("Enter")
        page.get_by_text("is writing").wait_for()
        tab_to(page, "Stop")
        page.keyboard.press("Enter")
        page.get_by_text("stopped").wait_for()
        assert focused(page) == "Message"


def test_hidden_names_are_drawn_by_chance(browser: Any) -> None:
    with opened(browser, FakeService()) as page:
        page.evaluate("Math.random = () => 0.1")
        page.get_by_role("button", name="Side by side").click()
        page.get_by_label("Hide the names").check()
        page.get_by_label("Hide the names").uncheck()
        shown = [one.input_value() for one in page.locator(".pane select").all()]
        assert shown == ["other", "policy"]


def test_a_conversation_is_kept_in_this_browser_and_leaves_as_json(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service) as page:
        say(page, "keep me")
        page.get_by_text("Chats (1)").wait_for()
        page.reload()
        page.get_by_text("Chats (1)").click()
        page.get_by_role("button", name="keep me", exact=True).click()
        assert answers(page) == [service.words]
        with page.expect_download() as download:
            page.get_by_text("Export as JSON").click()
        kept = json.loads(Path(download.value.path()).read_text())
        assert [node["content"] for node in kept["nodes"].values()] == ["keep me", service.words]
        page.get_by_role("button", name="Delete: keep me").click()
        page.get_by_text("Chats (").wait_for(state="detached")


def test_an_address_names_a_model_and_a_system_message(browser: Any) -> None:
    service = FakeService()
    with opened(browser, service, "/?model=other&system=Answer+in+verse.") as page:
        assert page.locator(".pane select").input_value() == "other"
        say(page, "hi")
        assert "Answer in verse." in TOKENIZER.decode(service.asked[-1][0])


def test_t62_hostile_text_is_text(browser: Any) -> None:
    service = FakeService()
    service.words = "<img src=x onerror=alert(1)> \u202eabc </textarea><script>1</script>"
    with opened(browser, service) as page:
        say(page, "<b onclick=x>me</b>")
        assert service.words.replace("\u202e", "") in answers(page)[0].replace("\u202e", "")
        assert page.locator("main img, main script, main b").count() == 0
        page.get_by_role("button", name="Tokens").click()
        assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_t26_it_is_usable_on_a_telephone_and_by_everybody(
    browser: Any, colours: str, width: int
) -> None:
    size = {"width": width, "height": 740}
    with opened(browser, FakeService(), color_scheme=colours, viewport=size) as page:
        say(page, "A question.\n\n- one\n- two")
        page.get_by_role("button", name="Side by side").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert serious(page) == []
