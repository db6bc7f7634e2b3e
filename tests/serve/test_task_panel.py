"""A task's panel beside the chat: its routes, and in a browser the home that commands change."""

import base64
import io
import json
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gearshift.errors import ConfigError, DataError
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.policies import Policies, Policy
from gearshift.serve.served import policy_page_routes
from gearshift.serve.speech import speak
from gearshift.serve.task_panel import LONGEST_WAV, Panel
from gearshift.tasks.service.task import TASK as SERVICE
from gearshift.tasks.service.task import ServiceConfig
from gearshift.tasks.voice.task import TASK as VOICE
from tests.serve.browser import needs_browser, open_browser, open_page, serious, served
from tests.serve.fake import END, TOKENIZER, FakeService

LIGHT = '{"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}'
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng here")


def voice(hear: Any = lambda path: "hi", **more: Any) -> Panel:
    config = SimpleNamespace(languages=("en", "de"))
    assert VOICE.panel
    folder, state = VOICE.panel.folder, VOICE.panel.state
    return Panel(folder, lambda given: state(config, Path(), given), hear, single=True, **more)


def app(panel: Panel, service: FakeService | None = None, key: str | None = None) -> Starlette:
    policies, metrics = Policies(), Metrics()
    if service:
        policies.add(Policy("policy", service, TOKENIZER, "Be brief.", frozenset([END])))  # type: ignore[arg-type]
    routes = policy_page_routes(policies, False, panel=panel)
    return make_app([*openai_routes(policies, metrics), *routes], ServerSettings(port=0, key=key))


def client(panel: Panel) -> TestClient:
    headers = {"X-Gearshift": "1"}
    return TestClient(app(panel), base_url="http://127.0.0.1", headers=headers)


def test_the_state_follows_the_conversation_and_the_guard_covers_it() -> None:
    body = {"messages": [{"role": "user", "content": "light"}, said(LIGHT)]}
    answer = client(voice()).post("/api/task/state", json=body)
    assert answer.json()["did"] == "Turning on the kitchen light."
    plain = TestClient(app(voice(), key="k"), base_url="http://127.0.0.1")
    assert plain.post("/api/task/state", json=body).status_code == 401
    assert plain.get("/web/task/panel.js").status_code == 200
    for wrong in ({}, {"messages": [1]}, {"messages": [said("")] * 501}):
        assert client(voice()).post("/api/task/state", json=wrong).status_code == 400


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_half_a_character_and_what_is_no_number_reach_the_page() -> None:
    texts = [r'{"intent": "HassShoppingListAddItem", "item": "\ud800"}', '{"intent": NaN}']
    for text in texts:
        answer = client(voice()).post("/api/task/state", json={"messages": [said(text)]})
        assert answer.status_code == 200, text


def test_a_recording_is_bounded_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found: list[bytes] = []

    def hear(path: str) -> str:
        found.append(Path(path).read_bytes())
        if found[-1] == b"bad":
            raise DataError(f"{path} is no WAV file.")
        if found[-1] == b"none":
            raise ConfigError("Hearing needs pocketsphinx.")
        return "words"

    def post(wav: object) -> tuple[int, Any]:
        answer = client(voice(hear)).post("/api/task/hear", json={"wav": wav})
        return answer.status_code, answer.json()

    assert post(base64.b64encode(b"RIFF").decode()) == (200, {"text": "words"})
    status, refused = post(base64.b64encode(b"bad").decode())
    assert status == 400 and refused["error"]["message"] == "The recording is no WAV file."
    status, refused = post(base64.b64encode(b"none").decode())
    assert status == 501 and "pocketsphinx" in refused["error"]["message"]
    assert post(base64.b64encode(bytes(LONGEST_WAV + 1)).decode())[0] == 413
    assert [post(wrong)[0] for wrong in (None, 1, "no base64!")] == [400] * 3
    assert found == [b"RIFF", b"bad", b"none"] and not list(tmp_path.iterdir())


