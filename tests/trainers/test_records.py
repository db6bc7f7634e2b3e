"""What `rollouts.jsonl` and `metrics.jsonl` say of a step of reinforcement learning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.errors import NumericalError
from gearshift.runtime.metrics import Trackers, read_metrics
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.trainers.rl.records import RolloutRecord
from gearshift.types import Trajectory
from tests.trainers.rl_runs import OwnReward, small, trainer
from tests.trainers.test_guards import Sometimes
from tests.trainers.test_left_out import NO_KL, Outage, failing

PLAIN: dict[str, Any] = {"advantage": {"name": "grpo"}, "kl": NO_KL}
FIGURES = {"mask", "logprobs", "versions", "trained_logprobs", "advantages", "prompt_ids"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def near(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) < 3e-4 for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        PLAIN,
        {"update": {"micro_batch_tokens": 50}, **PLAIN},
        {"update": {"minibatches": 2, "epochs": 2}, **PLAIN},
        {"kl": {"beta": 0.1}},
    ],
    ids=["from the update", "of micro-batches", "of minibatches", "before the update"],
)
def test_each_token_has_its_own_figures(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The sampler and the trainer are one policy, so their log-probs are alike token by token."""
    config = small(steps=3, **changes)
    trainer(config, tmp_path).train()
    for step in lines(tmp_path):
        for episode in step["episodes"]:
            assert episode["mask"] == 1
            assert episode["versions"] == step["step"] * config.updates_a_step
            assert len(episode["logprobs"]) == len(episode["token_ids"])
            assert len(episode["prompt_ids"]) == episode["prompt_length"]
            assert episode["rewards"] == {"environment": episode["reward"]}
            if "trained_logprobs" in episode:
                assert near(episode["logprobs"], episode["trained_logprobs"])
            else:  # its advantage is 0, and nothing else asked for its log-probs
                assert episode["advantages"] == 0
            if "kl" in changes and changes["kl"]["beta"]:
                assert not near(episode["logprobs"], episode["ref_logprobs"]) or not step["step"]
        known = [e for e in step["episodes"] if "trained_logprobs" in e]
        assert known and len({str(e["logprobs"]) for e in known}) > 1


def test_the_words_of_the_environment_have_no_figures() -> None:
    """A figure that all tokens share is written once, others for each token of the policy."""
    mask = [0, 0, 1, 1, 0, 0, 1]
    logprobs = [0.0, 0.0, -0.123456, -0.2, 0.0, 0.0, -0.7]
    versions = [-1, -1, 3, 3, -1, -1, 4]
    episode = Trajectory(
        list(range(7)), mask, logprobs, [0.0] * 7, 0, 2, "stop", weights_versions=versions
    )
    record = RolloutRecord()
    record.add([episode], {"environment": [0.0]})
    batch = pack_trajectories([episode])
    scored = batch.with_scored(
        old_logprobs=torch.tensor([-0.1, -0.2, -0.7]), advantages=torch.full((3,), 0.5)
    )
    record.add_figures([episode], scored, batch.loss_mask)
    [line] = record.line()["episodes"]
    assert line["prompt_ids"] == [0, 1] and line["token_ids"] == [2, 3, 4, 5, 6]
    assert line["mask"] == [1, 1, 0, 0, 1] and line["versions"] == [3, 3, 4]
    assert line["logprobs"] == [-0.1235, -0.2, -0.7]
    assert line["trained_logprobs"] == [-0.1, -0.2, -0.7] and line["advantages"] == 0.5


def test_a_step_has_the_intervals_of_its_phases_and_trackers_do_not_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, float]] = []
    monkeypatch.setattr(Trackers, "log", lambda self, step, record: sent.append(record))
    trainer(small(steps=2, **PLAIN), tmp_path).train()
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        names = [name for name, _, _ in record["phases"]]
        assert names == ["generate", "reward", "score", "train"]
        ends = [0.0, *(x for _, start, end in record["phases"] for x in (start, end))]
        assert ends == sorted(ends) and ends[-1] <= record["step_time"] + 1e-3
    assert len(sent) == 2 and not any("phases" in record for record in sent)


