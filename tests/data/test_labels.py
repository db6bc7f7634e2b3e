"""The rows that labels of people give."""

import json
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import to_preference, to_supervised, to_unpaired
from gearshift.data.formats import PreferenceExample, UnpairedExample
from gearshift.data.labels import Labels, item_id, label_rows
from gearshift.data.sources import is_on_hub, load_rows, source_digest
from gearshift.errors import DataError

PROMPT = [{"role": "user", "content": "ask"}]
A, B = {"model": "a"}, {"model": "b"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def item(*answers: Any, **more: Any) -> dict[str, Any]:
    name = item_id(PROMPT, answers)
    event = {"id": f"item-{name}", "t": 0, "kind": "item", "item": name, "who": "", "app": "x"}
    sources = [A, B][: len(answers)]
    return {**event, "prompt": PROMPT, "answers": list(answers), "source": sources, **more}


def label(of: dict[str, Any], who: str, choice: Any, kind: str = "pair", **more: Any) -> Any:
    number = more.pop("number", 0)
    event = {"id": f"{who}-{kind}-{number}-{of['item']}", "t": 0, "kind": kind, "who": who}
    shown = {"left": 0, "right": 1, "order_seed": 0}
    return {**event, "item": of["item"], "choice": choice, "shown": shown, "app": "x", **more}


def rows(*events: dict[str, Any], **how: Any) -> list[dict[str, Any]]:
    return list(label_rows(Labels(events), how.pop("format", "preference"), **how))


PAIR = item("first", "second")


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("choice", ["left", "right"])
def test_the_side_that_was_chosen_leads_to_the_answer_that_was_there(
    left: int, right: int, choice: str
) -> None:
    shown = {"left": left, "right": right, "order_seed": 3}
    [row] = rows(PAIR, label(PAIR, "ann", choice, shown=shown))
    better = PAIR["answers"][shown[choice]]
    assert (row["chosen"], row["rejected"]) in (("first", "second"), ("second", "first"))
    assert row["chosen"] == better
    assert row["source"]["chosen"] == (A if better == "first" else B)
    assert (row["labellers"], row["agreement"]) == (["ann"], 1.0)
    assert to_preference(row) == PreferenceExample(PROMPT, row["chosen"], row["rejected"])


def test_ties_and_skips_are_left_out_unless_they_are_asked_for() -> None:
    for choice in ("tie", "bad"):
        events = [PAIR, label(PAIR, "ann", choice)]
        assert not rows(*events)
        assert not rows(*events, format="judged")
        [row] = rows(*events, ties=True)
        assert (row["margin"], row["tie"]) == (0, choice)
        judged = rows(*events, ties=True, format="judged")
        assert [r["label"] for r in judged] == [choice == "tie"] * 2
    assert not rows(PAIR, label(PAIR, "ann", None, "skip"), ties=True)


def test_an_undone_label_gives_no_row() -> None:
    given = label(PAIR, "ann", "left")
    undo = {**label(PAIR, "ann", None, "undo"), "undoes": given["id"]}
    assert not rows(PAIR, given, undo)
    [row] = rows(PAIR, given, undo, label(PAIR, "ann", "right", number=1))
    assert row["chosen"] == "second"


def test_people_who_disagree_give_no_row_until_somebody_decides() -> None:
    events = [PAIR, label(PAIR, "ann", "left"), label(PAIR, "bob", "right")]
    assert not rows(*events)
    [row] = rows(*events, label(PAIR, "owner", "right", final=True))
    assert (row["chosen"], row["agreement"]) == ("second", 0.5)
    assert row["labellers"] == ["ann", "bob", "owner"]


def test_the_least_agreement_and_the_people_can_be_chosen() -> None:
    votes = [label(PAIR, "ann", "left"), label(PAIR, "bob", "left"), label(PAIR, "cid", "right")]
    [row] = rows(PAIR, *votes, min_agree=0.66)
    assert row["agreement"] == 0.6667
    assert not rows(PAIR, *votes, min_agree=0.67)
    [row] = rows(PAIR, *votes, by=["cid"])
    assert row["chosen"] == "second"


def test_thumbs_and_ratings_are_judged() -> None:
    one, rated = item("good"), item("so so")
    stars = {"kind": 4, "true": 1}
    events = [one, label(one, "ann", "up", "thumb"), rated, label(rated, "ann", stars, "rating")]
    found = rows(*events, format="judged")
    assert [(r["completion"], r["label"]) for r in found] == [("good", True), ("so so", False)]
    assert to_unpaired(found[0]) == UnpairedExample(PROMPT, "good", True)
    assert not rows(*events)
    pair = rows(PAIR, label(PAIR, "ann", "right"), format="judged")
    assert [(r["completion"], r["label"]) for r in pair] == [("first", False), ("second", True)]


def test_an_edit_is_a_conversation_and_better_than_what_it_was() -> None:
    call = {"role": "assistant", "content": "old", "tool_calls": [{"function": {"name": "f"}}]}
    asked = [*PROMPT, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    one = item(call, prompt=asked, options={"tools": TOOLS})
    events = [one, label(one, "ann", None, "edit", edit={"answer": 0, "text": "new"})]
    [row] = rows(*events, format="messages")
    assert row["messages"][-1] == {**call, "content": "new"}
    example = to_supervised(row)
    assert getattr(example, "untrained", None) == {1}, "only what the person wrote is trained"
    assert getattr(example, "options", None) == {"tools": TOOLS}
    [row] = rows(*events)
    assert (row["chosen"]["content"], row["rejected"]["content"]) == ("new", "old")
    assert to_preference(row).options == {"tools": TOOLS}


def test_known_items_give_no_rows() -> None:
    assert not rows({**PAIR, "gold": 0}, label(PAIR, "ann", "left"))


def test_a_run_s_labels_are_a_source(tmp_path: Path) -> None:
    one = item("good")
    edit = {"answer": 1, "text": "new"}
    events = [PAIR, label(PAIR, "ann", "left", edit=edit), one, label(one, "ann", "up", "thumb")]
    file = tmp_path / "run" / "labels" / "events.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn": ')
    name = f"labels:{tmp_path / 'run'}"
    assert not is_on_hub(name)
    digest = source_digest(name)
    assert digest == source_digest(str(file))
    assert len(load_rows(name, labels="preference")) == 2
    assert [row["completion"] for row in load_rows(name, labels="judged")] == [
        "first",
        "second",
        "good",
    ]
    assert len(load_rows(str(file), labels="messages")) == 1
    assert len(load_rows(name)) == 4
    (tmp_path / "p.jsonl.labels").symlink_to(file.parent)
    assert len(load_rows(str(tmp_path / "p.jsonl.labels"), labels="messages")) == 1
    with pytest.raises(DataError, match="does not exist, nor does its folder"):
        load_rows(f"labels:{tmp_path / 'none'}")
    file.write_text(json.dumps(PAIR) + "\n")
    assert source_digest(name) != digest
    with pytest.raises(DataError, match="has no labels that give such rows"):
        load_rows(name, labels="preference")


def test_a_user_s_own_events_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert load_rows(str(file))[0]["chosen"] == "b"
