"""The loop: it learns, with every advantage and loss; faulty environments cost their own episodes
only.
"""

from pathlib import Path
from statistics import fmean

import pytest
import torch

from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.errors import DataError
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.rl.batching import pack_trajectories, place_rewards, written_lengths
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.types import SamplingParams
from tests.gyms import Faulty, SayLetters, TwoTurns
from tests.trainers.rl_runs import small, trainer
from tests.zoo import random_model


@pytest.mark.parametrize(
    "method",
    [
        {"advantage": {"name": "value_baseline"}},
        {"advantage": {"name": "value_baseline"}, "value": {"kind": "critic"}},
        {"advantage": {"name": "gae"}, "loss": {"name": "ppo_clip"}, "update": {"epochs": 2}},
        {"advantage": {"name": "rloo"}},
        {"advantage": {"name": "rloo", "positive_only": True}},
        {
            "advantage": {"name": "grpo"},
            "loss": {"name": "ppo_clip"},
            "kl": {"beta": 0.01, "estimator": "k3", "where": "loss"},
        },
        {"advantage": {"name": "dr_grpo"}, "loss": {"aggregation": "sequence_mean"}},
    ],
    ids=lambda m: "-".join(str(v) for s in m.values() for v in s.values() if isinstance(v, str)),
)
def test_it_learns(tmp_path: Path, method: dict[str, object]) -> None:
    config = small(
        steps=40, rollout={"prompts": 4, "group_size": 8}, **{"kl": {"beta": 0}, **method}
    )
    trainer(config, tmp_path).train()
    rewards = [m["reward"] for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert fmean(rewards[-5:]) > fmean(rewards[:5]) + 0.3


def test_what_is_not_computed_does_not_change_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of advantage 0 are left out: the weights end as if they had been computed."""
    ends = []
    linear = {"lr": 0.1, "eps": 1.0}  # linear in the gradient, unlike AdamW's first step
    config = small(
        steps=3,
        advantage={"name": "rloo", "positive_only": True},
        kl={"beta": 0},
        update={"optimizer": linear},
    )
    for folder in ("skipped", "computed"):
        run = trainer(config, tmp_path / folder)
        run.train()
        ends.append(torch.cat([p.detach().flatten() for p in run.engine.model.parameters()]))
        monkeypatch.setattr(RLTrainer, "only_advantages_count", property(lambda self: False))
    assert (ends[0] - ends[1]).norm() <= 1e-5 * ends[0].norm()


def test_labelled_examples_add_their_weighted_gradient(tmp_path: Path) -> None:
    """One update with examples = one without + weight * the mean token loss's own gradient."""
    rendered = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]), ([9, 4, 3, 11], [0, 1, 0, 1])]
    examples = Mixture([rendered], [1.0], seed=0)
    linear = {"lr": 10.0, "eps": 1e3, "max_grad_norm": 1e9}  # AdamW's first step is then linear
    mix = {"weight": 0.5, "batch_size": 2}
    config = small(
        steps=1,
        kl={"beta": 0},
        update={"optimizer": linear},
        advantage={"name": "rloo"},
        sft_mix=mix,
    )
    ends = []
    for name, given in (("mixed", examples), ("alone", None)):
        run = trainer(config, tmp_path / name, examples=given)
        run.train()
        ends.append([p.detach() for p in run.engine.model.parameters()])

    model = tiny_model()
    model.set_attn_implementation("eager")
    losses = []
    for ids, mask in rendered:
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses += [-logprobs[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]]
    (0.5 * torch.stack(losses).mean()).backward()
    for mixed, alone, parameter in zip(*ends, model.parameters(), strict=True):
        assert parameter.grad is not None
        expected = -10.0 * parameter.grad / 1e3
        assert (mixed - alone - expected).norm() <= 0.02 * expected.norm() + 1e-9


def test_a_large_beta_holds_the_policy_near_the_reference(tmp_path: Path) -> None:
    ends = {}
    for beta in (0.001, 1.0):
        config = small(
            steps=15,
            rollout={"prompts": 4, "group_size": 8},
            kl={"beta": beta, "estimator": "k1", "where": "reward"},
        )
        trainer(config, tmp_path / str(beta)).train()
        ends[beta] = read_metrics(tmp_path / str(beta) / "metrics.jsonl")[-1]["kl"]
    assert ends[1.0] < 0.3 * ends[0.001]


def test_a_faulty_environment_costs_its_own_episodes(tmp_path: Path) -> None:
    run = trainer(small(steps=2, kl={"beta": 0}), tmp_path, environment=Faulty)
    run.train()
    metrics = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert metrics["environment/failures"] == 6  # half of eight, and of the four in their place
    assert all(v == v for v in metrics.values())


def test_a_rollout_without_any_reward_says_why(tmp_path: Path) -> None:
    class Broken(SayLetters):
        def step(self, action: str) -> tuple:
            raise RuntimeError("no server")

    with pytest.raises(DataError, match="no server"):
        trainer(small(), tmp_path, environment=Broken).train()


def test_two_turns_are_one_sequence_of_the_sampled_tokens() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    collector = Collector(TwoTurns, engine.tokenizer, engine.loop)
    with engine.generating():
        episodes = collector.collect(
            [EpisodeSpec(3, seed=0)], SamplingParams(n=6, max_new_tokens=40)
        )
    finished = [t for t in episodes if t.info.success]
    assert finished, "at least one episode must get to its second turn"
    for t in finished:
        assert t.reward == 1.25
        rewarded = [i for i, r in enumerate(t.rewards) if r]
        assert len(rewarded) == 2 and all(t.loss_mask[i] for i in rewarded)
        text = engine.tokenizer.decode(t.token_ids)
        assert text.count("<|im_start|>assistant\n") == 2 and "and again<|im_end|>" in text
        assert text.count("<|im_start|>user") == 2
    batch = pack_trajectories(finished)
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(batch).logprobs
    assert (scored - batch.scored("sampler_logprobs")).abs().max() <= 1e-5
    rewards = place_rewards(finished).split(written_lengths(finished).tolist())
    assert [float(own.sum()) for own in rewards] == [1.25] * len(finished)


def test_micro_batches_do_not_change_the_run(tmp_path: Path) -> None:
    ends = []
    for tokens in (10_000, 40):
        # A large eps makes AdamW linear in the gradient; its first step is else the gradient's
        # sign.
        linear = {"lr": 0.1, "eps": 1.0}
        config = small(
            steps=3,
            update={"micro_batch_tokens": tokens, "optimizer": linear},
            value={"optimizer": linear},
        )
        run = trainer(config, tmp_path / str(tokens))
        run.train()
        ends.append(torch.cat([p.detach().flatten() for p in run.engine.model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-4 * ends[0].norm()
