"""The user's files are, for each stage, what they were when the run began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gearshift.errors import StorageError
from gearshift.pipeline.given import Given
from gearshift.pipeline.provenance import (
    check_functions,
    check_sources,
    functions_of,
    made_from,
    record_sources,
)
from gearshift.pipeline.recipe import Recipe, StageName
from gearshift.pipeline.run import Run
from gearshift.runtime.config import load
from gearshift.runtime.files import write_json
from gearshift.trainers.callbacks import Callbacks

NAMES: tuple[StageName, ...] = ("sft", "reward", "rl")
FILES = ["rows.jsonl", "pairs.jsonl", "heldout.jsonl", "mixed.jsonl", "teacher/config.json"]
REWARD = "def one(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"


def lay_out(folder: Path) -> Recipe:
    """A recipe whose stages read files of the user; its folder is `run`, in which nothing is."""
    row, pair = {"completion": "on"}, {"chosen": "on", "rejected": "off"}
    for name in ("rows", "pairs", "heldout", "mixed"):
        answers = pair if name in ("pairs", "heldout") else row
        lines = [json.dumps({"prompt": f"Lamp {i}?", **answers}) + "\n" for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text("{}")
    (folder / "run").mkdir()

    def data(name: str) -> str:
        return f"[{{path: '{folder / name}.jsonl'}}]"

    return load(Recipe, None, [
        "model={name: tiny, dtype: float32, device: cpu, threads: 1}", f"run.dir={folder / 'run'}",
        f"sft.data.sources={data('rows')}", f"reward.data.sources={data('pairs')}",
        f"reward.heldout.sources={data('heldout')}", f"rl.sft_mix.data.sources={data('mixed')}",
        f"rl.kl.reference={folder / 'teacher'}",
        f"rl.rewards=[{{source: '{folder / 'rewards.py'}:one'}}]",
    ])  # fmt: skip


def change(path: Path) -> str:
    """Change a file of the user; returns what it was."""
    before = path.read_text()
    path.write_text(before + ("\n" if path.suffix != ".py" else "# repaired\n"))
    return before


@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_with_the_files_that_it_began_with(tmp_path: Path, name: str) -> None:
    recipe, run = lay_out(tmp_path), tmp_path / "run"
    record_sources(run, recipe, NAMES)
    change(tmp_path / name)
    record_sources(run, recipe, NAMES)  # nothing is made of it yet
    write_json(run / "data" / "done.json", {})
    before = change(tmp_path / name)
    with pytest.raises(StorageError, match=rf"{name} changed since .*put it back .*sources\.json"):
        record_sources(run, recipe, NAMES)
    (tmp_path / name).write_text(before)
    record_sources(run, recipe, NAMES)
    change(tmp_path / name)
    (run / "sources.json").unlink()  # the way out
    record_sources(run, recipe, NAMES)
    record_sources(run, recipe, NAMES)


@pytest.mark.parametrize("name", ["mixed.jsonl", "teacher/config.json", "rewards.py"])
def test_a_stage_begins_with_the_files_that_the_run_began_with(tmp_path: Path, name: str) -> None:
    recipe, run = lay_out(tmp_path), tmp_path / "run"
    assert recipe.rl
    record_sources(run, recipe, NAMES)
    change(tmp_path / name)
    now = made_from(recipe.rl, None, run) | functions_of(recipe.rl, recipe)
    with pytest.raises(StorageError, match=f"{name} changed since the run"):
        check_sources(run, run / "rl", now)
    write_json(run / "rl" / "begun.json", {})  # such a stage compares its own record
    check_sources(run, run / "rl", now)


def test_a_reward_function_may_be_repaired_between_two_starts(tmp_path: Path) -> None:
    recipe, run = lay_out(tmp_path), tmp_path / "run"
    assert not record_sources(run, recipe, NAMES)
    write_json(run / "data" / "done.json", {})
    write_json(run / "rl" / "begun.json", {})
    change(tmp_path / "rewards.py")
    assert record_sources(run, recipe, NAMES) == f"{tmp_path / 'rewards.py'} changed"
    assert not record_sources(run, recipe, NAMES)
    check_functions(run, recipe)


def test_no_policy_is_measured_by_a_function_that_changed_while_the_run_works(
    tmp_path: Path,
) -> None:
    recipe = lay_out(tmp_path)
    task = {"name": "data", "train": [{"path": str(tmp_path / "rows.jsonl")}], "validation": 0.25}
    tree = recipe.model_dump(exclude_unset=True, exclude={"reward", "rl"})
    tree["task"] = {**task, "test": 0.25, "reward": f"{tmp_path / 'rewards.py'}:one"}
    tree["sft"] = {"data": {"sources": [{"path": "task:labelled"}]}}
    meanwhile = Callbacks(on_step=lambda *_: change(tmp_path / "rewards.py"))
    with pytest.raises(StorageError, match=r"rewards\.py changed since the run"):
        Run(Recipe.model_validate(tree), given=Given(callbacks=meanwhile)).execute()
    assert not (tmp_path / "run" / "validation" / "sft.json").exists()


def test_a_file_that_a_later_command_reads_counts_from_then_on(tmp_path: Path) -> None:
    """As pairs that people choose from what the first stage's model wrote."""
    recipe, run = lay_out(tmp_path), tmp_path / "run"
    record_sources(run, recipe, ["sft"])
    write_json(run / "sft" / "done.json", {})
    change(tmp_path / "pairs.jsonl")
    record_sources(run, recipe, ["reward"])
    change(tmp_path / "pairs.jsonl")
    with pytest.raises(StorageError, match=r"pairs\.jsonl changed"):
        record_sources(run, recipe, ["reward"])


def test_a_file_that_changes_while_the_run_works_ends_it(tmp_path: Path) -> None:
    def run(echo: Callable[[str], None]) -> None:
        Run(recipe.model_copy(update={"rl": None}), echo).execute()

    def meanwhile(line: str) -> None:
        if line.startswith("data:") and "rows.jsonl" in line:
            kept.append(change(tmp_path / "pairs.jsonl"))

    recipe, kept = lay_out(tmp_path), list[str]()
    with pytest.raises(StorageError, match=r"pairs\.jsonl changed since the run"):
        run(meanwhile)
    assert not (tmp_path / "run" / "reward").exists()
    (tmp_path / "pairs.jsonl").write_text(kept[0])
    lines: list[str] = []
    run(lines.append)
    assert any(line.startswith("sft: done before") for line in lines)
    assert (tmp_path / "run" / "reward" / "done.json").exists()
