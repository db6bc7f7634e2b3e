"""What a Python call is given by mistake ends in one line; what may be given in several forms means
the same in each.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
import torch

import gearshift
from gearshift.errors import GearshiftError
from gearshift.pipeline.arguments import Arguments, plain
from gearshift.trainers.callbacks import Callbacks
from gearshift.trainers.rl.config import RLConfig

ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(3)]
PROMPTS = [row["prompt"] for row in ROWS]
CUT: dict[str, Any] = {"task.validation": 0.3}
IPO = gearshift.PreferenceConfig(algorithm="ipo")
ENGINE = gearshift.load("tiny", device="cpu")


def one(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def given(data: Any) -> list[dict[str, Any]]:
    return Arguments("sft", "sft").rows(data, "data", "text", "messages")


def written(data: Any) -> str:
    arguments = Arguments("sft", "sft")
    arguments.rows(data, "data", "text", "messages")
    return arguments.files["data"]


def generate(*arguments: Any, **keys: Any) -> list[str]:
    return gearshift.generate(ENGINE, *arguments, **keys)


async def late(step: int, metrics: dict[str, Any]) -> None: ...


class NotAnEnvironment:
    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return "hi", {}


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: generate("hi", max_new_token=4), "did you mean max_new_tokens"),
    (lambda: generate("hi", {"max_new_tokens": 4}), "must be SamplingParams"),
    (lambda: generate(5), "A prompt is 5"),
    (lambda: generate(None), "A prompt is None"),
    (lambda: generate(ROWS), "A prompt is {'prompt'"),
    (lambda: generate([[{"rol": "user"}]]), "must have `role`"),
    (lambda: gearshift.evaluate(ENGINE, ROWS, [one, one]), "one reward"),
    (lambda: gearshift.evaluate(ENGINE, environment="x", reward=one), "leave `reward` out"),
    (lambda: gearshift.evaluate(ENGINE, ROWS, one, split="all"), "there are validation, test"),  # type: ignore[arg-type]
    (
        lambda: gearshift.evaluate(ENGINE, environment=NotAnEnvironment, verbose=False),
        "is not a text environment",
    ),
    (lambda: gearshift.score("tiny", PROMPTS, ["a"]), "3 prompts for 1 completion;"),
    (lambda: gearshift.train_rl("tiny", PROMPTS, one, reward_weights=1.0), "a list"),  # type: ignore[arg-type]
    (lambda: gearshift.train_rl("tiny", PROMPTS, one, "dpo"), "train_rl has no algorithm 'dpo'"),
    (lambda: gearshift.train_dpo("tiny", ROWS, algorithm="grpo"), "it has dpo, cdpo"),
    (
        lambda: gearshift.train_rl("tiny", PROMPTS, one, "grpo", rl=RLConfig(algorithm="ppo")),
        "algorithm is grpo and rl.algorithm is ppo; name one of them",
    ),
    (
        lambda: gearshift.train_dpo("tiny", ROWS, algorithm="dpo", preference=IPO),
        "algorithm is dpo and preference.algorithm is ipo",
    ),
    (
        lambda: gearshift.train_sft("tiny", ROWS, seed=0, run={"seed": 3}),
        "`run.seed` twice, as 0 and as 3",
    ),
    (lambda: gearshift.train_sft("tiny", ROWS, name="small"), "`model.name` twice"),
    (lambda: gearshift.train_sft("tiny", ROWS, output="a", dir="b"), "`run.dir` twice"),
    (
        lambda: gearshift.train_rl("tiny", PROMPTS, one, validation=0.2, **CUT),
        "`task.validation` twice, as 0.2 and as 0.3",
    ),
    (lambda: gearshift.train_sft(ENGINE.model, ROWS), "save_pretrained"),  # type: ignore[arg-type]
    (lambda: gearshift.train_sft("tiny", ROWS, output=3), "the path of a folder"),  # type: ignore[arg-type]
    (lambda: gearshift.train_sft("tiny", ROWS, on_step=3), "on_step is 3"),  # type: ignore[arg-type]
    (lambda: gearshift.train_sft("tiny", ROWS, on_step=late), "take `async` out"),
    (
        lambda: gearshift.train_rl("tiny", PROMPTS, one, validation=["a.jsonl", "b.jsonl"]),
        "validation names 2 files",
    ),
    (lambda: gearshift.run({"model": {"name": "tiny"}}), "has no stage"),
    (lambda: gearshift.run(None), "The recipe is None"),  # type: ignore[arg-type]
    (lambda: gearshift.load(None), "The model is None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "says"), WRONG)
def test_a_wrong_argument_is_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(GearshiftError) as raised:
        call()
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_the_engine_refuses_parameters_of_another_type() -> None:
    with ENGINE.generating(), pytest.raises(GearshiftError, match="SamplingParams"):
        ENGINE.generate([[1, 2]], {"n": 2})  # type: ignore[arg-type]


def test_prompts_may_be_any_column_of_texts() -> None:
    sizes = {"temperature": 0, "max_new_tokens": 3}
    expected = generate(PROMPTS, **sizes)
    for column in (tuple(PROMPTS), iter(PROMPTS), pandas.Series(PROMPTS)):
        assert generate(column, **sizes) == expected


def test_tables_are_rows_and_a_missing_value_is_none() -> None:
    expected = written([*ROWS, {"prompt": "more", "answer": None}])
    frame = pandas.DataFrame([*ROWS, {"prompt": "more"}])
    assert written(frame) == expected
    assert written(pyarrow.Table.from_pandas(frame)) == expected
    numbers = pandas.DataFrame({"text": ["a", "b"], "figure": [1.5, None]})
    assert '"figure": null' in written(numbers)


def test_a_list_of_files_is_no_list_of_texts(tmp_path: Path) -> None:
    assert given(["a.jsonl", "b.parquet"]) == [{"path": "a.jsonl"}, {"path": "b.parquet"}]
    assert '"text": "I lost a.jsonl"' in written(["I lost a.jsonl", "b.parquet"])


def test_torch_names_of_types_and_devices_are_keys() -> None:
    assert plain({"dtype": torch.bfloat16, "device": torch.device("cpu")}) == {
        "dtype": "bfloat16",
        "device": "cpu",
    }


def test_closures_of_one_source_have_runs_of_their_own() -> None:
    """Without an output, the second call must not be given the first one's run."""

    def rewards(value: float) -> Callable[..., list[float]]:
        return lambda completions, **columns: [value] * len(completions)

    folders = set()
    for value in (1.0, 2.0):
        arguments = Arguments("grpo", "rl")
        [name] = arguments.rewards(rewards(value))
        rows = arguments.rows(PROMPTS, "prompts", "prompt", "prompt")
        arguments.put("task", {"name": "data", "train": rows, "reward": name})
        recipe, _ = arguments.recipe(None, Callbacks())
        folders.add(recipe.run.dir)
    assert len(folders) == 2


def test_type_checkers_know_which_keys_have_defaults() -> None:
    """PEP 681 reads `default=` alone; a default without the name would make its key required."""
    root = Path(gearshift.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Field":
                assert not node.args, f"{file}:{node.lineno}: write Field(default=...)"
