"""The run page in a browser: curves that grow, episodes token by token, hostile texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearshift.data.labels import label_rows
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.labelling.routes import LabelSettings, label_routes
from gearshift.serve.labelling.store import LabelStore
from gearshift.serve.pages import page_routes
from gearshift.serve.runs.routes import run_routes
from tests.serve.browser import needs_browser, open_browser, open_page, serious, served

pytestmark = needs_browser
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></style>"
    "\u202e right to left \ud800 \x1b[31m"
)
BIG = 8192 + 100


def episode(count: int, words: str, **more: Any) -> dict[str, Any]:
    draw = random.Random(count)
    return {
        "group_id": 0,
        "messages": [
            {"role": "user", "content": words},
            {"role": "assistant", "content": words, "tool_calls": [{"function": {"name": words}}]},
        ],
        "prompt_ids": [1, 2],
        "token_ids": [draw.randrange(250) for _ in range(count)],
        "mask": [1] * (count - 1) + [0],
        "reward": count / 10,
        "rewards": {"environment": 1.0, words: 0.5},
        "finish_reason": "stop",
        "logprobs": [-0.5] * (count - 1),
        "trained_logprobs": [-0.5] * (count - 2) + [-2.5],
        "advantages": -0.5,
        "versions": 3,
        "gold": words,
        **more,
    }


def answered(i: int) -> dict[str, Any]:
    """Three have one group and one prompt; two have one group and different prompts."""
    question = "the question" if i < 3 else f"question {i}"
    said = [{"role": "user", "content": question}]
    said.append({"role": "assistant", "content": f"answer {i}"})
    return episode(3, "", group_id=7 if i < 3 else 8, messages=said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        stage = folder / name / "rl"
        (folder / name / "validation").mkdir(parents=True)
        (stage / "checkpoints" / "step-000009").mkdir(parents=True)
        with (stage / "metrics.jsonl").open("w") as file:
            for step in range(20):
                phases = [["generate", 0.0, 1.0], ["train", 1.5, 2.0]]
                record = {"step": step, "reward": step / 20, "step_time": 2.0, "phases": phases}
                if step == 6:
                    record["seconds/save"] = 1.0
                record["left_out/alone"] = float(step >= 9)
                file.write(json.dumps({**record, "kl": None if step == 3 else 0.1}) + "\n")
        lines = [
            {"step": 0, "episodes": [episode(n, f"plain {n}") for n in (3, 9, 6)]},
            {"step": 1, "episodes": [episode(5, HOSTILE), episode(4, "x" * (1 << 20))]},
            {"step": 2, "episodes": [episode(BIG, "long")]},
            {"step": 3, "episodes": [{"reward": 1, "messages": "x"}], "left_out": [{"why": "no"}]},
            {"step": 4, "episodes": [answered(i) for i in range(5)]},
        ]
        (stage / "rollouts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / name / "recipe.yaml").write_text(f"rl: {{lr: {len(name)}, name: {name}}}")
        for policy, value in (("base", 0.0), ("rl", 1.0)):
            sample = {"row": 0, "prompt": HOSTILE, "gold": HOSTILE, "completion": HOSTILE}
            record = {"metric": "reward", "value": value, "interval": [0.1, None], "n": 1}
            record["samples"] = [{**sample, "reward": value}]
            (folder / name / "validation" / f"{policy}.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    routes = run_routes({name: runs / name for name in ("one", "two")})
    routes += page_routes(["runs"])
    with served(make_app(routes, ServerSettings(port=0))) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


def test_t60_curves_of_two_runs_grow_without_a_reload(
    browser: Any, address: str, runs: Path
) -> None:
    path = runs / "two" / "rl" / "metrics.jsonl"
    before = path.read_bytes()
    with open_page(browser, f"{address}/runs") as page:
        reward = page.locator("figure", has_text="Reward")
        reward.get_by_text("two: reward").wait_for()
        assert page.locator("canvas").count() == 2
        with path.open("a") as file:
            file.write('{"step": 20, "reward": 77.5}\n')
        reward.locator("output", has_text="77.5").wait_for(timeout=2000)
        path.write_bytes(before)  # the run is resumed from an earlier step
        with path.open("a") as file:
            file.write('{"step": 20, "reward": 33.5}\n')
        reward.locator("output", has_text="33.5").wait_for()
        path.write_bytes(before)
        page.get_by_role("button", name="Recipes").click()
        page.get_by_text("rl.name").wait_for()
        assert page.locator("tbody tr").count() == 1


def test_charts_share_a_cursor_and_a_zoom_by_mouse_and_by_keys(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs/one?tab=curves") as page:
        charts = page.locator("figure")
        reward, kl = (charts.filter(has_text=name) for name in ("Reward", "KL to the reference"))
        plot = reward.get_by_role("img")
        assert plot.get_attribute("aria-label") == "Reward: reward 0.95"
        plot.press("ArrowLeft")
        assert [chart.locator("output").inner_text() for chart in (reward, kl)] == ["0.9", "0.1"]
        assert kl.locator("figcaption").inner_text() == "KL to the reference step 18"
        for _ in range(15):
            plot.press("ArrowLeft")
        assert [chart.locator("output").inner_text() for chart in (reward, kl)] == ["0.15", ""]
        for _ in range(6):
            plot.press("ArrowRight")
        marked = "KL to the reference step 9, checkpoint, episodes left out"
        assert kl.locator("figcaption").inner_text() == marked
        assert page.locator(".marks li").all_inner_texts() == [
            "▲ checkpoint (1)", "● episodes left out (1)", "■ phase save (1)",
        ]  # fmt: skip
        for _ in range(6):
            plot.press("ArrowLeft")
        plot.press("+")
        for _ in range(15):
            kl.get_by_role("img").press("ArrowRight")
        assert reward.locator("figcaption").inner_text() == "Reward step 7", "the zoom ends there"
        kl.get_by_role("img").press("-")
        box = plot.bounding_box() or {}
        at = [box["x"] + box["width"] * share for share in (0.4, 0.6, 0.9)]
        page.mouse.move(at[0], box["y"] + 50)
        page.mouse.down()
        page.mouse.move(at[1], box["y"] + 50, steps=3)
        page.mouse.up()
        page.mouse.move(at[2], box["y"] + 50)
        kl.get_by_text(re.compile("step (9|10)$")).wait_for()
        page.mouse.dblclick(at[2], box["y"] + 50)
        page.mouse.move(at[2] + 1, box["y"] + 50)
        kl.get_by_text("step 17").wait_for()
        page.mouse.move(1, 1)
        reward.locator("output", has_text="0.95").wait_for()  # no cursor: the newest figure
        page.get_by_label("Logarithmic axis").check()


def test_t61_a_long_run_opens_with_its_first_curves_alone(browser: Any, tmp_path: Path) -> None:
    stage = tmp_path / "rl"
    stage.mkdir()
    others = {f"other/{i}": 0.123 for i in range(50)}
    with (stage / "metrics.jsonl").open("w") as file:
        for step in range(2000):
            file.write(json.dumps({"step": step, "reward": 0.5, "kl": 0.1, **others}) + "\n")
    (stage / "rollouts.jsonl").write_text('{"step": 0, "episodes": []}\n' * 2000)
    found: dict[str, int] = {}
    routes = run_routes({"long": tmp_path}) + page_routes(["runs"])
    with served(make_app(routes, ServerSettings(port=0))) as url, open_page(browser, url) as page:

        def answered(answer: Any) -> None:
            name = answer.url.partition("/api/")[2].partition("?")[0]
            found[name] = int(answer.headers.get("content-length", 0))

        page.on("response", answered)
        page.reload()
        page.locator("canvas").nth(1).wait_for()
        page.get_by_text("All other metrics").wait_for()
        read = {"served", "runs", "runs/long/metrics", "runs/long/live"}
        assert {name for name in found if name} <= read, "no episode is read"
        assert found["runs/long/metrics"] < 2000 * 3 * 5 + 2000, "the other 50 metrics stay there"
        page.get_by_text("other (50)").click()
        page.locator("canvas").nth(51).wait_for()


def test_a_table_is_sorted_filtered_and_searched(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs/one?tab=rollouts&step=0") as page:
        rows = page.locator("tbody tr")
        rows.nth(2).wait_for()
        rewards = page.locator("tbody td:nth-child(5)")
        page.get_by_role("button", name="Worst first").click()
        assert rewards.all_inner_texts() == ["0.3", "0.6", "0.9"]
        page.get_by_role("button", name="reward", exact=True).click()
        assert rewards.all_inner_texts() == ["0.9", "0.6", "0.3"]
        page.get_by_label("Filter").fill("reward<0.5")
        page.get_by_label("Filter").press("Enter")
        page.get_by_text("1 episode", exact=True).wait_for()
        page.get_by_label("Filter").fill('text~"plain 9"')
        page.get_by_label("Search all steps").check()
        page.get_by_text("plain 9").first.wait_for()
        rows.first.get_by_role("checkbox").check()
        link = page.get_by_role("link", name="Export 1 chosen as JSONL")
        assert "pick=0.1" in (link.get_attribute("href") or "")


def test_tokens_are_coloured_and_the_largest_gap_is_found(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs/one?step=2&episode=0") as page:
        tokens = page.locator(".token")
        tokens.first.wait_for()
        assert tokens.count() == 8192, "longer episodes come in windows"
        assert page.locator(".token.given").count() == 2
        page.get_by_role("button", name="Largest").click()
        page.get_by_text(f"Tokens 8192 to {BIG + 1} of {BIG + 2}").wait_for()
        figures = page.locator(".figures")
        assert "sampler minus trainer\n2" in figures.inner_text()
        assert "p4" in (page.locator(".token.chosen").get_attribute("class") or "")
        page.locator(".tokens").press("ArrowRight")
        page.get_by_text("given to the policy").wait_for()
        page.get_by_label("Colour by").select_option("advantages")
        page.locator(".token.n4").first.wait_for()


def test_completions_of_a_prompt_lie_side_by_side_and_a_choice_becomes_a_label(
    browser: Any, runs: Path, tmp_path: Path
) -> None:
    with LabelStore(tmp_path, "a test") as store:
        routes = run_routes({"one": runs / "one"}) + label_routes(store, None, LabelSettings())
        routes += page_routes(["runs"], lambda: {"labels": True})
        with (
            served(make_app(routes, ServerSettings(port=0))) as url,
            open_page(browser, f"{url}/runs/one?step=4&tab=rollouts") as page,
        ):
            page.get_by_role("link", name="Group 7 of step 4").first.click()
            columns = page.locator(".group section")
            columns.nth(2).wait_for()
            assert page.get_by_text("the question", exact=True).count() == 1
            assert ["answer" in text for text in columns.all_inner_texts()] == [True] * 3
            assert serious(page) == []
            columns.nth(1).get_by_label("A").check()
            page.get_by_text("must be two different texts").wait_for()
            columns.nth(2).get_by_label("B").check()
            page.get_by_label("Your name").fill("Ada")
            page.get_by_role("button", name="A is better").click()
            page.get_by_text("Label saved").wait_for()
            columns.nth(0).get_by_label("A").check()
            page.get_by_role("button", name="A is better").wait_for()
            columns.nth(0).get_by_role("link").click()
            page.get_by_role("button", name="Side by side").click()
            columns.nth(2).wait_for()
            page.goto(f"{url}/runs/one?step=4&group=8")
            page.get_by_text("must be two different texts").wait_for()
            assert page.get_by_role("button", name="A is better").count() == 0
        [row] = label_rows(store.labels, "preference")
        assert (row["chosen"], row["rejected"]) == ("answer 1", "answer 2")
        assert row["prompt"] == [{"role": "user", "content": "the question"}]


def test_without_a_labelling_nothing_is_sent_to_labels(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs/one?step=4&group=7") as page:
        page.locator(".group section").nth(2).wait_for()
        assert page.get_by_label("A", exact=True).count() == 0
        assert page.get_by_role("button", name="A is better").count() == 0


PLACES = ("step=1&tab=rollouts", "step=1&episode=0", "tab=timeline", "tab=heldout", "tab=curves")


def shown(page: Any, address: str, place: str) -> None:
    """Go to a place of a run, and wait until it is there."""
    page.goto(f"{address}/runs/one?{place}")
    page.locator("canvas, tbody tr, .token").first.wait_for()


def test_t62_t26_hostile_texts_are_texts_on_every_tab(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs", color_scheme="light") as page:
        for place in PLACES:
            shown(page, address, place)
            if "step" in place or "heldout" in place:
                page.get_by_text("<script>window.hacked").first.wait_for()
            assert page.evaluate("window.hacked") is None
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert serious(page) == [], (place, scheme)


def test_t63_an_episode_of_another_version_shows_what_it_has(browser: Any, address: str) -> None:
    with open_page(browser, f"{address}/runs/one?step=3&episode=0") as page:
        page.get_by_text("The record has no tokens.").wait_for()
        page.get_by_role("button", name="Next").click()
        page.get_by_text("Step 3, episode 1").wait_for()


def test_the_page_fits_a_telephone(browser: Any, address: str) -> None:
    size = {"width": 360, "height": 740}
    with open_page(browser, f"{address}/runs", viewport=size) as page:
        for place in PLACES:
            shown(page, address, place)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, place
