"""What a run trained on is never what it is evaluated on; test rows have a place of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearshift.cli.main import main
from gearshift.data.sources import source_digest
from gearshift.errors import DataError, StorageError
from gearshift.pipeline.provenance import Trained, run_of, trained_on
from gearshift.pipeline.recipe import Recipe
from gearshift.pipeline.task_data import problems_of
from gearshift.runtime.config import load
from gearshift.runtime.digests import write_sealed

REWARD = "def right(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"


def sums(first: int, last: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 = ?", "completion": str(i + 1)} for i in range(first, last)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(folder: Path, name: str, **keys: Any) -> Path:
    tree = {
        "run": {"dir": str(folder / name)},
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu", "threads": 1},
        "task": {"name": "data", "reward": f"{folder / 'rewards.py'}:right", **keys.pop("task")},
        "eval": {"max_new_tokens": 2},
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 40 sums: 24 of them trained on."""
    folder = tmp_path_factory.mktemp("heldout")
    (folder / "rewards.py").write_text(REWARD)
    source = write(folder / "sums.jsonl", sums(0, 40))
    task = {"train": [{"path": source}], "validation": 0.2, "test": 0.2}
    sft = {"data": {"sources": [{"path": "task:labelled"}]}, "epochs": 1}
    main(["run", str(recipe(folder, "run", task=task, sft=sft))])
    return folder


def test_rows_that_the_run_trained_on_are_left_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = [{"prompt": "A word, please.", "completion": "word"}]
    rows = [{"prompt": r["prompt"].upper()} for r in sums(0, 40)] + [{"prompt": "Another word?"}]
    task = {
        "train": [{"path": write(place / "fresh.jsonl", fresh)}],
        "validation": write(place / "all.jsonl", rows),
        "test": write(place / "one.jsonl", [{"prompt": "The last word?"}]),
        "system": "Be brief.",
    }
    other = recipe(place, "other", task=task)
    main(["eval", str(place / "run"), "--recipe", str(other)])
    out = " ".join(capsys.readouterr().out.split())
    assert "validation: 24 of 41 rows left out, for" in out
    found = json.loads((place / "run/eval/other/validation/sft.json").read_text())
    assert (found["episodes"], found["left_out"]) == (17, 24)
    rows = [json.loads(line) for line in (place / "run/data/train.jsonl").open()]
    trained = {row["prompt"][0]["content"] for row in rows}
    asked = {sample["prompt"].casefold() for sample in found["samples"]}
    assert len(asked) == 17 and not asked & {text.casefold() for text in trained}
    # A stage's own folder knows its run too.
    main(["eval", str(place / "run/sft"), "--recipe", str(other), f"run.dir={place / 'alone'}"])
    alone = json.loads((place / "alone/eval/alone/validation/sft.json").read_text())
    assert alone["samples"] == found["samples"]


