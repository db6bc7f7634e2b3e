"""The Python API: what a call means, and that it is the run of the recipe that says the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gearshift
from gearshift.cli.main import main
from gearshift.errors import ConfigError, InterruptedRunError
from gearshift.pipeline.arguments import _OF_TRL, Arguments
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.keys import leaves
from gearshift.trainers.callbacks import Callbacks

TINY: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {word}"},
            {"role": "assistant", "content": word},
        ]
    }
    for word in ("one", "two", "three", "four", "five", "six")
]
PAIRS = [
    {"prompt": f"say {word}", "chosen": word, "rejected": f"no {i}"}
    for i, word in enumerate(("one", "two", "three", "four", "five", "six"))
]
SIZES = {"prompts": 2, "group_size": 2, "max_new_tokens": 4}
PROMPTS = [f"say {i}" for i in range(12)]


def short(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 3) for text in completions]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two stages wrote the same weights and the same rollouts, to the bit."""
    a, b = weights(one), weights(other)
    equal = a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    files = [folder / "rollouts.jsonl" for folder in (one, other)]
    return equal and (not files[0].exists() or files[0].read_text() == files[1].read_text())


def recipe(folder: Path, **sections: Any) -> Path:
    """A recipe file of the tiny model; the file of rows is `rows.jsonl` beside it."""
    tree = {"run": {"dir": str(folder / "run")}, "model": {"name": "tiny", **TINY}, **sections}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(folder: Path, given: list[Any]) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return {"sources": [{"path": str(path)}]}


def test_importing_the_package_imports_nothing() -> None:
    code = "import sys, gearshift; print([m for m in ('torch', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", gearshift.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(gearshift, name) is not None and name in dir(gearshift)


def test_type_checkers_see_every_public_name() -> None:
    text = Path(gearshift.__file__).read_text()
    seen = {line.split(" as ")[1].strip() for line in text.splitlines() if " as " in line[4:]}
    assert seen >= set(gearshift.__all__) - {"__version__"}
    assert (Path(gearshift.__file__).parent / "py.typed").exists()


def test_sft_is_the_recipe(tmp_path: Path) -> None:
    main(["sft", str(recipe(tmp_path, sft={"data": rows(tmp_path, CHATS), "batch_size": 2}))])
    result = gearshift.train_sft("tiny", CHATS, output=tmp_path / "api", batch_size=2, **TINY)
    assert same(result.model, tmp_path / "run" / "sft")
    assert result.metrics == [
        json.loads(x) for x in (result.model / "metrics.jsonl").read_text().splitlines()
    ]


def test_dpo_is_the_recipe(tmp_path: Path) -> None:
    section = {"data": rows(tmp_path, PAIRS), "batch_size": 2}
    main(["dpo", str(recipe(tmp_path, algorithm="ipo", preference=section))])
    result = gearshift.train_dpo(
        "tiny", PAIRS, algorithm="ipo", output=tmp_path / "api", batch_size=2, **TINY
    )
    assert same(result.model, tmp_path / "run" / "preference")
    config = gearshift.PreferenceConfig(algorithm="ipo", batch_size=2)
    other = gearshift.train_dpo("tiny", PAIRS, preference=config, output=tmp_path / "own", **TINY)
    assert same(other.model, result.model)


def test_a_reward_model_is_the_recipe(tmp_path: Path) -> None:
    section = {"data": rows(tmp_path, PAIRS), "batch_size": 2}
    main(["reward", str(recipe(tmp_path, reward=section))])
    result = gearshift.train_reward_model(
        "tiny", PAIRS, heldout=PAIRS[:2], output=tmp_path / "api", batch_size=2, **TINY
    )
    assert same(result.model, tmp_path / "run" / "reward")
    assert result.accuracy is not None and 0 <= result.accuracy <= 1