@needs_espeak
def test_an_answer_is_spoken_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def post(**body: object) -> tuple[int, Any]:
        answer = client(voice()).post("/api/task/speak", json=body)
        return answer.status_code, answer.json()

    status, found = post(text="Hello <b>", language="en")
    assert status == 200
    with wave.open(io.BytesIO(base64.b64decode(found["wav"]))) as file:
        assert file.getnframes() > 8000
    wrong: list[dict[str, object]] = [{"text": ""}, {"text": "a" * 501}, {"text": 1}, {}]
    wrong += [{"text": "a", "language": "-x"}, {"text": "a", "language": "../x"}]
    assert [post(**body)[0] for body in wrong] == [400] * 6
    monkeypatch.setenv("PATH", "")
    status, found = post(text="Hello")
    assert status == 501 and "apt-get install espeak-ng" in found["error"]["message"]
    about = client(voice()).get("/api/served").json()["task"]
    assert "espeak-ng" in about["missing"]["speak"] and about["single"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser whose microphone gives a sentence."""
    sound = tmp_path_factory.mktemp("microphone") / "sound.wav"
    if shutil.which("espeak-ng"):
        speak("turn on the kitchen light", sound)
    switches = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with open_browser(*switches, f"--use-file-for-fake-audio-capture={sound}") as browser:
        yield browser


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send", exact=True).wait_for()


@needs_browser
def test_the_home_changes_and_says_what_is_wrong(browser: Any) -> None:
    service = FakeService(LIGHT)
    with served(app(voice(), service)) as url, open_page(browser, url) as page:
        panel = page.get_by_role("region", name="The task")
        page.get_by_role("heading", name="The home").wait_for()
        ask(page, "turn on the light in the kitchen")
        panel.get_by_text("Turning on the kitchen light.").wait_for()
        assert panel.locator("tr").first.inner_text().split() == ["kitchen", "light", "on"]
        service.words = '{"intent": "HassTurnOn", "name": "<img src=x onerror=alert(1)>"}'
        ask(page, "and the other one")
        panel.get_by_text("This home has no device `<img src=x onerror=alert(1)>`.").wait_for()
        assert page.locator("main img").count() == 0
        sent = TOKENIZER.decode(service.asked[-1][0])
        assert "Be brief." in sent and "kitchen" not in sent, "the model gets a request alone"
        panel.locator("summary").focus()
        page.keyboard.press("Enter")
        panel.get_by_role("rowheader", name="kitchen").wait_for()
        assert serious(page) == []


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_the_shop_shows_the_order_and_sends_the_tools_answer(
    browser: Any, tmp_path: Path, width: int
) -> None:
    assert SERVICE.panel
    config = ServiceConfig(labelled=1, train=1, validation=4, test=1)
    SERVICE.prepare(config, 0, tmp_path / "data")
    number = json.loads((tmp_path / "data/validation.jsonl").open().readline())["order"]["number"]
    state = SERVICE.panel.state
    panel = Panel(SERVICE.panel.folder, lambda m: state(config, tmp_path, m), lambda _: "")
    service = FakeService(json.dumps({"tool": "cancel", "order": number}))
    size = {"width": width, "height": 740}
    with served(app(panel, service)) as url, open_page(browser, url, viewport=size) as page:
        shop = page.get_by_role("region", name="The task")
        shop.get_by_role("listitem").first.get_by_role("button").click()
        shop.get_by_text("The tool answers: Done.").wait_for()
        assert shop.get_by_role("row", name=number).inner_text().endswith("cancelled")
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        service.words = "It is cancelled."
        shop.get_by_role("button", name="Send the tool's answer").click()
        page.get_by_role("article", name="Tool").get_by_text("Done.").wait_for()
        page.get_by_text("It is cancelled.").wait_for()
        assert "Done." in TOKENIZER.decode(service.asked[-1][0])


@needs_browser
def test_a_wav_file_holds_the_samples(browser: Any) -> None:
    with served(app(voice(), FakeService())) as url, open_page(browser, url) as page:
        encoded = page.evaluate(
            """async () => {
                const { wavOf, toBase64 } = await import("/web/speech.js");
                const samples = Float32Array.from({ length: 48000 }, (_, i) => 2 * (i % 3) - 0.5);
                return toBase64(wavOf(samples, 48000));
            }"""
        )
    with wave.open(io.BytesIO(base64.b64decode(encoded))) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes())
        assert form == (16000, 1, 2, 16000)
        assert set(memoryview(file.readframes(16000)).cast("h")) == {32767}


@needs_browser
@needs_espeak
def test_a_spoken_request_is_heard_and_its_answer_spoken(browser: Any) -> None:
    heard: list[tuple[int, int]] = []

    def hear(path: str) -> str:
        with wave.open(path) as file:
            samples = memoryview(file.readframes(file.getnframes())).cast("h")
            heard.append((len(samples), max(samples)))
        return "turn on the kitchen light"

    panel = voice(hear, recogniser="mine")
    with served(app(panel, FakeService(LIGHT))) as url, open_page(browser, url) as page:
        page.get_by_role("button", name="Record").click()
        end = page.get_by_role("button", name="End the recording")
        end.wait_for()
        page.wait_for_timeout(1000)
        with page.expect_response("**/api/task/speak") as spoken:
            end.click()
        assert spoken.value.ok
        page.locator(".task").get_by_text("Turning on the kitchen light.").wait_for()
        page.get_by_role("article", name="You").get_by_text("turn on the kitchen light").wait_for()
    [(count, loudest)] = heard
    assert count > 8000 and loudest > 1000