def test_a_stage_that_reads_the_whole_file_takes_its_rows_from_the_evaluation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task cuts the file into splits, but SFT reads some of it past the task."""
    task = {"train": [{"path": str(place / "sums.jsonl")}], "validation": 0.5, "test": 0.2}
    sft = {"data": {"sources": [{"path": write(place / "some.jsonl", sums(0, 20))}]}}
    made = recipe(place, "leaky", task=task, sft=sft)
    main(["run", str(made)])
    record = json.loads((place / "leaky/validation/base.json").read_text())
    assert 0 < record["left_out"] < 20 and record["episodes"] == 20 - record["left_out"]
    assert f"{record['left_out']} rows left out as trained on" in capsys.readouterr().out
    assert all(int(s["prompt"].split()[0]) >= 20 for s in record["samples"])
    main(["eval", str(place / "leaky"), "--split", "test"])
    tested = json.loads((place / "leaky/test/sft.json").read_text())
    assert all(int(s["prompt"].split()[0]) >= 20 for s in tested["samples"])
    whole = {"data": {"sources": [{"path": str(place / "sums.jsonl")}]}}
    with pytest.raises(SystemExit):
        main(["run", str(recipe(place, "all", task=task, sft=whole))])
    assert "trains on all 20 validation rows" in capsys.readouterr().err


def test_a_run_that_trained_on_all_of_it_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [json.loads(line) for line in (place / "run/data/train.jsonl").open()]
    task = {
        "train": [{"path": write(place / "few.jsonl", [{"prompt": "Nothing", "completion": ""}])}],
        "validation": write(place / "known.jsonl", known),
        "test": write(place / "else.jsonl", [{"prompt": "The last word?"}]),
        "clean": {"drop_empty": False},
    }
    other = recipe(place, "known", task=task)
    with pytest.raises(SystemExit):
        main(["eval", str(place / "run"), "--recipe", str(other)])
    assert "trains on all 24 validation rows" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--recipe", "sums.yaml"]])
def test_a_folder_that_is_not_there_is_named(
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.yaml").write_text("task: {name: data, train: [{path: sums.jsonl}]}")
    with pytest.raises(SystemExit):
        main(["eval", "runs/nowhere", "--split", "test", *more])
    out, err = capsys.readouterr()
    assert err == "gearshift: There is no folder runs/nowhere; check the path.\n" and not out


def test_test_rows_have_a_place_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "run"
    assert not (run / "test").exists(), "a run looks at validation only"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout_detail"]["sft"]["split"] == "validation"
    main(["eval", str(run), "--split", "test"])
    assert "choose no setting by what they say" in capsys.readouterr().out
    both = [json.loads((run / split / "sft.json").read_text()) for split in ("validation", "test")]
    asked = [{sample["prompt"] for sample in record["samples"]} for record in both]
    assert [len(texts) for texts in asked] == [8, 8] and not asked[0] & asked[1]


def test_a_run_of_before_the_splits_says_so(place: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "data").mkdir(parents=True)
    (old / "recipe.yaml").write_text((place / "run/recipe.yaml").read_text())
    write(old / "data/train.jsonl", sums(0, 3))
    (old / "data/done.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["eval", str(old)])


def test_what_every_stage_read_is_known(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "p?", "chosen": "a", "rejected": "b"}]
    keys = {
        "preference": {"data": {"sources": [{"path": write(tmp_path / "pairs.jsonl", pairs)}]}},
        "rl": {},
        "model": {"name": str(place / "run/sft")},
        "task": {"name": "data", "train": [{"path": "x.jsonl"}], "reward": "r.py:f"},
        "run": {"dir": str(tmp_path / "later")},
    }
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(keys))
    later, made = tmp_path / "later", load(Recipe, tmp_path / "later.yaml")
    (later / "data").mkdir(parents=True)
    rows = [{"prompt": "q?", "cluster": "c"}]
    write(later / "data" / "train.jsonl", rows)
    first = {p[-1]["content"] for p in trained_on(later, made).prompts}
    assert first == {r["prompt"] for r in sums(0, 40)} & first and len(first) == 24, (
        "what it went on from; its own stages have not begun"
    )
    for stage in ("preference", "rl"):
        (later / stage).mkdir()
    found = trained_on(later, made)
    assert {p[-1]["content"] for p in found.prompts} == first | {"p?", "q?"}
    assert found.unseen([{"prompt": "r?", "cluster": "c"}, {"prompt": "Q?"}], "cluster") == []
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(DataError, match="trained on is not known, so neither is what it has not"):
        trained_on(later, made)


def test_a_part_of_a_stage_knows_its_run(place: Path) -> None:
    (place / "run/sft/adapter").mkdir(exist_ok=True)
    for part in ("run", "run/sft", "run/sft/adapter"):
        assert run_of(place / part) == place / "run"
    assert run_of(place / "nothing/sft") is None and run_of(Path("tiny")) is None


def test_problems_are_named_by_the_task_or_by_equal_prompts() -> None:
    rows = [
        {"prompt": "a", "template": "t"},
        {"prompt": "b", "template": "t"},
        {"prompt": "A ", "template": None},
        {"prompt": "c"},
        {"prompt": "c"},
        {"prompt": [], "template": "u"},
        {"prompt": [], "template": "v"},
    ]
    assert problems_of(rows, "template") == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 5, 6: 6}
    assert Trained(Path("r"), [], frozenset()).unseen(rows, "template") == list(range(7))


def test_a_source_that_is_not_what_a_stage_learned_from_is_told(place: Path) -> None:
    """Else rows that were learned from would count as unseen."""
    folder, source = place / "own", place / "some_sums.jsonl"
    (folder / "sft").mkdir(parents=True)
    write(source, sums(0, 5))
    made = {"made_from": {str(source): source_digest(str(source))}}
    write_sealed(folder / "sft" / "done.json", made)
    changes = [f"run.dir={folder}", f"sft.data.sources=[{{path: '{source}'}}]"]
    own = load(Recipe, None, changes)
    assert len(trained_on(folder, own).prompts) == 5
    write(source, sums(4, 9))
    with pytest.raises(StorageError, match=r"some_sums\.jsonl is not what .*sft was made from"):
        trained_on(folder, own)