def test_rl_is_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    return [float(len(text) % 3) for text in completions]\n"
    )
    prompts = rows(tmp_path, [{"prompt": text} for text in PROMPTS])
    rollout = {"prompts": 2, "group_size": 2, "max_new_tokens": 8}
    task = {
        "name": "data",
        "train": prompts["sources"],
        "reward": f"{tmp_path / 'rewards.py'}:short",
    }
    ends = {"max_new_tokens": 8}
    path = recipe(
        tmp_path, task=task, algorithm="dr_grpo", rl={"steps": 2, "rollout": rollout}, eval=ends
    )
    main(["rl", str(path)])
    result = gearshift.train_rl(
        "tiny",
        PROMPTS,
        lambda completions, **columns: short([], completions),
        "dr_grpo",
        output=tmp_path / "api",
        steps=2,
        rollout=rollout,
        eval=ends,
        **TINY,
    )
    assert same(result.model, tmp_path / "run" / "rl")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.heldout == summary["heldout_detail"]


def test_a_second_call_goes_on_and_other_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def stop(step: int, metrics: dict[str, Any]) -> None:
        if step == 1:
            raise KeyError("mine")

    call = {"output": folder, "batch_size": 2, "epochs": 1, **TINY}
    with pytest.raises(KeyError, match="mine"):
        gearshift.train_sft("tiny", CHATS, on_step=stop, **call)
    seen: list[int] = []
    first = gearshift.train_sft("tiny", CHATS, on_step=lambda s, m: seen.append(s), **call)
    assert seen == [2] and len(first.metrics) == 3
    whole = gearshift.train_sft("tiny", CHATS, **{**call, "output": tmp_path / "whole"})
    assert same(first.model, whole.model)
    capsys.readouterr()
    again = gearshift.train_sft("tiny", CHATS, **call)
    assert again.metrics == first.metrics and "done before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="made from other rows"):
        gearshift.train_sft("tiny", CHATS[:4], **call)


def test_without_an_output_other_rows_have_a_run_of_their_own() -> None:
    def folder(rows: list[dict[str, Any]], **config: Any) -> str:
        arguments = Arguments("sft", "sft")
        arguments.put("model", {"name": "tiny"})
        arguments.data("sft.data", rows, "data")
        arguments.add(config)
        return arguments.recipe(None, Callbacks())[0].run.dir

    assert folder(CHATS) == folder(CHATS)
    assert len({folder(CHATS), folder(CHATS[:4]), folder(CHATS, epochs=2)}) == 3


def test_a_policy_is_measured_on_rows_and_environments() -> None:
    rows = [{"prompt": text, "answer": "yes"} for text in PROMPTS]
    engine = gearshift.load("tiny", **TINY)
    found = gearshift.evaluate(engine, rows, short, max_new_tokens=4)
    assert found.episodes == 12 and found.metric == "reward"
    other = gearshift.evaluate("tiny", rows, short, max_new_tokens=4, **TINY)
    assert other.samples == found.samples
    sizes = {"limit": 3, "max_new_tokens": 4}
    game = gearshift.evaluate(engine, environment=Echo, metric="reward", **sizes)
    assert game.episodes == 3 and game.value == 0.5


