"""Completions from vLLM servers: a server with other weights is found at once, one that fails costs
no episode, and a run over servers is the run over the engine.
"""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import CapacityError, ServerError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.pipeline.recipe import Recipe
from gearshift.rollouts import vllm
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.rollouts.vllm import GenerationConfig
from gearshift.trainers.push import PolicyOnServers
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.stage import Stage
from gearshift.types import SamplingParams, Trajectory
from tests.gyms import SayLetters, TwoTurns
from tests.rollouts.fake_vllm import FakeVLLM, serving
from tests.trainers.rl_runs import OwnReward, small
from tests.zoo import tiny_model

STARTS = [EpisodeSpec(g, g) for g in range(4)]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_PAUSE", 0.0)


def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), EngineConfig(max_num_seqs=8))


def on(urls: tuple[str, ...], own: Engine, folder: Path, **keys: Any) -> PolicyOnServers:
    return PolicyOnServers(GenerationConfig(backend="vllm", servers=urls, **keys), own, folder)


def change(own: Engine, by: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.mul_(1 + by)
    own.weights_changed()


def played(policy: PolicyOnServers, **keys: Any) -> list[Trajectory]:
    params = SamplingParams(**{"n": 2, "max_new_tokens": 8, **keys})
    with Collector(TwoTurns, tiny_tokenizer(), policy) as collector, collector.generating():
        return collector.collect(STARTS, params)


def test_greedy_episodes_are_those_of_the_engine_and_log_probs_are_the_trainers(
    tmp_path: Path,
) -> None:
    own = engine()
    with serving(FakeVLLM(), FakeVLLM()) as urls:
        policy = on(urls, own, tmp_path)
        greedy, sampled = played(policy, temperature=0.0), played(policy)
        again = played(on(urls[::-1], own, tmp_path))
    with Collector(TwoTurns, tiny_tokenizer(), own.loop) as collector, own.generating():
        wanted = collector.collect(STARTS, SamplingParams(n=2, max_new_tokens=8, temperature=0.0))
    assert [t.token_ids for t in greedy] == [t.token_ids for t in wanted]
    assert [t.token_ids for t in sampled] == [t.token_ids for t in again]
    batch = pack_trajectories(sampled)
    with own.training(), torch.no_grad():
        scored = own.logprobs(batch).logprobs
    torch.testing.assert_close(batch.scored("sampler_logprobs"), scored, atol=1e-5, rtol=0)
    assert not any(tmp_path.iterdir())


def test_groups_are_dealt_to_the_servers_and_weights_go_to_each_once(tmp_path: Path) -> None:
    own, fakes = engine(), (FakeVLLM(), FakeVLLM())
    with serving(*fakes) as urls:
        policy = on(urls, own, tmp_path)
        for _ in range(2):
            played(policy)
        change(own)
        versions = [v for t in played(policy) for v in t.weights_versions if v >= 0]
    assert set(versions) == {own.weights_version}
    # Two probes for each of two pushes; two samples of two groups, three times.
    assert [f.seen["/v1/completions"] for f in fakes] == [4 + 12, 4 + 12]
    assert [f.seen["/collective_rpc"] for f in fakes] == [2, 2]
    assert [f.seen["/reset_prefix_cache"] for f in fakes] == [2, 2]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stale", "differ from the trainer's"),
        ("head", "differ from the trainer's"),
        ("raw", "differ from the trainer's"),
        ("truncated", "15 tokens where the limit of 16"),
    ],
)
def test_a_server_with_other_weights_stops_the_run_with_one_line(
    fault: str, words: str, tmp_path: Path
) -> None:
    own, fakes = engine(), (FakeVLLM(), FakeVLLM(fault))
    with serving(*fakes) as urls, pytest.raises(ServerError) as raised:
        played(on(urls, own, tmp_path))
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert urls[1] in str(raised.value) and urls[0] not in str(raised.value)
    # The weights are pushed once more to the server that is behind, and to no other.
    pushes = 1 if fault == "truncated" else 2
    assert [f.seen["/collective_rpc"] for f in fakes] == [1, pushes]