def test_what_is_left_out_is_recorded_with_its_reason(tmp_path: Path) -> None:
    """Three of the first group's four fail, so that the fourth is alone."""
    it = trainer(small(steps=1, **PLAIN), tmp_path, environment=failing(lambda n: n < 3))
    it.train()
    [line] = lines(tmp_path)
    lost = line["left_out"]
    assert [(e["group_id"], e["left_out"]) for e in lost] == [(0, "environment")] * 3
    assert all("the simulator fell over" in e["why"] for e in lost)
    alone = [e for e in line["episodes"] if "left_out" in e]
    assert [(e["group_id"], e["left_out"]) for e in alone] == [(0, "alone")]
    assert "advantages" not in alone[0] and "logprobs" in alone[0]


def test_an_episode_that_lost_its_reward_is_recorded_with_its_tokens(tmp_path: Path) -> None:
    it = trainer(small(steps=2, **PLAIN), tmp_path)
    it.sampler.score = Outage(range(1, 2))
    it.train()
    first, second = lines(tmp_path)
    assert "left_out" not in first and second["episodes"] == []
    assert [e["left_out"] for e in second["left_out"]] == ["no_reward"] * 8
    assert all(e["reward"] is None and e["token_ids"] for e in second["left_out"])


def test_groups_that_were_replaced_say_so(tmp_path: Path) -> None:
    rollout = {"prompts": 3, "replace_zero_std": 4}
    trainer(small(steps=3, **PLAIN, rollout=rollout), tmp_path, environment=Sometimes).train()
    reasons: dict[str | None, set[int]] = {}
    for line in lines(tmp_path):
        for e in line["episodes"]:
            reasons.setdefault(e.get("left_out"), set()).add(e["group_id"])
            assert ("advantages" in e) == ("left_out" not in e)
    assert len(reasons[None]) == 9 and reasons["zero_std"]
    assert not reasons[None] & reasons["zero_std"]


def test_a_greedy_episode_that_is_lost_names_its_group_and_is_no_episode_of_its_own(
    tmp_path: Path,
) -> None:
    config = small(steps=1, advantage={"name": "remax"}, kl=NO_KL)
    it = trainer(config, tmp_path, environment=failing(lambda n: n == 8))
    it.train()
    [line] = lines(tmp_path)
    assert "left_out" not in line and len(line["episodes"]) == 8
    assert [e.get("left_out") for e in line["episodes"]] == ["no_greedy"] * 4 + [None] * 4


def test_the_figures_of_tokens_can_be_left_away(tmp_path: Path) -> None:
    for tokens in (True, False):
        folder = tmp_path / str(tokens)
        trainer(small(steps=1, record_figures=tokens, **PLAIN), folder).train()
    [full], [lean] = lines(tmp_path / "True"), lines(tmp_path / "False")
    for one, other in zip(full["episodes"], lean["episodes"], strict=True):
        assert one.keys() - other.keys() <= FIGURES
        assert other == {k: v for k, v in one.items() if k not in FIGURES}


def test_the_episodes_of_an_update_that_fails_are_there_to_be_read(tmp_path: Path) -> None:
    class Huge(OwnReward):
        def __call__(self, trajectories: Any) -> Any:
            totals, parts = super().__call__(trajectories)
            for t in totals:
                t.rewards[-1] = 1e300
            return totals, parts

    it = trainer(small(steps=1, advantage={"name": "none"}, kl=NO_KL), tmp_path)
    it.sampler.score = Huge()
    with pytest.raises(NumericalError):
        it.train()
    [line] = lines(tmp_path)
    assert len(line["episodes"]) == 8 and not (tmp_path / "metrics.jsonl").exists()
