"""Labels of people train a reward model, as a file and as they are."""

from pathlib import Path
from typing import Any

import pytest

from gearshift.cli.main import main
from gearshift.data.formats import to_preference, to_supervised, to_unpaired
from gearshift.data.labels import Labels, label_rows, read_events, rows_text
from gearshift.pipeline.check import check_recipe
from gearshift.pipeline.provenance import trained_on
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.digests import file_digest
from gearshift.serve.labelling.items import make_item
from gearshift.serve.labelling.store import LabelStore

ASKED = ["turn on the light", "close the blinds", "set the heat to 20", "play music"]


def labelled(folder: Path) -> Path:
    """Labels of three people: pairs, a thumb, a tie, an edit, and one taken back."""
    shown = {"left": 1, "right": 0, "order_seed": 0}
    with LabelStore(folder / "labels", "test") as store:

        def give(number: int, item: str, kind: str, **more: Any) -> None:
            event = {"id": f"label-{number:04}", "kind": kind, "item": item, "who": "ann"}
            store.add({**event, "choice": None, "shown": shown, "seconds": 1.0, **more})

        for i, text in enumerate(ASKED):
            prompt = [{"role": "user", "content": text}]
            pair = make_item(prompt, [f"{i} yes", f"{i} no"], [{"model": "a"}, {"model": "b"}])
            store.add_item(pair)
            better = "left" if pair.answers[1].endswith("no") else "right"
            give(i, pair.id, "pair", choice="tie" if i == 3 else better)
            thumb = make_item(prompt, [f"{i} alone"], [{"model": "a"}])
            store.add_item(thumb)
            edit = {"answer": 0, "text": f"{i} done"}
            give(10 + i, thumb.id, "thumb", choice="up", edit=edit)
        store.add({"id": "undo-0001", "kind": "undo", "who": "ann", "item": pair.id,
                   "undoes": "label-0002"})  # fmt: skip
        return store.file


def test_t52_every_format_is_read_by_its_stage(tmp_path: Path) -> None:
    labels = Labels(read_events(labelled(tmp_path))[0])
    pairs = list(map(to_preference, label_rows(labels, "preference")))
    assert [p.chosen for p in pairs] == ["0 no", "0 done", "1 no", "1 done", "2 done", "3 done"]
    assert len(list(map(to_unpaired, label_rows(labels, "judged")))) == 8
    assert len(list(map(to_supervised, label_rows(labels, "messages")))) == 4
    assert len(list(map(to_preference, label_rows(labels, "preference", ties=True)))) == 7


def test_t52_a_reward_model_is_trained_from_an_export_as_from_the_labels(tmp_path: Path) -> None:
    events = labelled(tmp_path / "other")
    rows = label_rows(Labels(read_events(events)[0]), "preference")
    (tmp_path / "pairs.jsonl").write_text(rows_text(rows), encoding="utf-8")
    made = []
    for i, path in enumerate((tmp_path / "pairs.jsonl", f"labels:{tmp_path / 'other'}")):
        words = ["sft=null", "model.name=tiny", "reward.batch_size=2", "reward.heldout.sources=[]"]
        words += [f"run.dir={tmp_path / str(i)}", f"reward.data.sources.0.path={path}"]
        main(["reward", "voice_assistant", *words])
        made.append(file_digest(tmp_path / str(i) / "reward" / "model.safetensors"))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("stage", "section"),
    [
        ("sft", {}),
        ("reward", {}),
        ("preference", {"loss": "kto"}),
        ("preference", {"loss": "dpo"}),
    ],
)
def test_a_dry_run_reads_labels_as_the_stage_does(
    tmp_path: Path, stage: Any, section: dict[str, Any]
) -> None:
    labelled(tmp_path)
    data = {"sources": [{"path": f"labels:{tmp_path}"}]}
    tree = {"run": {"dir": "x"}, "model": {"name": "tiny"}, stage: {"data": data, **section}}
    check_recipe(Recipe.model_validate(tree), [stage])


def test_a_run_knows_which_prompts_of_the_labels_it_trains_on(tmp_path: Path) -> None:
    labelled(tmp_path)
    data = {"sources": [{"path": f"labels:{tmp_path}", "limit": 2}]}
    tree = {"run": {"dir": "x"}, "model": {"name": "tiny"}, "preference": {"data": data}}
    trained = trained_on(tmp_path, Recipe.model_validate(tree), begun=False)
    assert [prompt[-1]["content"] for prompt in trained.prompts] == ASKED[:1] * 2
    tree["preference"] = {"data": data, "loss": "kto"}
    trained = trained_on(tmp_path, Recipe.model_validate(tree), begun=False)
    assert [prompt[-1]["content"] for prompt in trained.prompts] == ASKED[:1] * 2
    tree = {**tree, "preference": None, "sft": {"data": data}}
    trained = trained_on(tmp_path, Recipe.model_validate(tree), begun=False)
    assert [prompt[-1]["content"] for prompt in trained.prompts] == ASKED[:2]
