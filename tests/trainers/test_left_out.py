"""One sample never ends a run: what fails is left out, counted and named; what is learned from the
rest is as if it had not been there.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.cli.main import main
from gearshift.errors import DataError, InterruptedRunError
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.rl.batching import minibatches, pack_trajectories
from gearshift.types import Trajectory
from tests.gyms import SayLetters
from tests.trainers.rl_runs import OwnReward, small, trainer
from tests.trainers.test_resume import stop_after

NO_KL = {"beta": 0.0}


class ByCount(SayLetters):
    """Each fails, if it does, by how many have been reset before it."""

    resets = 0
    fails: Any = staticmethod(lambda n: False)

    def _start(self, options: dict[str, Any] | None) -> str:
        self.nth = type(self).resets
        type(self).resets += 1
        return super()._start(options)

    def step(self, action: str) -> tuple:
        if self.fails(self.nth):
            raise RuntimeError("the simulator fell over")
        return super().step(action)


def failing(fails: Any, **more: Any) -> type[ByCount]:
    return type("Failing", (ByCount,), {"fails": staticmethod(fails), "resets": 0, **more})


def weights(run: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.engine.model.parameters()])


@pytest.mark.parametrize("advantage", ["rloo", "value_baseline", "moving_average"])
def test_a_rollout_of_which_nothing_is_left_updates_nothing_and_the_run_goes_on(
    tmp_path: Path, advantage: str
) -> None:
    it = trainer(
        small(steps=4, advantage={"name": advantage}, kl=NO_KL), tmp_path,
        environment=failing(lambda n: 8 <= n < 16),
    )  # fmt: skip
    seen = []
    log = it.stage.log
    it.stage.log = lambda *a: (seen.append(weights(it)), log(*a))  # type: ignore[method-assign, func-returns-value]
    it.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["environment/failures"] for m in metrics] == [0, 8, 8, 8]
    assert "loss" not in metrics[1] and "reward" not in metrics[1] and "loss" in metrics[2]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert "8 lost to the environment" in it.left_out.describe()
    assert "the simulator fell over" in it.left_out.describe()


def test_a_run_that_learns_from_nothing_any_more_ends(tmp_path: Path) -> None:
    it = trainer(
        small(steps=40, kl=NO_KL), tmp_path / "later", environment=failing(lambda n: n >= 8)
    )
    with pytest.raises(DataError, match=r"last 16 prompts .*RuntimeError: the simulator"):
        it.train()
    assert len(read_metrics(tmp_path / "later" / "metrics.jsonl")) == 1 + 8
    with pytest.raises(DataError, match="last 8 prompts"):  # at its end at the latest
        trainer(small(kl=NO_KL), tmp_path / "never", environment=failing(lambda n: True)).train()


class Outage(OwnReward):
    """The rewards of these rollouts are lost."""

    last_failure = "http://judge: [Errno 111] Connection refused"

    def __init__(self, rollouts: range) -> None:
        self.rollouts, self.nth = rollouts, -1

    def __call__(self, trajectories: Any) -> Any:
        scored, parts = super().__call__(trajectories)
        self.nth += 1
        return ([None] * len(scored) if self.nth in self.rollouts else scored), parts


def with_outage(folder: Path, rollouts: range) -> Any:
    it = trainer(
        small(
            steps=8, rollout={"prompts": 16, "group_size": 1}, advantage={"name": "none"}, kl=NO_KL
        ),
        folder,
    )
    it.sampler.score = Outage(rollouts)
    return it


@pytest.mark.parametrize("rollouts", [range(1, 5), range(4, 8)])
def test_an_outage_of_whole_rollouts_does_not_end_a_run_that_has_learned(
    tmp_path: Path, rollouts: range
) -> None:
    it = with_outage(tmp_path, rollouts)
    it.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [i for i, m in enumerate(metrics) if "loss" not in m] == list(rollouts)
    assert it.left_out.counts == {"no_reward": 64}


def test_a_run_that_an_outage_ends_is_saved_and_goes_on_as_if_there_had_been_none(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"last 80 prompts .*Connection refused.* is saved"):
        with_outage(tmp_path / "a", range(2, 99)).train()
    again, whole = with_outage(tmp_path / "a", range(0)), with_outage(tmp_path / "b", range(0))
    again.train()
    whole.train()
    assert torch.equal(weights(again), weights(whole)) and again.sampler.score.nth == 5
    assert len(read_metrics(tmp_path / "a" / "metrics.jsonl")) == 8
    with pytest.raises(DataError, match="last 16 prompts"):  # nothing was ever learned
        with_outage(tmp_path / "c", range(99)).train()


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo", "grpo_turns", "opo", "best_of_n"])
def test_what_is_alone_in_its_group_has_no_baseline_and_is_left_out(
    tmp_path: Path, advantage: str
) -> None:
    """Three of the first group's four fail."""
    config = small(steps=1, advantage={"name": advantage}, kl=NO_KL)
    it = trainer(config, tmp_path, environment=failing(lambda n: n < 3))
    kept, _ = it.sampler.rollout(0)
    assert len({t.group_id for t in kept}) == 1 and len(kept) == 4
    assert it.left_out.counts == {"environment": 3, "alone": 1}


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    """And everything that was left out is the same as in a run that was not cut."""
    config = small(steps=6, kl=NO_KL)

    def every_fifth(folder: Path) -> Any:
        class Odd(SayLetters):
            def step(self, action: str) -> tuple:
                if len(action) % 3 == 0:
                    raise RuntimeError("no")
                return super().step(action)

        return trainer(config, folder, environment=Odd)

    straight, cut = every_fifth(tmp_path / "a"), every_fifth(tmp_path / "b")
    straight.train()
    stop_after(cut, 2)
    with pytest.raises(InterruptedRunError):
        cut.train()
    every_fifth(tmp_path / "b").train()
    counts = [
        [m["environment/failures"] for m in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("a", "b")
    ]
    assert counts[0] == counts[1] and counts[0][-1] > counts[0][2] > 0


def test_a_prompt_too_long_at_its_turn_costs_its_own_group(tmp_path: Path) -> None:
    class Long(SayLetters):
        made = 0

        def _start(self, options: dict[str, Any] | None) -> str:
            super()._start(options)
            if int(self.np_random.integers(0, 3)) == 0:
                self.messages = [{"role": "user", "content": "long " * 200}]
            return self.messages[0]["content"]

    it = trainer(
        small(steps=6, advantage={"name": "grpo"}, update={"minibatches": 2}, kl=NO_KL),
        tmp_path,
        Long,
    )
    it.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    lost = metrics[-1]["left_out/overlong_prompt"]
    assert 0 < lost < 6 * 8 and lost % 4 == 0 and metrics[-1]["environment/failures"] == 0
    assert len(metrics) == 6 and "leaves no place" in it.left_out.describe()


def group(number: int, count: int = 2) -> list[Trajectory]:
    return [
        Trajectory([1, 2, 3, 30 + i], [0, 0, 0, 1], [0.0] * 4, [0.0] * 3 + [1.0], number, 3, "stop")
        for i in range(count)
    ]


def test_fewer_groups_than_minibatches_are_fewer_updates() -> None:
    batch = pack_trajectories([*group(0), *group(1)])
    for count, wanted in ((1, [4]), (2, [2, 2]), (3, [2, 2]), (8, [2, 2])):
        cut = minibatches(batch, count, torch.Generator())
        assert [int(mini.loss_mask.sum()) for mini in cut] == wanted
    with pytest.raises(ValueError, match="minibatches=3 cannot be made of prompts=2"):
        small(update={"minibatches": 3})


def test_a_greedy_episode_that_was_lost_leaves_its_group_out(tmp_path: Path) -> None:
    """The eight sampled episodes are reset first; then the greedy one of each group."""
    config = small(steps=2, advantage={"name": "remax"}, kl=NO_KL)
    it = trainer(config, tmp_path, environment=failing(lambda n: n == 8))
    it.train()
    assert it.left_out.counts == {"environment": 1, "no_greedy": 4}
    none = trainer(
        small(steps=2, advantage={"name": "remax"}, kl=NO_KL), tmp_path / "none",
        environment=failing(lambda n: n in (8, 9)),
    )  # fmt: skip
    none.train()
    first, second = read_metrics(tmp_path / "none" / "metrics.jsonl")
    assert "loss" not in first and "loss" in second and second["left_out/no_greedy"] == 8


def test_a_reward_that_is_lost_leaves_its_episode_out(tmp_path: Path) -> None:
    it = trainer(small(steps=1, advantage={"name": "grpo"}, kl=NO_KL), tmp_path)
    plain = type(it.sampler.score).__call__

    class Loses(type(it.sampler.score)):  # type: ignore[misc]
        last_failure = "the judge is away"

        def __call__(self, trajectories: Any) -> Any:
            scored, parts = plain(self, trajectories)
            return [None if i % 4 == 0 else t for i, t in enumerate(scored)], parts

    it.sampler.score = Loses()
    it.train()
    [metrics] = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics["left_out/no_reward"] == 2 and math.isfinite(metrics["loss"])
    assert (
        it.left_out.describe()
        == "episodes left out: 2 without a reward (the last: the judge is away)"
    )


# Before the first step

RECIPE = """
run: {{dir: {dir}}}
model: {{name: tiny, dtype: float32, device: cpu, threads: 1}}
engine: {{max_length: 64}}
task:
  name: data
  train: [{{path: {rows}}}]
  validation: {other}1.jsonl
  test: {other}2.jsonl
  reward: {reward}
sft: null
reward: null
rl:
  steps: 2
  rollout: {{prompts: 2, group_size: 2, max_new_tokens: 8}}
  advantage: {{name: rloo}}
  kl: {{beta: 0}}
eval: {{max_new_tokens: 8}}
"""


def recipe(folder: Path, rows: str) -> str:
    (folder / "rewards.py").write_text(
        "def f(completions, **_):\n    return [1.0 for c in completions]\n"
    )
    (folder / "rows.jsonl").write_text(rows)
    for i in "12":
        (folder / f"other{i}.jsonl").write_text(json.dumps({"prompt": f"and {i}"}) + "\n")
    path = folder / "recipe.yaml"
    text = RECIPE.format(
        dir=folder / "run",
        rows=folder / "rows.jsonl",
        other=folder / "other",
        reward=f"{folder / 'rewards.py'}:f",
    )
    path.write_text(text)
    return str(path)


def test_prompts_that_are_too_long_are_told_before_the_first_step_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"say {i}" for i in range(20)]
    prompts[7:7] = ["long " * 40, "longer " * 40]
    path = recipe(tmp_path, "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    with pytest.raises(SystemExit):
        main(["rl", path])
    printed = capsys.readouterr().err
    assert (
        "train.jsonl, line 8: the prompt has 2" in printed
        and "rl.rollout.overlong_prompts=drop" in printed
    )
    assert "Traceback" not in printed and not (tmp_path / "run" / "rl" / "metrics.jsonl").exists()
    main(["rl", path, "rl.rollout.overlong_prompts=drop", f"run.dir={tmp_path / 'other'}"])
    assert "2 of 22 rows cannot be used, and are left out" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "other" / "rl" / "metrics.jsonl")
    assert [m["left_out/overlong_prompt"] for m in metrics] == [0, 0]