class Echo(gearshift.TextEnvironment):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        said = f"say {self.np_random.integers(100)}"
        return said, {"messages": [{"role": "user", "content": said}]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.5, True, False, {"success": True}


def test_a_model_answers_texts() -> None:
    engine = gearshift.load("tiny", **TINY)
    first = gearshift.generate(engine, "hello", temperature=0, max_new_tokens=5)
    chat = [{"role": "user", "content": "hello"}]
    assert len(first) == 1 and first[0]
    both = gearshift.generate(engine, [chat, "other"], temperature=0, max_new_tokens=5)
    assert both[0] == first[0] and len(both) == 2
    assert gearshift.generate(engine, chat, temperature=0, max_new_tokens=5) == first
    with pytest.raises(ConfigError, match="one answer"):
        gearshift.generate(engine, "hello", n=2)


def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    result = gearshift.train_rl(
        "tiny",
        environment=lambda: Echo(),
        output=tmp_path / "run",
        steps=1,
        eval={"limit": 2, "max_new_tokens": 4},
        **{"rollout": SIZES, **TINY},
    )
    assert result.heldout["rl"]["value"] == 1.0 and result.metrics[0]["reward"] == 0.5
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "id: given:lambda" in text


def test_a_whole_recipe_runs_from_python(tmp_path: Path) -> None:
    section = {"data": rows(tmp_path, CHATS), "batch_size": 2, "epochs": 1}
    path = recipe(tmp_path, sft=section)
    first = gearshift.run(path, sft={"epochs": 2})
    assert len(first.metrics) == 6 and first.folder == tmp_path / "run"
    tree = yaml.safe_load(path.read_text())
    again = gearshift.run(tree, output=tmp_path / "other", sft={"epochs": 2})
    assert same(first.model, again.model)
    with pytest.raises(ConfigError, match="no file"):
        gearshift.run(tmp_path / "recipes.yaml")


class OwnConfig(gearshift.TaskConfig):
    name: Literal["own"] = "own"


def own_task(name: str = "own") -> gearshift.Task:
    def prepare(config: OwnConfig, seed: int, folder: Path) -> dict[str, Path]:
        rows = [{"prompt": text} for text in PROMPTS]
        files = {"validation": rows[:2], "test": rows[2:4], "train": rows[4:]}
        return gearshift.write_rows(folder, files)

    def make(config: OwnConfig, path: Path) -> gearshift.RowEnvironment:
        return gearshift.RowEnvironment(gearshift.read_rows(path), short)

    return gearshift.Task(name, OwnConfig, prepare, make, metric="reward")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    call = {"steps": 1, "rollout": SIZES, "eval": {"max_new_tokens": 4}, **TINY}
    for _ in range(2):  # the second one, another object of its name, finds the run
        result = gearshift.train_rl("tiny", task=own_task(), output=tmp_path / "run", **call)
        assert result.heldout["rl"]["episodes"] == 2
    with pytest.raises(ConfigError, match="installed task"):
        gearshift.train_rl("tiny", task=own_task("data"), **call)
    with pytest.raises(ConfigError, match="both should"):
        gearshift.train_rl("tiny", task=own_task("other"), **call)


def test_it_works_in_a_running_loop_and_in_a_thread(tmp_path: Path) -> None:
    async def slow(completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return short([], completions)

    def train(name: str) -> Any:
        folder = tmp_path / name
        sizes = {"rollout": SIZES, "eval": {"max_new_tokens": 4}, "verbose": False, **TINY}
        return gearshift.train_rl("tiny", PROMPTS, slow, steps=1, output=folder, **sizes)

    async def notebook() -> Any:
        return train("loop")

    first = asyncio.run(notebook())
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(train, "thread").result()
    assert same(first.model, second.model)


def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    def interrupt(step: int, metrics: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    call = {"batch_size": 2, "epochs": 1, **TINY}
    before = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    with pytest.raises(InterruptedRunError, match="step 1 of 3"):
        gearshift.train_sft("tiny", CHATS, output=tmp_path / "cut", on_step=interrupt, **call)
    assert (signal.getsignal(signal.SIGINT), torch.get_num_threads()) == before
    cut = gearshift.train_sft("tiny", CHATS, output=tmp_path / "cut", **call)
    whole = gearshift.train_sft("tiny", CHATS, output=tmp_path / "whole", **call)
    assert same(cut.model, whole.model) and len(cut.metrics) == 3


def test_verbose_false_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gearshift.train_sft("tiny", CHATS, epochs=1, output=tmp_path / "a", verbose=False, **TINY)
    out, err = capfd.readouterr()
    assert not out and not err
    gearshift.train_sft("tiny", CHATS, epochs=1, output=tmp_path / "b", **TINY)
    out, err = capfd.readouterr()
    assert out.splitlines()[-1].startswith("sft: 1 step;") and "1/1" in err


def test_an_adapter_is_saved_without_the_bars_of_the_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"lora": {"rank": 2}, "epochs": 1, "output": tmp_path, "verbose": False}
    gearshift.train_sft("tiny", CHATS, **keys, **TINY)
    out, err = capfd.readouterr()
    assert not out and not err


def test_a_name_of_trl_leads_to_its_name_here() -> None:
    with pytest.raises(ConfigError, match=r"a name of TRL's; here it is `group_size`"):
        gearshift.train_rl("tiny", ["a", "b", "c"], len, num_generations=2)
    ours = {key.rpartition(".")[2] for key, _ in leaves(Recipe)}
    assert not ours & _OF_TRL.keys()


def test_config_objects_mean_what_their_keys_mean(tmp_path: Path) -> None:
    config = gearshift.RLConfig(algorithm="rloo", steps=1, rollout=gearshift.RolloutConfig(**SIZES))
    call = {"eval": {"max_new_tokens": 4}, "verbose": False, **TINY}
    one = gearshift.train_rl("tiny", PROMPTS, short, rl=config, output=tmp_path / "one", **call)
    sizes = {"rl.rollout.prompts": 2, "group_size": 2, "max_new_tokens": 4, "steps": 1}
    two = gearshift.train_rl(
        gearshift.ModelConfig(name="tiny", **TINY), PROMPTS, short, "rloo",
        output=tmp_path / "two", **sizes, **{**call, **TINY},
    )  # fmt: skip
    texts = [(run.folder / "recipe.yaml").read_text() for run in (one, two)]
    assert texts[0].replace("/one", "/two") == texts[1] and same(one.model, two.model)
    with pytest.raises(ConfigError, match=r"did you mean `rl\.rollout`"):
        gearshift.train_rl("tiny", PROMPTS, short, rollouts={"group_size": 4})


def test_several_rewards_have_weights(tmp_path: Path) -> None:
    def capital(completions: list[str], **columns: Any) -> list[float]:
        return [float(text.isupper()) for text in completions]

    result = gearshift.train_rl(
        "tiny", PROMPTS, [short, capital, lambda completions, **c: [0.0] * len(completions)],
        reward_weights=[1, 0.5, 2], steps=1, rollout=SIZES, eval={"max_new_tokens": 4},
        output=tmp_path / "run", **TINY,
    )  # fmt: skip
    tree = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    found = [(part["source"], part["weight"]) for part in tree["rl"]["rewards"]]
    named = "tests.pipeline.test_api:short"
    assert tree["task"]["reward"] == named
    assert found == [("environment", 1.0), ("given:capital", 0.5), ("given:lambda", 2.0)]
    assert "rewards/given:capital/mean" in result.metrics[0]
    with pytest.raises(ConfigError, match="reward_weights has 2 weights for 1 reward;"):
        gearshift.train_rl("tiny", PROMPTS, short, reward_weights=[1, 2])


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    call = {"epochs": 1, "output": tmp_path / "run", "verbose": False, **TINY}
    first = gearshift.train_sft("tiny", CHATS, **call)
    report = first.folder / "report.html"
    before = report.stat().st_mtime_ns
    assert gearshift.train_sft("tiny", CHATS, **call) == first
    assert report.stat().st_mtime_ns == before
    report.unlink()
    gearshift.train_sft("tiny", CHATS, **call)
    assert report.exists()


def test_the_engine_answers_inside_a_running_loop() -> None:
    async def cell() -> list[str]:
        engine = gearshift.load("tiny", **TINY)
        with engine.generating():
            tokens = list(engine.stream([5, 6, 7], gearshift.SamplingParams(max_new_tokens=3)))
        assert len(tokens) == 3
        return gearshift.generate(engine, "hello", temperature=0, max_new_tokens=4)

    engine = gearshift.load("tiny", **TINY)
    assert asyncio.run(cell()) == gearshift.generate(
        engine, "hello", temperature=0, max_new_tokens=4
    )


def test_a_reward_model_alone_is_a_reward(tmp_path: Path) -> None:
    judge = gearshift.train_reward_model("tiny", PAIRS, output=tmp_path / "judge", **TINY)
    result = gearshift.train_rl(
        "tiny", PROMPTS, judge, "rloo", steps=1, rollout=SIZES, eval={"max_new_tokens": 4},
        output=tmp_path / "run", **TINY,
    )  # fmt: skip
    step = result.metrics[0]
    assert step["reward"] == pytest.approx(step["rewards/model/mean"]) and step["reward"] != 0
    record = json.loads((tmp_path / "run" / "validation" / "rl.json").read_text())
    [sample] = record["samples"]
    own = gearshift.score(judge, [sample["prompt"]], [sample["completion"]], **TINY)[0]
    assert sample["reward"] == result.heldout["rl"]["value"] != 0
    assert isinstance(own, float)
    found = gearshift.evaluate(result, PROMPTS[:2], judge, max_new_tokens=4)
    assert found.episodes == 2 and found.value != 0
    with pytest.raises(ConfigError, match="twice"):
        gearshift.train_rl("tiny", PROMPTS, judge, **{"rl.rewards": [{"source": "environment"}]})