def test_weights_that_changed_by_less_than_the_tolerance_are_missed_by_no_probe(
    tmp_path: Path,
) -> None:
    own, fake = engine(), FakeVLLM()
    with serving(fake) as urls:
        policy = on(urls, own, tmp_path, tolerance=10.0)
        played(policy)
        fake.fault = "stale"
        change(own, 1e-3)
        with pytest.raises(ServerError, match="still samples from older weights"):
            played(policy)
        fake.fault = ""
        played(policy)  # the same push again


def test_a_second_push_is_enough_where_the_first_is_lost(tmp_path: Path) -> None:
    own, fake = engine(), FakeVLLM("stale", times=1)
    with serving(fake) as urls:
        assert len(played(on(urls, own, tmp_path))) == 8
    assert fake.seen["/collective_rpc"] == 2


@pytest.mark.parametrize("fault", ["broken", "aborted", "slow", "dead", "busy"])
def test_what_a_server_fails_at_is_asked_again(fault: str, tmp_path: Path) -> None:
    own, fake = engine(), FakeVLLM()
    with serving(fake) as urls:
        policy = on(urls, own, tmp_path, timeout=5.0 if fault == "slow" else 60.0)
        wanted = played(policy)
        fake.fault, fake.times = fault, 2
        own.weights_changed()  # so that the weights are pushed again
        assert [t.token_ids for t in played(policy)] == [t.token_ids for t in wanted]
        assert fake.times == 0


