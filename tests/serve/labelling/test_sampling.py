"""Answers that policies give to the prompts of a labelling."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from gearshift.data.formats import PromptExample
from gearshift.engine import Engine
from gearshift.engine.service import EngineService
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.serve.labelling.sampling import Feeder, policy_sampler
from gearshift.serve.policies import Policy
from gearshift.types import SamplingParams

PROMPT = PromptExample([{"role": "user", "content": "a"}])
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=10**6)


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    config = ModelConfig(name="tiny")
    engine = Engine(load_policy(config, "tiny"), load_tokenizer(config, "tiny"), seed=0)
    with EngineService(engine) as service:
        yield Policy("policy", service, engine.tokenizer, weights="cafe0000")


def test_two_samples_differ_and_come_again(policy: Policy) -> None:
    sampler = policy_sampler([(policy, "demo/rl")], 2, PARAMS)
    first = asyncio.run(asyncio.wait_for(_all(sampler), 60))
    assert first == asyncio.run(asyncio.wait_for(_all(sampler), 60))
    (one, source), (two, other) = first
    assert one != two and "<" not in one[-3:]
    assert source["model"] == "demo/rl" and source["weights_sha"] == "cafe0000"
    assert (source["sample"], other["sample"]) == (0, 1)
    assert source["sampling"]["max_new_tokens"] == policy.service.max_length // 2


def test_two_policies_give_one_answer_each(policy: Policy) -> None:
    sampler = policy_sampler([(policy, "a"), (policy, "b")], 1, PARAMS)
    found = asyncio.run(asyncio.wait_for(_all(sampler), 60))
    assert [source["model"] for _, source in found] == ["a", "b"]


async def _all(sampler: Any) -> list[Any]:
    return list(await sampler(PROMPT))


def test_a_sampler_that_is_away_for_a_moment_does_not_cost_all_prompts() -> None:
    async def fails(_: PromptExample) -> list[Any]:
        raise ConnectionError("away")

    async def work() -> Feeder:
        feeder = Feeder([PROMPT] * 10, fails, _never)
        feeder.wake(_none)
        feeder.wake(_none)
        await asyncio.sleep(0.05)
        return feeder

    feeder = asyncio.run(work())
    assert (feeder.failed, feeder.reason, feeder.more) == (3, "away", True)


async def _none() -> int:
    return 0


async def _never(_: Any) -> bool:
    raise AssertionError
