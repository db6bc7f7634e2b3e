"""The routes of the labelling page."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gearshift.data.formats import PromptExample
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.guard import person_key
from gearshift.serve.labelling.items import item_of_row, make_item, rollout_items
from gearshift.serve.labelling.routes import LabelSettings, label_routes
from gearshift.serve.labelling.store import LabelStore

PAGE = {"X-Gearshift": "1"}
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\ud800"


def prompts(count: int) -> list[PromptExample]:
    return [PromptExample([{"role": "user", "content": f"ask {i}"}]) for i in range(count)]


async def sample(prompt: PromptExample) -> list[tuple[Any, dict[str, Any]]]:
    """Two answers; some prompts fail, and some get the same answer twice."""
    asked = prompt.prompt[-1]["content"]
    if asked == "ask 1":
        raise RuntimeError("no memory")
    if asked == "ask 2":
        return [("same", {"model": "m"})] * 2
    if asked == "ask 3":
        await asyncio.sleep(60)
    return [(f"one to {asked}", {"model": "secret-a"}), (HOSTILE, {"model": "secret-b"})]


class Page:
    """A client that labels as the page does."""

    def __init__(self, client: TestClient, store: LabelStore) -> None:
        self.client, self.store, self.count = client, store, 0

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(f"/api/labels/{path}", json=body, headers=PAGE)

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(f"/api/labels/{path}", headers=headers)

    def next(self, who: str, count: int = 1, tab: str = "t") -> Any:
        return self.post("next", who=who, tab=tab, count=count).json()

    def label(
        self, who: str, of: Any, choice: Any = "left", kind: str = "pair", /, **more: Any
    ) -> Any:
        self.count += 1
        event = {"id": f"label-{self.count:05}", "who": who, "tab": "t", "item": of["item"]}
        event |= {"kind": kind, "choice": choice, "shown": of["shown"], "seconds": 2}
        return self.post("events", **{**event, **more})


@contextmanager
def serving(
    folder: Path, of: list[PromptExample], sampler: Any = sample, server: Any = None, **how: Any
) -> Iterator[Page]:
    with LabelStore(folder, "test") as store:
        for number in range(how.pop("pairs", 0)):
            asked = [{"role": "user", "content": f"pair {number}"}]
            store.add_item(make_item(asked, ["good", "bad"], [{"model": "x"}, {"model": "y"}]))
        routes = label_routes(store, sampler, LabelSettings(**how), of)
        app = make_app(routes, server or ServerSettings())
        where = {"base_url": "http://127.0.0.1:8000", "client": ("127.0.0.1", 5)}
        with TestClient(app, **where) as client:
            yield Page(client, store)


def wait_for(page: Page, who: str, count: int) -> list[Any]:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = page.next(who, count)
        if len(found["items"]) >= count or found["state"] != "more":
            return list(found["items"])
        time.sleep(0.01)
    raise AssertionError("no items came")


def test_answers_are_sampled_ahead_and_come_blind(tmp_path: Path) -> None:
    with serving(tmp_path, prompts(1)) as page:
        [item] = wait_for(page, "ann", 1)
        assert {HOSTILE, "one to ask 0"} == set(item["answers"])
        assert "secret" not in json.dumps(item), "people do not see which model wrote what"
        assert page.label("ann", item).json() == {
            "id": "label-00001",
            "stored": True,
            "item": None,
        }
        assert page.next("ann")["state"] == "done"
        [row] = map(json.loads, page.get("export?format=preference").text.splitlines())
        assert row["chosen"] == item["answers"][0], "what was on the left when ann chose it"
        assert row["source"]["chosen"]["model"].startswith("secret")


def test_a_sampling_that_fails_skips_the_item_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gearshift.serve.labelling.sampling.Feeder.__init__.__defaults__", (0.05,))
    with serving(tmp_path, prompts(6)) as page:
        items = wait_for(page, "ann", 3)
        assert len(items) == 3
        for item in items:
            page.label("ann", item)
        assert page.next("ann", 5)["state"] == "done", "no endless wait"
        sampling = page.get("owner").json()["sampling"]
        assert (sampling["failed"], sampling["same"], sampling["more"]) == (2, 1, False)


def test_prompts_that_were_asked_before_are_not_asked_again(tmp_path: Path) -> None:
    with serving(tmp_path, prompts(1)) as page:
        [item] = wait_for(page, "ann", 1)
        page.label("ann", item)
    with serving(tmp_path, prompts(1)) as page:
        assert page.next("ann") == {"items": [], "left": 0, "state": "done"}
        assert page.next("bob")["items"] == []


def test_undo_brings_the_item_back_without_bound(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=3) as page:
        given = []
        for _ in range(3):
            [item] = page.next("ann")["items"]
            given.append((page.label("ann", item).json()["id"], item["item"]))
        for name, item in reversed(given):
            assert page.get("progress?who=ann").json()["last"] == name
            undo = {"id": f"undo-{name}", "kind": "undo", "who": "ann", "tab": "t"}
            found = page.post("events", **undo, undoes=name).json()
            assert found["item"]["item"] == item
            assert page.post("events", **undo, undoes=name).json()["stored"] is False
            assert page.next("ann")["items"][0]["item"] == item
        assert page.get("export?format=preference").text == ""
        assert page.get("progress?who=ann").json()["labelled"] == 0
        other = {"id": "undo-other", "kind": "undo", "who": "bob", "undoes": given[0][0]}
        assert page.post("events", **other).status_code == 404


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"choice": "first"}, "choice"),
        ({"choice": None}, "choice"),
        ({"kind": "thumb", "choice": "up"}, "kind"),
        ({"kind": "vote"}, "kind"),
        ({"id": "../../x"}, "id"),
        ({"who": " "}, "who"),
        ({"who": "a\u202eb"}, "who"),
        ({"item": "none"}, "item"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"edit": {"answer": 2, "text": "x"}}, "edit"),
        ({"edit": {"answer": 0, "text": " "}}, "edit"),
        ({"edit": {"answer": 0, "text": "x" * 70000}}, "edit"),
        ({"reason": {"text": "x" * 5000}}, "reason"),
        ({"reason": {"tags": ["x"] * 50}}, "reason"),
        ({"reason": "good"}, "reason"),
        ({"shown": None}, "shown"),
        ({"shown": {"left": 0, "right": 0, "order_seed": 0}}, "shown"),
        ({"kind": "edit"}, "edit"),
        ({"kind": "undo", "undoes": 3}, "undoes"),
    ],
)
def test_a_wrong_label_is_refused_by_its_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    with serving(tmp_path, [], None, pairs=1) as page:
        [item] = page.next("ann")["items"]
        answer = page.label("ann", item, **change)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == field
        assert len(page.store.labels.events) == 1


def test_swapped_sides_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=1) as page:
        [item] = page.next("ann")["items"]
        sides = item["shown"]
        item["shown"] = {**sides, "left": sides["right"], "right": sides["left"]}
        assert page.label("ann", item).json()["error"]["param"] == "shown"


def test_only_a_page_of_this_server_may_write(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=1) as page:
        before, path = page.store.file.read_bytes(), "/api/labels/events"
        send = page.client.post
        plain, foreign = {"content-type": "text/plain"}, {**PAGE, "origin": "https://a.b"}
        assert send(path, data={"id": "label-1"}).status_code == 415
        assert send(path, content="{}", headers=plain).status_code == 415
        assert send(path, json={}).status_code == 403
        assert send(path, json={}, headers=foreign).status_code == 403
        assert page.store.file.read_bytes() == before


def test_the_owner_s_view_is_the_owner_s(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=1, owner_key="k3y-of-owner") as page:
        for path in ("owner", "export?format=preference"):
            assert page.get(path).json()["error"]["code"] == "forbidden_owner"
            assert page.get(path, **{"x-gearshift-owner": "no"}).status_code == 403
            assert page.get(path, **{"x-gearshift-owner": "k3y-of-owner"}).status_code == 200
        assert page.post("final").status_code == 403
    with serving(tmp_path / "b", [], None, pairs=1) as page:
        assert page.get("owner").status_code == 200
        assert page.get("owner", **{"x-forwarded-for": "9.9.9.9"}).status_code == 403


def test_disagreements_are_decided_by_the_owner(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=1, overlap=1.0) as page:
        for who, answer in (("ann", "good"), ("bob", "bad")):
            [item] = page.next(who)["items"]
            side = "left" if item["answers"][0] == answer else "right"
            reason = {"text": f"{who} says", "tags": []}
            assert page.label(who, item, side, reason=reason).status_code == 200
        view = page.get("owner").json()
        assert (view["items"], view["labelled"], view["twice"], view["percent"]) == (1, 1, 1, 0)
        assert view["kappa"][0]["people"] == ["ann", "bob"]
        [dispute] = view["disagreements"]
        assert dispute["reasons"]["ann"]["text"] == "ann says"
        assert page.get("export?format=preference").text == ""
        side = ("left", "right")[dispute["answers"].index("good")]
        final = {"id": "final-0001", "who": "boss", "item": dispute["item"], "kind": "pair"}
        assert page.post("final", **final, choice=side, seconds=0).json()["stored"]
        [row] = map(json.loads, page.get("export?format=preference").text.splitlines())
        assert (row["chosen"], row["agreement"]) == ("good", 0.5)
        assert page.get("owner").json()["disagreements"] == []
        again = page.post("events", **final, choice=side, seconds=0, final=True)
        assert again.json()["stored"] is False


def test_nobody_can_make_a_label_final_but_the_owner(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=1) as page:
        [item] = page.next("ann")["items"]
        page.label("ann", item, final=True)
        assert page.store.labels.final(item["item"]) is None


def test_labels_hold_no_path_no_cookie_and_no_address(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    where = type("Row", (dict,), {"where": f"{tmp_path}/secret/rows.jsonl, line 1"})(row)
    with serving(tmp_path / "labels", [], None) as page:
        page.store.add_item(item_of_row(where))
        page.client.cookies.set("gearshift-8000", "canary-cookie")
        [item] = page.next("ann")["items"]
        page.label("ann", item, canary="canary-field")
        text = page.store.file.read_text()
        assert "rows.jsonl, line 1" in text
        for word in (str(tmp_path), "secret", "canary", "127.0.0.1", "testclient"):
            assert word not in text, word


def test_ratings_and_thumbs_have_one_answer(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, criteria=("help", "true")) as page:
        page.store.add_item(item_of_row({"prompt": "a", "completion": "b"}))
        [item] = page.next("ann")["items"]
        assert item["answers"] == ["b"]
        for wrong in (3, {"help": 3}, {"help": 3, "true": 6}, {"help": 3, "true": 2.5}):
            assert page.label("ann", item, wrong, "rating").status_code == 400
        good = {"help": 5, "true": 4}
        assert page.label("ann", item, good, "rating").status_code == 200
        assert page.get("owner").json()["ratings"]["help"]["items"] == 0
        assert page.get("export?format=judged").json()["label"] is True


def test_known_items_show_each_person_s_rate_to_the_owner_alone(tmp_path: Path) -> None:
    with serving(tmp_path, [], None, pairs=60) as page:
        for i in range(6):
            known = {"prompt": f"known {i}", "chosen": "right", "rejected": "wrong"}
            page.store.add_item(item_of_row(known, known=True))
        for _ in range(60):
            [item] = page.next("ann")["items"]
            assert "gold" not in json.dumps(item)
            page.label("ann", item, "left" if "right" in item["answers"][:1] else "right")
        assert "known" not in page.get("progress?who=ann").json()
        [person] = page.get("owner").json()["people"]
        assert person["known"]["of"] >= 2
        assert person["known"]["right"] == person["known"]["of"]
        rows = page.get("export?format=preference").text
        assert "known" not in rows and rows


def test_a_run_s_episodes_become_pairs() -> None:
    asked = {"role": "user", "content": "q"}
    said = [[asked, {"role": "assistant", "content": text}] for text in ("a", "a", "b", "c")]
    episodes = [{"group_id": 0, "messages": m} for m in said]
    episodes += [{"group_id": 1, "messages": said[0]}, {"group_id": 2}]
    [item] = rollout_items([{"step": 4, "episodes": episodes}], "runs/x")
    assert item.prompt == [asked] and set(map(str, item.answers)) == {"a", "b"}
    assert item.sources[0] == {"model": "runs/x", "step": 4}


def test_t21_a_persons_own_key_labels_in_that_name_and_opens_nothing_else(tmp_path: Path) -> None:
    keyed = ServerSettings(key="the server's", people=("Ann", "Ben"))
    ann = person_key("the server's", "Ann")
    with serving(tmp_path, [], None, keyed, pairs=2) as page:
        client, own = page.client, {"Authorization": f"Bearer {ann}", **PAGE}

        def status(path: str, who: str, headers: dict[str, str]) -> int:
            body = {"who": who, "tab": "t", "count": 1}
            return client.post(path, json=body, headers=headers).status_code

        assert status("/api/labels/next", "Ann", PAGE) == 401
        assert status("/api/labels/next", "Ann", own) == 200
        refused = client.post("/api/labels/next", json={"who": "Ben"}, headers=own)
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "forbidden_person"
        for path in ("events", "exchange", "leave"):
            assert status(f"/api/labels/{path}", "Ben", own) == 403
        assert client.get("/api/labels/progress?who=Ben", headers=own).status_code == 403
        assert client.get("/api/labels/progress?who=Ann", headers=own).status_code == 200
        for path in ("/api/labels/owner", "/api/labels/export?format=preference", "/metrics"):
            assert client.get(path, headers=own).status_code == 401
        assert status("/api/labels/final", "Ann", own) == 401
        # The page gives the key once, and the cookie is good for the same and no more.
        given = client.post("/api/key", json={"key": ann}, headers=PAGE)
        assert given.status_code == 204 and "HttpOnly" in given.headers["set-cookie"]
        assert status("/api/labels/next", "Ann", PAGE) == 200
        assert status("/api/labels/next", "Ben", PAGE) == 403
        assert client.get("/api/labels/owner").status_code == 401
        wrong = client.post("/api/key", json={"key": person_key("x", "Ann")}, headers=PAGE)
        assert wrong.status_code == 401
        both = {"Authorization": "Bearer the server's", **PAGE}
        assert status("/api/labels/next", "Ben", both) == 200