def test_the_groups_of_a_server_that_dies_move_and_it_comes_back_with_the_next_push(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, fakes = engine(), (FakeVLLM(), FakeVLLM())
    with serving(*fakes) as urls:
        policy = on(urls, own, tmp_path)
        wanted = played(policy)
        fakes[1].fault = "dead"
        assert [t.token_ids for t in played(policy)] == [t.token_ids for t in wanted]
        assert policy.stats()["servers_lost"] == 1
        assert urls[1] in capsys.readouterr().out
        fakes[1].fault = ""
        change(own)
        before = fakes[1].seen["/v1/completions"]
        played(policy)
        assert fakes[1].seen["/v1/completions"] > before + 2
        fakes[0].fault = fakes[1].fault = "dead"
        with pytest.raises(ServerError, match="No vLLM server answers"):
            played(policy)


def test_log_probs_of_a_truncated_distribution_are_not_taken_for_the_policys(
    tmp_path: Path,
) -> None:
    own = engine()
    with serving(FakeVLLM()) as urls:
        policy = on(urls, own, tmp_path)
        for shaped in ("top_p", "frequency_penalty", "presence_penalty"):
            episodes = played(policy, **{shaped: 0.5})
            assert pack_trajectories(episodes).scored("sampler_logprobs").isnan().all()
        keys: dict[str, Any] = {"rollout": {"top_p": 0.5}, "steps": 1}
        metrics = learned(own, policy, tmp_path / "rl", **keys)
    assert all(math.isfinite(x) for m in metrics for x in m.values() if isinstance(x, float))
    assert metrics[0]["sampling/sampling_logp_difference/mean"] == pytest.approx(0, abs=1e-5)


def learned(own: Engine, policy: Any, folder: Path, **keys: Any) -> list[dict[str, Any]]:
    """The metrics of a few steps."""
    config = small(
        advantage={"name": "rloo"},
        kl={"beta": 0.0},
        importance={"mode": "token_truncate"},
        **keys,
    )
    collector = Collector(SayLetters, tiny_tokenizer(), policy)
    stage = Stage("rl", folder, config.steps, 0, config)
    RLTrainer(config, own, collector, rows=None, score=OwnReward(), stage=stage).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_a_policy_learns_from_servers(tmp_path: Path) -> None:
    own = engine()
    with serving(FakeVLLM()) as urls:
        policy = on(urls, own, tmp_path)
        keys: dict[str, Any] = {"rollout": {"prompts": 4, "group_size": 8}, "steps": 8}
        metrics = learned(own, policy, tmp_path / "rl", **keys)
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.2
    gaps = [m["sampling/sampling_logp_difference/mean"] for m in metrics]
    assert max(gaps) < 1e-5 and metrics[-1]["engine/push_seconds"] > 0


def test_sampling_ahead_trains_on_weights_of_the_step_before(tmp_path: Path) -> None:
    def run(folder: str, ahead: int) -> tuple[list[dict[str, Any]], list[Any]]:
        rollout = {"prompts": 2, "group_size": 4, "ahead": ahead}
        with serving(FakeVLLM()) as urls:
            own = engine()
            policy = on(urls, own, tmp_path)
            metrics = learned(own, policy, tmp_path / folder, rollout=rollout, steps=4)
        lines = (tmp_path / folder / "rollouts.jsonl").read_text().splitlines()
        return metrics, [json.loads(line)["episodes"] for line in lines]

    (_, plain), (metrics, ahead), (_, again) = run("plain", 0), run("ahead", 1), run("again", 1)
    assert ahead == again, "weights are pushed between two steps' episodes only"
    assert [m["sampling/updates_behind"] for m in metrics] == [0.0, 1.0, 1.0, 1.0]
    # The first step's weights sample the second step too; later ones are those of other weights.
    assert ahead[0] == plain[0] and ahead[2:] != plain[2:]
    farther, two = run("two", 2)
    # Weights are pushed when the last step that was begun has been sampled.
    assert [m["sampling/updates_behind"] for m in farther] == [0.0, 1.0, 2.0, 1.0]
    assert two[:2] == ahead[:2] and two[2] != ahead[2]
    groups = [[e["group_id"] for e in episodes] for episodes in two]
    assert groups == [[g, g, g, g, g + 1, g + 1, g + 1, g + 1] for g in (0, 2, 4, 6)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"generation": {}}, "set generation.backend=vllm"),
        ({"generation.sleep": True}, "set generation.sleep=false"),
        ({"replace_zero_std": 1}, "set rl.rollout.replace_zero_std=0"),
        ({"algorithm": "remax"}, "no greedy completions for remax"),
        ({"top_p": 0.9}, "set rl.rollout.top_p=1"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(keys: dict[str, Any], words: str) -> None:
    generation: dict[str, Any] = {"backend": "vllm", "servers": ["http://127.0.0.1:8000"]}
    generation = keys.pop("generation", generation)
    if keys.pop("generation.sleep", False):
        generation["sleep"] = True
    tree: dict[str, Any] = {"task": {"name": "voice_assistant"}, "generation": generation}
    tree["algorithm"] = keys.pop("algorithm", "rloo")
    Recipe.model_validate({**tree, "rl": {"rollout": keys}})
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({**tree, "rl": {"rollout": {**keys, "ahead": 1}}})


def test_the_key_goes_to_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARSHIFT_VLLM_KEY", "abc")
    fake = FakeVLLM()
    with serving(fake) as urls:
        played(on(urls, engine(), tmp_path, sleep=True))
    assert fake.keys == {"Bearer abc"}
    assert (fake.seen["/wake_up"], fake.seen["/sleep"]) == (1, 1)


def test_a_prompt_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    policy = on(("http://127.0.0.1:9",), engine(), tmp_path)
    ask = policy.generate([3] * 5000, SamplingParams(), 0)
    with pytest.raises(CapacityError, match="shorten"):
        asyncio.run(ask)


def test_importance_correction_is_on_where_another_program_samples() -> None:
    served = {"backend": "vllm", "servers": ["http://127.0.0.1:8000"]}

    def importance(**keys: Any) -> Any:
        recipe = Recipe.model_validate({"task": {"name": "voice_assistant"}, **keys})
        assert recipe.rl
        return recipe.rl.importance

    assert importance(rl={}) is None
    assert importance(rl={}, generation=served).mode == "token_truncate"
    assert importance(algorithm="grpo", generation=served).mode == "token_truncate"
    assert importance(rl={"importance": None}, generation=served) is None
    own = {"importance": {"mode": "sequence_mask"}}
    assert importance(rl=own, generation=served).mode == "sequence_mask"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"backend": "vllm"}, "needs servers"),
        ({"servers": ["http://h:1"]}, "does not use servers"),
        ({"backend": "vllm", "servers": ["h:1"]}, "no address"),
        ({"backend": "vllm", "servers": ["http://u:p@h:1"]}, "user or a password"),
        ({"backend": "vllm", "servers": ["http://h:1", "http://h:1"]}, "twice"),
    ],
)
def test_servers_that_cannot_be_right_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationConfig(**keys)
