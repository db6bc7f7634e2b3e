"""Failures that end in no crash: cut completions, groups that teach nothing, the sign of
the KL, the temperature, the size of a supervised micro-batch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Engine
from gearshift.engine.stats import measure
from gearshift.models.load import load_policy
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.metrics import read_metrics
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.rl.batching import describe_rollout, pack_trajectories
from gearshift.trainers.rl.experience import shaped_rewards
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.sft import supervised_batch, supervised_loss
from gearshift.trainers.update import update
from gearshift.types import Trajectory
from tests.gyms import Bandit, SayLetters
from tests.trainers.rl_runs import TINY, small, trainer

NO_KL = {"beta": 0.0}


def episodes(cut: list[bool], rewards: list[float]) -> list[Trajectory]:
    """One group, four tokens each."""
    return [
        Trajectory(
            [1, 20, 2, 30 + i, 40 + i, 50, 51], [0, 0, 0, 1, 1, 1, 1], [0.0] * 3 + [-1.0] * 4,
            [0.0] * 6 + [reward], 0, 3, "length" if was_cut else "stop",
        )
        for i, (was_cut, reward) in enumerate(zip(cut, rewards, strict=True))
    ]  # fmt: skip


def gradient(it: RLTrainer, trajectories: list[Trajectory]) -> torch.Tensor:
    """The gradient of one update's loss."""
    for optimizer in it.optimizers:
        optimizer.step = lambda norm: norm  # type: ignore[method-assign]
    batch, _ = it.make_experience(pack_trajectories(trajectories), trajectories)
    it.engine.model.zero_grad()
    it.update(batch, 0)
    grads = [p.grad for p in it.engine.model.parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_cut_completions_that_are_masked_teach_nothing(tmp_path: Path) -> None:
    """Changing what a cut completion says changes nothing; what is left has the whole weight."""
    config = small(
        advantage={"name": "rloo"}, shaping={"mask_truncated_completions": True}, kl=NO_KL
    )
    cut = episodes([False, True, False, False], [1.0, 0.0, 0.5, 0.0])
    other = list(cut)
    other[1] = replace(cut[1], token_ids=[*cut[1].token_ids[:3], 99, 98, 97, 96])
    ours, theirs = (
        gradient(trainer(config, tmp_path / n), x) for n, x in (("a", cut), ("b", other))
    )
    assert torch.equal(ours, theirs) and ours.norm() > 0
    kept = gradient(trainer(small(advantage={"name": "rloo"}, kl=NO_KL), tmp_path / "c"), cut)
    assert not torch.allclose(ours, kept)


def test_a_rollout_of_nothing_but_cut_completions_changes_nothing(tmp_path: Path) -> None:
    config = small(
        steps=2,
        advantage={"name": "rloo"},
        shaping={"mask_truncated_completions": True},
        rollout={"max_new_tokens": 1},
        kl=NO_KL,
    )
    it = trainer(config, tmp_path)
    before = [p.clone() for p in it.engine.model.parameters()]
    it.train()
    assert all(torch.equal(a, b) for a, b in zip(before, it.engine.model.parameters(), strict=True))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_what_length_costs() -> None:
    config = small(
        shaping={"missing_eos_penalty": 0.5, "clip": 1.0, "overlong_buffer": 0.4},
        rollout={"max_new_tokens": 5},
    )
    rewards_M = shaped_rewards(episodes([True, False], [3.0, 0.25]), config)
    # clipped to 1; four of five tokens are one into the two that cost: half of 1
    assert rewards_M.tolist() == [0, 0, 0, 1.0 - 0.5 - 0.5, 0, 0, 0, 0.25 - 0.5]


def turns(
    lengths: list[int], rewards: list[float], group: int = 0, cut: bool = False
) -> Trajectory:
    """An episode of turns of these lengths, each rewarded at its end."""
    ids, mask, given, at = [1, 20, 2], [0] * 3, [0.0] * 3, []
    for length, reward in zip(lengths, rewards, strict=True):
        ids += [*range(30, 30 + length), 2]
        mask += [1] * length + [0]
        given += [0.0] * (length - 1) + [reward, 0.0]
        at += [len(given) - 2]
    reason = "length" if cut else "stop"
    logprobs = [-1.0 * m for m in mask]
    return Trajectory(ids, mask, logprobs, given, group, 3, reason, rewarded=tuple(at))


def test_each_turn_has_its_own_limit() -> None:
    """Three turns of 4 under 8 cost nothing; of one at its limit the turn's own end costs 1."""
    config = small(rollout={"max_new_tokens": 8}, shaping={"overlong_buffer": 0.5})
    episodes = [turns([4, 4, 4], [0, 0, 1]), turns([8, 6, 1], [0, 1, 0])]
    first, second = shaped_rewards(episodes, config).split([12, 15])
    assert first.tolist() == [0] * 11 + [1]
    assert second.tolist() == [0] * 7 + [-1.0] + [0] * 5 + [1.0 - 0.5, 0]


@pytest.mark.parametrize("how", ["batch", "group"])
def test_advantages_are_whitened_by_what_counts(tmp_path: Path, how: str) -> None:
    """A masked completion, whatever it earned, is in no statistic but its group's baseline."""
    config = small(
        advantage={"name": "none", "whiten": how},
        shaping={"mask_truncated_completions": True},
        kl=NO_KL,
    )
    cut = episodes([False, True, False, False], [1.0, 100.0, 0.5, 0.0])
    batch, _ = trainer(config, tmp_path / "cut").make_experience(pack_trajectories(cut), cut)
    kept = [t for t in cut if t.finish_reason == "stop"]
    alone, _ = trainer(config, tmp_path / "kept").make_experience(pack_trajectories(kept), kept)
    assert torch.allclose(batch.scored("advantages"), alone.scored("advantages"), atol=1e-6)
    assert float(batch.scored("advantages").mean()) == pytest.approx(0.0, abs=1e-6)


def test_a_turns_reward_of_0_is_a_reward(tmp_path: Path) -> None:
    """Turns of 1 and 0, 0 and 0: mean 1/4, not 1; where the environment gave none, none counts."""
    config = small(advantage={"name": "grpo_turns"}, kl=NO_KL)
    both = [turns([2, 2], [1.0, 0.0]), turns([2, 2], [0.0, 0.0])]
    batch, _ = trainer(config, tmp_path / "a").make_experience(pack_trajectories(both), both)
    std = 0.5 + 1e-4  # of 1, 0, 0, 0
    good, bad = 0.75 / std, -0.25 / std
    wanted = [good + bad] * 2 + [bad] * 2 + [2 * bad] * 2 + [bad] * 2
    assert batch.scored("advantages").tolist() == pytest.approx(wanted)
    assert both[0].rewarded is not None
    sparse = [replace(t, rewarded=(t.rewarded or ())[:1]) for t in both]
    batch, _ = trainer(config, tmp_path / "b").make_experience(pack_trajectories(sparse), sparse)
    up = 0.5 / (0.5**0.5 + 1e-4)  # of 1 and 0
    wanted = [up, up, 0, 0, -up, -up, 0, 0]
    assert batch.scored("advantages").tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_policys_schedule_begins_when_the_policy_does(tmp_path: Path, schedule: str) -> None:
    """After the value net's warm-up, and it comes to its end with the run; a resume changes
    nothing.
    """
    own = {"lr": 1e-2, "warmup": 2, "schedule": schedule}
    config = small(
        steps=8, value={"warmup": 3}, update={"minibatches": 2, "optimizer": own}, kl=NO_KL
    )
    it = trainer(config, tmp_path / "warmed")
    it.train()
    plain = trainer(
        small(steps=5, update={"minibatches": 2, "optimizer": own}, kl=NO_KL), tmp_path / "plain"
    )
    plain.train()
    rates = [
        [m["learning_rate"] for m in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("warmed", "plain")
    ]
    assert rates[0][3:] == pytest.approx(rates[1])
    assert it.optimizers[0].lr == pytest.approx(0.0, abs=1e-9)


def test_minibatches_of_nothing_but_cut_completions_are_left_out(tmp_path: Path) -> None:
    config = small(
        advantage={"name": "rloo"},
        shaping={"mask_truncated_completions": True},
        update={"minibatches": 2},
        kl=NO_KL,
    )
    cut = [replace(t, group_id=1) for t in episodes([True, True], [1.0, 0.0])]
    whole = episodes([False, False], [1.0, 0.0])
    it = trainer(config, tmp_path)
    batch, _ = it.make_experience(pack_trajectories([*whole, *cut]), [*whole, *cut])
    before = [p.clone() for p in it.engine.model.parameters()]
    metrics = it.update(batch, 0)
    assert all(v == v for v in metrics.values()) and metrics["grad_norm"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(before, it.engine.model.parameters(), strict=True)
    )


class Sometimes(SayLetters):
    """Groups of even seed have nothing to tell apart."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        self.flat = (seed or 0) % 2 == 0
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple:
        observation, reward, *rest = super().step(action)
        return observation, 1.0 if self.flat else reward, *rest


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path: Path) -> None:
    config = small(
        steps=3, rollout={"prompts": 3, "replace_zero_std": 4}, advantage={"name": "grpo"}, kl=NO_KL
    )
    it = trainer(config, tmp_path, environment=Sometimes)
    for step in range(3):
        with torch.no_grad():
            kept, metrics = it.sampler.rollout(step)
        groups = {t.group_id for t in kept}
        assert len(groups) == 3 and metrics["sampling/rollouts"] >= 1
        for g in groups:
            assert len({t.reward for t in kept if t.group_id == g}) > 1


@pytest.mark.parametrize(("estimator", "ratio"), [("k2", False), ("k1", True), ("k3", True)])
def test_the_kl_in_the_loss_pulls_towards_the_reference(
    tmp_path: Path, estimator: str, ratio: bool
) -> None:
    kl = {"beta": 1.0, "estimator": estimator, "where": "loss", "ratio": ratio}
    config = small(
        steps=30,
        rollout={"prompts": 4, "group_size": 8, "max_new_tokens": 1},
        advantage={"name": "rloo"},
        kl=kl,
        update={"optimizer": {"lr": 3e-3, "warmup": 0}},
    )

    class Nothing(Bandit):
        def step(self, action: str) -> tuple:
            return "", 0.0, True, False, {}

    reference = load_policy(TINY)
    with torch.no_grad():
        torch.manual_seed(3)
        for p in reference.parameters():
            p += 0.3 * p.std() * torch.randn_like(p)
    trainer(config, tmp_path, environment=Nothing, reference=reference).train()
    kl_by_step = [m["kl"] for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert sum(kl_by_step[-5:]) < 0.5 * sum(kl_by_step[:5])


def test_beta_follows_its_target(tmp_path: Path) -> None:
    kl = {"beta": 1e-3, "estimator": "k1", "where": "reward", "target": 1e-3, "horizon": 8}
    it = trainer(small(steps=6, kl=kl, update={"optimizer": {"lr": 3e-2, "warmup": 0}}), tmp_path)
    it.train()
    betas = [m["kl/beta"] for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert betas[0] == 1e-3 and betas[-1] > betas[1]
    assert it.state.beta > betas[-1]


def test_training_scores_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    it = trainer(
        small(steps=1, rollout={"temperature": 1.7}, kl=NO_KL, advantage={"name": "rloo"}), tmp_path
    )
    it.train()
    [metrics] = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] <= 1e-5
    assert metrics["sampling/kl"] <= 1e-6


def test_supervised_micro_batches_add_up_to_one_mean() -> None:
    rows = [([5, 6, 7, 8, 9], [0, 1, 1, 1, 1]), ([9, 4, 3], [0, 0, 1]), ([11, 12], [0, 1])]
    grads = []
    for tokens in (4096, 3):
        engine = Engine(tiny_model(), tiny_tokenizer())
        optimizer = MasterAdamW(engine.model.parameters(), OptimizerConfig(), 1)
        optimizer.step = lambda norm: norm  # type: ignore[method-assign]
        with engine.training():
            cut, size = supervised_batch(rows).split, MicroBatchSize(tokens)
            update(cut, size, lambda b, e=engine: supervised_loss(e, b), optimizer)  # type: ignore[misc]
        parameters = engine.model.parameters()
        grads.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[0].norm()


def test_a_critic_warms_up_before_the_policy_moves(tmp_path: Path) -> None:
    for value in ("head", "critic"):
        config = small(steps=3, value={"kind": value, "warmup": 3}, kl=NO_KL)
        it = trainer(config, tmp_path / value)
        policy = [p.clone() for p in it.engine.model.parameters()]
        it.train()
        now = it.engine.model.parameters()
        assert all(torch.equal(a, b) for a, b in zip(policy, now, strict=True))
        net = it.models.critic.modules["value_head"] if it.models.critic else it.models.head
        assert net is not None and net.linear.weight.abs().sum() > 0  # type: ignore[operator, union-attr]


def test_the_average_of_the_policy(tmp_path: Path) -> None:
    it = trainer(
        small(steps=3, update={"ema": 0.5}, kl=NO_KL, advantage={"name": "rloo"}), tmp_path
    )
    assert it.average is not None
    average = [p.detach().clone() for p in it.engine.model.parameters()]
    plain = it.average.update

    def followed() -> None:
        plain()
        for a, p in zip(average, it.engine.model.parameters(), strict=True):
            a.copy_(0.5 * a + 0.5 * p.detach())

    it.average.update = followed  # type: ignore[method-assign]
    it.train()
    own = [p.detach().clone() for p in it.engine.model.parameters()]
    with it.average.applied():
        now = list(it.engine.model.parameters())
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(average, now, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, it.engine.model.parameters(), strict=True))
    assert not torch.equal(own[0], average[0])


def test_lengths_of_what_ended_stand_beside_those_of_all() -> None:
    some = [turns([4, 4], [0, 1]), turns([3], [1]), turns([6, 7], [0, 1], cut=True)]
    metrics = describe_rollout(some, {})
    of_all = [metrics[f"completions/{kind}_length"] for kind in ("mean", "min", "max")]
    ended = [metrics[f"completions/{kind}_terminated_length"] for kind in ("mean", "min", "max")]
    assert of_all == [8.0, 3.0, 13.0] and ended == [5.5, 3.0, 8.0]
    assert metrics["completions/clipped_ratio"] == 1 / 3
    assert "completions/mean_terminated_length" not in describe_rollout(some[2:], {})


def test_the_machine_is_measured_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, which belong to no step."""
    it = trainer(small(steps=1, kl=NO_KL), tmp_path)
    known: list[int] = []
    rollout = it.sampler.rollout

    def begins(step: int) -> Any:
        known.append(measure.cache_info().currsize)
        return rollout(step)

    monkeypatch.setattr(type(it.sampler), "rollout", lambda self, step: begins(step))
    measure.cache_clear()
    it.train()
    assert known == [1]
